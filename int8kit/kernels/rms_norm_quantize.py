"""RMSNorm, weight, modulation and quantization in one pass over x, in Triton.

    rstd = 1 / sqrt(mean(x * x) + eps)
    y = ((x * rstd) * weight) * (1 + modulation[b])        b = m // (M // B)
    s = max|y| / 127,  q = clamp(rint(y / s), -127, 127)

    x [M, K]   weight [K] or absent   modulation [B, K] or absent -> q [M, K] int8, s [M] fp32

Every operation is fp32 and rounded by itself. Unlike in the eager model, y is not rounded to bf16 before the
quantization. Bit-equal to `int8kit.reference.rms_norm_quantize` under every tile: see `row_primitives`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from int8kit.kernels import row_primitives
from int8kit.kernels.row_primitives import (
    RowTile,
    larger,
    load_chunk,
    load_row,
    mean_square,
    reciprocal_root,
    row_scale,
    store_quantized,
    widen,
    widen_row,
)


@triton.jit
def norm_and_quantize(
    xs, rstd, weight_ptr, mod_ptr, q_ptr, s_ptr, K: tl.constexpr, CHUNK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_MODULATION: tl.constexpr,
):  # fmt: skip
    """Scale the fp32 row in the tuple by rstd, weight and modulation, quantize it, and store q and s."""
    ys = ()
    top = tl.zeros([CHUNK], tl.float32)
    for c in tl.static_range(len(xs)):
        y = xs[c] * rstd
        if HAS_WEIGHT:
            y = y * widen(load_chunk(weight_ptr, c, K, CHUNK))
        if HAS_MODULATION:
            y = y * (1.0 + widen(load_chunk(mod_ptr, c, K, CHUNK)))
        top = larger(top, y)
        ys = ys + (y,)  # noqa: RUF005
    s = row_scale(top)
    tl.store(s_ptr, s)
    store_quantized(q_ptr, ys, s, K, CHUNK)


@triton.jit(do_not_specialize=["IMAGE_ROWS"])
def _rms_norm_quantize(
    x_ptr, weight_ptr, mod_ptr, q_ptr, s_ptr, IMAGE_ROWS, stride_xm, stride_mb, eps,
    K: tl.constexpr, CHUNK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_MODULATION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    xs = widen_row(load_row(x_ptr + row * stride_xm, K, CHUNK))
    rstd = reciprocal_root(mean_square(xs, K, CHUNK), eps)
    mod_ptr += (tl.program_id(0) // IMAGE_ROWS).to(tl.int64) * stride_mb
    norm_and_quantize(xs, rstd, weight_ptr, mod_ptr, q_ptr + row * K, s_ptr + row, K, CHUNK, HAS_WEIGHT, HAS_MODULATION)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    modulation: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    tile: RowTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize, scale and quantize the rows of x -> q [M, K] int8, s [M] fp32.

    x: [M, K]. weight: [K]. modulation: [B, K], B a divisor of M. Each tensor is bf16, fp16 or fp32 and contiguous along
    K. tile: chosen by K if absent; every tile gives the same bits. Raises ShapeError for other tensors and for K >
    16384.
    """
    row_primitives.check_matrix("x", x)
    m, k = x.shape
    row_primitives.check_held(k)
    if weight is not None:
        row_primitives.check_vector("weight", weight, k)
    image_rows = m if modulation is None else row_primitives.check_images("modulation", modulation, m, k)
    row_primitives.check_one_device(x, weight, modulation)
    tile = tile or row_primitives.default_tile(k)
    row_primitives.check_tree(tile)
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    s = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        x, weight, modulation = (
            row_primitives.interpreter_fp32(x),
            row_primitives.interpreter_fp32(weight),
            row_primitives.interpreter_fp32(modulation),
        )
        row_primitives.launch_rows(
            _rms_norm_quantize, (m, 1),
            (x, x if weight is None else weight, x if modulation is None else modulation, q, s),
            (x.stride(0), 0 if modulation is None else modulation.stride(0)),
            free=(image_rows,), floats=(eps,), num_warps=tile.num_warps,
            K=k, CHUNK=tile.chunk, HAS_WEIGHT=weight is not None, HAS_MODULATION=modulation is not None,
        )  # fmt: skip
    return q, s
