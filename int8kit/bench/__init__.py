"""Benchmarks on the present GPU.

    gemm           one linear of each shape, int8kit beside other kernels, as one JSON document
    contestants    the kernels that take part in `gemm`
    fused          the row kernels under each of their tiles, beside a copy of as many bytes
    model          one forward of the whole transformer, bf16 and INT8
    profile        where the wall clock of one call goes
    results        the schema that the documents of all benchmarks share

Each benchmark module is a function that returns a JSON document; `cli` parses and prints.
"""
