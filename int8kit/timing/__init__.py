"""Timing on the present GPU, in one place for the tuner and the benchmark.

    operands      tensors of a shape, with copies of the weight that exceed the L2
    captured      launches as one repeatable call, in a CUDA graph
    interleave    samples of several short calls, interleaved in shuffled rounds, by CUDA events
    wall_clock    long calls, interleaved in the same way, by the wall clock
    gpu_state     clock, power, temperature and throttling
    health        a check before anything is timed

`spec.POLICIES` states the measurement policy.
"""
