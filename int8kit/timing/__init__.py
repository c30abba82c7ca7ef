"""Timing on the present GPU, in one place for the tuner and the benchmark.

    operands      tensors of a shape, with copies of the weight that exceed the L2
    captured      launches as one repeatable call, in a CUDA graph
    interleave    samples of several calls, interleaved in shuffled rounds
    gpu_state     clock, power, temperature and throttling
    health        a check before anything is timed

`spec.POLICIES` states the measurement policy.
"""
