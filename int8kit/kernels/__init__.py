"""Device code and its launchers, one stem a kernel: `gemm`, `quantize`. Each has its truth in `int8kit.reference`.

A launcher takes an explicit configuration and tensors on one device. With `TRITON_INTERPRET=1` in the environment
before triton is first imported, the same source runs on the CPU in Triton's interpreter, slowly.
"""
