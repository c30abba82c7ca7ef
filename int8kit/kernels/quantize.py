"""Symmetric int8 quantization of rows, in Triton: the activations' half of a W8A8 linear.

    s[m] = max|x[m, :]| / 127,  q[m, k] = clamp(rint(x[m, k] / s[m]), -127, 127)      x [M, K] bf16 | fp16 | fp32

Zero rows, subnormal rows, and rows with a NaN or an infinity: see `int8kit.reference.quantize`, which this equals to
the bit. One program makes one row: it holds it in registers and reads it once up to K = 16384, as the other kernels
over rows do (`rows` says how, and how a quotient costs four instructions); a longer row, which only the text features
of a model have, is read twice, the second time out of L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from int8kit.errors import ShapeError
from int8kit.kernels import row_primitives
from int8kit.kernels.row_primitives import (
    INTERPRETED,
    ROUNDER,
    S_ORDINARY,
    larger,
    load_row,
    row_scale,
    store_quantized,
    widen,
    widen_row,
)

LONG_CHUNK, LONG_WARPS = 4096, 16


@triton.jit
def _quantize(x_ptr, q_ptr, s_ptr, stride_xm, stride_qm, K: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    xs = widen_row(load_row(x_ptr + row * stride_xm, K, CHUNK))
    top = tl.zeros([CHUNK], tl.float32)
    for c in tl.static_range(len(xs)):
        top = larger(top, xs[c])
    s = row_scale(top)
    tl.store(s_ptr + row, s)
    store_quantized(q_ptr + row * stride_qm, xs, s, K, CHUNK)


@triton.jit
def _quantize_long(x_ptr, q_ptr, s_ptr, stride_xm, stride_qm, K: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    q_ptr += row * stride_qm
    ks = tl.arange(0, CHUNK)
    top = tl.zeros([CHUNK], tl.float32)
    for k in range(0, K, CHUNK):
        top = larger(top, widen(tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0)))
    s = row_scale(top)
    tl.store(s_ptr + row, s)
    ordinary = (s >= S_ORDINARY) | (s == 0)
    if INTERPRETED:
        ordinary = False
    if ordinary:  # as rows.store_quantized
        r = tl.where(s > 0, tl.div_rn(1.0, tl.where(s > 0, s, 1.0)), 0.0)
        rest = tl.fma(-s, r, 1.0) * r
        for k in range(0, K, CHUNK):
            x = widen(tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0))
            q = tl.fma(x, r, x * rest)
            q = tl.fma(tl.fma(-s, q, x), r, q) + ROUNDER
            tl.store(q_ptr + k + ks, q.to(tl.int32, bitcast=True).to(tl.int8), mask=ks < K - k)
    else:
        divisor = tl.where(s > 0, s, 1.0)
        for k in range(0, K, CHUNK):
            x = widen(tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0))
            q = tl.minimum(tl.maximum(tl.div_rn(x, divisor), -127.0), 127.0)
            q = tl.where(s > 0, q, 0.0) + ROUNDER
            tl.store(q_ptr + k + ks, q.to(tl.int32, bitcast=True).to(tl.int8), mask=ks < K - k)


def quantize(
    x: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None, *, tile: row_primitives.RowTile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of x [M, K] (bf16, fp16 or fp32) -> q [M, K] int8, s [M] fp32.

    out: (q, s) to write into, q contiguous along K; made if absent. tile: any gives the same bits; absent, one by K.
    Bit-equal to `int8kit.reference.quantize`. Raises ShapeError for another dtype or shape, or if x is not contiguous
    along K.
    """
    row_primitives.check_matrix("x", x)
    m, k = x.shape
    if out is None:
        q = torch.empty(m, k, dtype=torch.int8, device=x.device)
        s = torch.empty(m, dtype=torch.float32, device=x.device)
    else:
        q, s = out
        if (q.shape, q.dtype, s.shape, s.dtype) != ((m, k), torch.int8, (m,), torch.float32) or not s.is_contiguous():
            raise ShapeError(f"out {tuple(q.shape)}, {tuple(s.shape)}: legal are int8 [{m}, {k}] and float32 [{m}]")
        if k > 1 and q.stride(1) != 1:
            raise ShapeError(f"q has strides {q.stride()}: the last must be 1")
    if not m or not k:
        return q, s.zero_()
    held = k <= row_primitives.K_MAX_HELD
    tile = tile or (row_primitives.default_tile(k) if held else row_primitives.RowTile(LONG_CHUNK, LONG_WARPS))
    x = row_primitives.exact(x)
    row_primitives.launch_rows(
        _quantize if held else _quantize_long, (m, 1), (x, q, s), (x.stride(0), q.stride(0)),
        num_warps=tile.num_warps, K=k, CHUNK=tile.chunk,
    )  # fmt: skip
    return q, s
