"""Tuning: which tile configuration of which kernel is the fastest for each shape of a GPU.

    session         a run over all shapes and GPUs
    search          which configurations are timed next, and which one wins
    space           the legal configurations, and the kernels that they need
    cross_compile   compiling for a GPU that is not in this machine
    measure         timing on the present GPU
    tasks           the functions that a worker process executes
    workers         the worker processes
    journal         the finished steps of a run, so that it can be resumed
    consolidate     fewer distinct kernels, within 1 % of the time
    migrate         entries of another Triton

Start with `session`.
"""
