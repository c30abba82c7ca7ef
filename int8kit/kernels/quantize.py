"""Symmetric int8 quantization of rows in Triton: activations per token, weights per output channel.

    s[m] = max|x[m, :]| / 127,  q[m, k] = clamp(rint(x[m, k] / s[m]), -127, 127)      x [M, K] bf16 | fp16 | fp32

Bit-equal to `int8kit.reference.quantize`, also for zero rows, subnormal rows and rows with a NaN or an infinity. One
program quantizes one row. Up to K = 16384 it holds the row in registers and reads it once (`row_primitives`). A longer
row, which only the text features of a model have, is read twice, the second time from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from int8kit.errors import ShapeError
from int8kit.kernels import row_primitives
from int8kit.kernels.row_primitives import (
    clamped_quotient,
    is_ordinary,
    larger,
    load_row,
    quotient,
    reciprocal_and_rest,
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
    if is_ordinary(s):
        r, rest = reciprocal_and_rest(s)
        for k in range(0, K, CHUNK):
            x = widen(tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0))
            tl.store(q_ptr + k + ks, quotient(x, s, r, rest), mask=ks < K - k)
    else:
        for k in range(0, K, CHUNK):
            x = widen(tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0))
            tl.store(q_ptr + k + ks, clamped_quotient(x, s), mask=ks < K - k)


def quantize(
    x: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None, *, tile: row_primitives.RowTile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of x [M, K] (bf16, fp16 or fp32) -> q [M, K] int8, s [M] fp32.

    out: (q, s) to write into, q contiguous along K; allocated if absent. tile: chosen by K if absent; every tile gives
    the same bits. Bit-equal to `int8kit.reference.quantize`. Raises ShapeError for another dtype or shape, or if x is
    not contiguous along K.
    """
    row_primitives.check_matrix("x", x)
    m, k = x.shape
    if out is None:
        q = torch.empty(m, k, dtype=torch.int8, device=x.device)
        s = torch.empty(m, dtype=torch.float32, device=x.device)
    else:
        q, s = out
        if (q.shape, q.dtype, s.shape, s.dtype) != ((m, k), torch.int8, (m,), torch.float32) or not s.is_contiguous():
            raise ShapeError(f"out {tuple(q.shape)}, {tuple(s.shape)}: expected int8 [{m}, {k}] and float32 [{m}]")
        if k > 1 and q.stride(1) != 1:
            raise ShapeError(f"q has strides {q.stride()}: the last must be 1")
        if not q.device == s.device == x.device:
            raise ShapeError(f"out on {q.device}, {s.device}: expected both on {x.device}, the device of x")
    if not m or not k:
        return q, s.zero_()
    held = k <= row_primitives.K_MAX_HELD
    tile = tile or (row_primitives.default_tile(k) if held else row_primitives.RowTile(LONG_CHUNK, LONG_WARPS))
    x = row_primitives.interpreter_fp32(x)
    row_primitives.launch_rows(
        _quantize if held else _quantize_long, (m, 1), (x, q, s), (x.stride(0), q.stride(0)),
        num_warps=tile.num_warps, K=k, CHUNK=tile.chunk,
    )  # fmt: skip
    return q, s
