"""Symmetric int8 quantization of rows, in Triton: the activations' half of a W8A8 linear.

    s[m] = max|x[m, :]| / 127,  q[m, k] = clamp(rint(x[m, k] / s[m]), -127, 127)      x [M, K] bf16 | fp16 | fp32

Zero rows, subnormal rows, and rows with a NaN or an infinity: see `int8kit.reference.quantize`, which this equals to
the bit. One program makes one row, in one pass if it fits block_k and in two over the cached row otherwise.

The maximum is taken over the bits of |x| as integers, whose order is that of the numbers and puts infinities and NaNs
on top; a floating-point maximum drops NaN. Both divisions are IEEE (`div_rn`), never a product with a reciprocal.
Adding 1.5 * 2**23 rounds to the nearest integer, ties to even, and leaves it in the low byte of the bits: that spares
the slow float-to-integer conversion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from int8kit.kernels.operands import interpreted, on_device
from int8kit.spec import ShapeError

IN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_K_MAX = 16384


@triton.jit
def _quantize(
    x_ptr, q_ptr, s_ptr, K, stride_xm, stride_qm, BLOCK_K: tl.constexpr, ONE_PASS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    q_ptr += row * stride_qm
    ks = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
    top = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not ONE_PASS:
        for k in range(BLOCK_K, K, BLOCK_K):
            x = tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0).to(tl.float32)
            top = tl.maximum(top, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    amax_bits = tl.max(top, 0)
    s = tl.where(amax_bits < 0x7F800000, tl.div_rn(amax_bits.to(tl.float32, bitcast=True), 127.0), float("nan"))
    tl.store(s_ptr + row, s)
    divisor = tl.where(s > 0, s, 1.0)
    for k in range(0, K, BLOCK_K):
        if not ONE_PASS:
            x = tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0).to(tl.float32)
        v = tl.minimum(tl.maximum(tl.div_rn(x, divisor), -127.0), 127.0)
        v = tl.where(s > 0, v, 0.0) + 12582912.0
        tl.store(q_ptr + k + ks, v.to(tl.int32, bitcast=True).to(tl.int8), mask=ks < K - k)


def quantize(
    x: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of x [M, K] (bf16, fp16 or fp32) -> q [M, K] int8, s [M] fp32.

    out: (q, s) to write into, q contiguous along K; made if absent. Bit-equal to `int8kit.reference.quantize`. Raises
    ShapeError for another dtype or shape, or if x is not contiguous along K.
    """
    if x.dim() != 2 or x.dtype not in IN_DTYPES:
        raise ShapeError(f"x {x.dtype} {tuple(x.shape)}: legal is [M, K] of bf16, fp16 or fp32; reshape or cast first")
    m, k = x.shape
    if k > 1 and x.stride(1) != 1:
        raise ShapeError(f"x has strides {x.stride()}: the last must be 1; call .contiguous() first")
    if interpreted():
        x = x.float()  # exact; Triton's interpreter converts subnormal bf16 numbers wrongly
    if out is None:
        q = torch.empty(m, k, dtype=torch.int8, device=x.device)
        s = torch.empty(m, dtype=torch.float32, device=x.device)
    else:
        q, s = out
        if (q.shape, q.dtype, s.shape, s.dtype) != ((m, k), torch.int8, (m,), torch.float32) or not s.is_contiguous():
            raise ShapeError(f"out {tuple(q.shape)}, {tuple(s.shape)}: legal are int8 [{m}, {k}] and float32 [{m}]")
        if k > 1 and q.stride(1) != 1:
            raise ShapeError(f"q has strides {q.stride()}: the last must be 1")
    if m and k:
        block = min(triton.next_power_of_2(k), BLOCK_K_MAX)
        with on_device(x):
            _quantize[(m,)](
                x, q, s, k, x.stride(0), q.stride(0),
                BLOCK_K=block, ONE_PASS=k <= block, num_warps=min(max(block // 512, 1), 16), enable_fp_fusion=False,
            )  # fmt: skip
    return q, s
