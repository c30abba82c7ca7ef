"""Epilogue of the three GEMM kernels: scales, bias and SwiGLU of int32 accumulators in registers.

    y = (fp32(acc) * sx) * sw + fp32(bias)                  each operation rounded by itself
    out = silu(y[:, 2 j]) * y[:, 2 j + 1]                   SwiGLU: nothing is rounded in between

The order of the roundings is part of the definition in `int8kit.reference`. Therefore it is written once, as plain
Triton functions that the Gluon kernels call too. Compile them with `launch.COMPILE_OPTIONS`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from int8kit.kernels.activations import silu


@triton.jit
def dequantize(acc, sx, sw):
    """(fp32(acc) * sx) * sw. acc: [R, C] int32; sx: [R, 1] fp32; sw: [1, C] fp32 -> [R, C] fp32."""
    return acc.to(tl.float32) * sx * sw


@triton.jit
def add_bias(y, bias):
    """y + fp32(bias). y: [R, C] fp32; bias: [1, C] bf16, fp16 or fp32 -> [R, C] fp32."""
    return y + bias.to(tl.float32)


@triton.jit
def swiglu(y):
    """silu(gate) * up of fp32 [R, 2 C]: gates in the even columns, ups in the odd ones -> [R, C]."""
    gate, up = y.reshape(y.shape[0], y.shape[1] // 2, 2).split()
    return silu(gate) * up
