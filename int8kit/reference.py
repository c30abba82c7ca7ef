"""The truth, in plain torch: what every kernel must compute, to the bit. Also the CPU backend of `int8kit run`.

    x [M, K] bf16 | fp16 | fp32  --quantize-->  xq [M, K] int8, sx [M] fp32
    w [N, K]                     --quantize-->  wq [N, K] int8, sw [N] fp32      (once)
    y[m, n] = out_dtype((fp32(sum_k xq[m, k] * wq[n, k]) * sx[m]) * sw[n] + fp32(bias[n]))

Each float32 operation is rounded on its own, in this order: no fused multiply-add. The sum is exact. So the result
depends neither on a tile shape, nor on M, nor on the device.

Products are summed in float64, whose 53 bits hold any int32 sum exactly in any order; that is faster than int64 on a
CPU and independent of `torch._int_mm`, which is the second judge. This module imports nothing that it judges.
"""

from __future__ import annotations

import torch

from int8kit.spec import GemmShape

_ROWS = 4096  # rows of x that are in float64 at once: bounds the memory, changes no bit


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 quantization, one scale a row.

    x: [M, K], bf16, fp16 or fp32. Returns q [M, K] int8 and s [M] fp32 with x ~ q * s[:, None]:

        s = max|x[m, :]| / 127            IEEE float32 division
        q = clamp(rint(x / s), -127, 127) IEEE float32 division, ties to even

    A row of zeros, or one so small that s underflows to zero, has s = 0 and q = 0. A row that holds a NaN or an
    infinity has s = NaN and q = 0, so that its whole output row is NaN. Subnormal numbers are kept: flushing them to
    zero would turn a subnormal row into a row of zeros.
    """
    xf = x.float()
    amax = xf.abs().amax(dim=-1) if x.shape[-1] else xf.new_zeros(x.shape[:-1])
    # A tensor divisor: on CUDA torch multiplies by the reciprocal of a Python number, which is another rounding.
    s = torch.where(amax.isfinite(), amax / torch.full_like(amax, 127.0), torch.nan)
    usable = (s > 0)[:, None]
    q = torch.where(usable, xf / torch.where(usable, s[:, None], 1.0), 0.0)
    return q.round().clamp(-127, 127).to(torch.int8), s


def accumulate(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """The exact products' sums: xq [M, K] int8, wq [N, K] int8 -> [M, N] int32. Raises ShapeError for K > 131071."""
    GemmShape(max(xq.shape[0], 1), wq.shape[0], xq.shape[1])
    w = wq.double().t()
    out = torch.empty(xq.shape[0], wq.shape[0], dtype=torch.int32, device=xq.device)
    for rows, block in zip(out.split(_ROWS), xq.split(_ROWS), strict=True):
        rows.copy_(block.double() @ w)
    return out


def dequantize(
    acc: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """The epilogue: acc [M, N] int32, sx [M] and sw [N] fp32, bias [N] or None -> [M, N] out_dtype."""
    y = (acc.float() * sx[:, None]) * sw
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def scaled_mm(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`dequantize(accumulate(xq, wq), sx, sw, bias, out_dtype)`: [M, N]. Raises ShapeError for K > 131071."""
    return dequantize(accumulate(xq, wq), sx, sw, bias, out_dtype)


def linear(x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer on x [..., K] with an int8 weight [N, K] -> [..., N] of x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    xq, sx = quantize(rows)
    return scaled_mm(xq, wq, sx, sw, bias, out_dtype=x.dtype).reshape(*x.shape[:-1], wq.shape[0])
