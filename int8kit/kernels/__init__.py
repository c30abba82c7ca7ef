"""Device code and its launchers, one stem a kernel, each with its truth in `int8kit.reference`.

`gemm` is the door to the three that make the product; `quantize` and the kernels around the linears share `rows`.

A launcher takes an explicit configuration and tensors on one device. With `TRITON_INTERPRET=1` in the environment
before triton is first imported, the same source runs on the CPU in Triton's interpreter, slowly; what is written in
Gluon does not.
"""
