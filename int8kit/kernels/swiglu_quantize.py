"""SwiGLU and quantization in one pass over the joined projection, in Triton.

    y[m, j] = silu(gu[m, 2 j]) * gu[m, 2 j + 1]
    s = max|y| / 127,  q = clamp(rint(y / s), -127, 127)

    gu [M, 2 F], gate and up of a feature side by side -> q [M, F] int8, s [M] fp32

The rows of the weights are interleaved once, when a model is loaded. Gate and up of a feature then lie in one word, and
one thread holds both; in a GEMM's epilogue one accumulator fragment does. Two halves of a wide row would suit this
kernel, but not the epilogue. Every operation is fp32 and rounded by itself. Unlike in the eager model, y is not rounded
to bf16 before the quantization. Bit-equal to `int8kit.reference.swiglu_quantize` under every tile; `activations`
defines silu.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from int8kit.errors import ShapeError
from int8kit.kernels import row_primitives
from int8kit.kernels.activations import silu
from int8kit.kernels.row_primitives import RowTile, larger, load_row, row_scale, store_quantized, widen


@triton.jit
def _swiglu_quantize(gu_ptr, q_ptr, s_ptr, stride_gm, F: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pairs = load_row(gu_ptr + row * stride_gm, 2 * F, 2 * CHUNK)
    ys = ()
    top = tl.zeros([CHUNK], tl.float32)
    for c in tl.static_range(len(pairs)):
        g, u = tl.split(tl.reshape(widen(pairs[c]), [CHUNK, 2]))
        y = silu(g) * u
        top = larger(top, y)
        ys = ys + (y,)  # noqa: RUF005
    s = row_scale(top)
    tl.store(s_ptr + row, s)
    store_quantized(q_ptr + row * F, ys, s, F, CHUNK)


def default_tile(f: int) -> RowTile:
    """The default row tile with twice the warps: a chunk of F is 2 * chunk elements of gu, 16 bytes per thread."""
    tile = row_primitives.default_tile(f)
    return RowTile(tile.chunk, min(2 * tile.num_warps, 16))


def swiglu_quantize(gu: torch.Tensor, *, tile: RowTile | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, quantized: gu [M, 2 F], column 2 j the gate and 2 j + 1 the up of feature j -> q [M, F], s [M].

    gu: bf16, fp16 or fp32, contiguous along its columns. tile: chosen by F if absent; every tile gives the same bits.
    Raises ShapeError for other tensors and for F > 16384.
    """
    row_primitives.check_matrix("gu", gu)
    m, f = gu.shape[0], gu.shape[1] // 2
    if gu.shape[1] % 2:
        raise ShapeError(f"gu {tuple(gu.shape)}: expected [M, 2 F], gate and up side by side; interleave the weights")
    row_primitives.check_held(f)
    tile = tile or default_tile(f)
    q = torch.empty(m, f, dtype=torch.int8, device=gu.device)
    s = torch.empty(m, dtype=torch.float32, device=gu.device)
    if m:
        gu = row_primitives.interpreter_fp32(gu)
        row_primitives.launch_rows(
            _swiglu_quantize, (m, 1), (gu, q, s), (gu.stride(0),), num_warps=tile.num_warps, F=f, CHUNK=tile.chunk
        )
    return q, s
