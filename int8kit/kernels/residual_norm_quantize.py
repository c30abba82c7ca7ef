"""Gated addition of a branch to the residual stream, and the next branch's quantized input, in one pass, in Triton.

    new = dtype(residual + gate[b] * ((branch * rstd(branch)) * branch_weight))        b = m // (M // B)
    y = ((new * rstd(new)) * weight) * (1 + modulation[b])
    s = max|y| / 127,  q = clamp(rint(y / s), -127, 127)

    residual, branch [M, K]   branch_weight, weight [K]   gate, modulation [B, K]
    -> new [M, K] of residual's dtype, q [M, K] int8, s [M] fp32

Every operation is fp32 and rounded by itself. `new` is rounded once, to the stored dtype. Its norm is the norm of the
rounded values, which the next kernel reads from memory. A gate is one small vector per image, the same for all rows.
Where the model has tanh(value), the caller computes it once, so this kernel has no transcendental function. Bit-equal
to `int8kit.reference.residual_norm_quantize` under every tile: see `row_primitives`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from int8kit.kernels import row_primitives
from int8kit.kernels.rms_norm_quantize import norm_and_quantize
from int8kit.kernels.row_primitives import (
    RowTile,
    load_chunk,
    load_row,
    mean_square,
    reciprocal_root,
    round_to,
    store_chunk,
    widen,
    widen_row,
)


@triton.jit(do_not_specialize=["IMAGE_ROWS"])
def _residual_norm_quantize(
    residual_ptr, branch_ptr, branch_weight_ptr, gate_ptr, weight_ptr, mod_ptr, new_ptr, q_ptr, s_ptr,
    IMAGE_ROWS, stride_rm, stride_bm, stride_gb, stride_mb, eps,
    K: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = (tl.program_id(0) // IMAGE_ROWS).to(tl.int64)
    gate_ptr += image * stride_gb
    branch = load_row(branch_ptr + row * stride_bm, K, CHUNK)
    residual = load_row(residual_ptr + row * stride_rm, K, CHUNK)
    branch = widen_row(branch)
    rstd = reciprocal_root(mean_square(branch, K, CHUNK), eps)
    xs = ()
    for c in tl.static_range(len(branch)):
        scaled = (branch[c] * rstd) * widen(load_chunk(branch_weight_ptr, c, K, CHUNK))
        new = widen(residual[c]) + widen(load_chunk(gate_ptr, c, K, CHUNK)) * scaled
        new = round_to(new, DTYPE)
        store_chunk(new_ptr + row * K, new.to(new_ptr.dtype.element_ty), c, K, CHUNK)
        xs = xs + (new,)  # noqa: RUF005
    rstd = reciprocal_root(mean_square(xs, K, CHUNK), eps)
    norm_and_quantize(
        xs, rstd, weight_ptr, mod_ptr + image * stride_mb, q_ptr + row * K, s_ptr + row, K, CHUNK, True, True
    )


def residual_norm_quantize(
    residual: torch.Tensor,
    branch: torch.Tensor,
    branch_weight: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    modulation: torch.Tensor,
    eps: float = 1e-5,
    *,
    tile: RowTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Residual plus gated norm of the branch, and its norm in int8 -> new [M, K] of residual's dtype, q [M, K], s [M].

    residual, branch: [M, K]. branch_weight, weight: [K]. gate (after tanh, if the model has one) and modulation: [B,
    K], B a divisor of M. Each tensor is bf16, fp16 or fp32 and contiguous along K. tile: chosen by K if absent; every
    tile gives the same bits. Raises ShapeError for other tensors and for K > 16384.
    """
    row_primitives.check_matrix("residual", residual)
    m, k = residual.shape
    row_primitives.check_matrix("branch", branch, (m, k))
    row_primitives.check_held(k)
    row_primitives.check_vector("branch_weight", branch_weight, k)
    row_primitives.check_vector("weight", weight, k)
    image_rows = row_primitives.check_images("gate", gate, m, k)
    row_primitives.check_matrix("modulation", modulation, (gate.shape[0], k))
    row_primitives.check_one_device(residual, branch, branch_weight, gate, weight, modulation)
    tile = tile or row_primitives.default_tile(k)
    row_primitives.check_tree(tile)
    new = torch.empty(m, k, dtype=residual.dtype, device=residual.device)
    q = torch.empty(m, k, dtype=torch.int8, device=residual.device)
    s = torch.empty(m, dtype=torch.float32, device=residual.device)
    if m == 0:
        return new, q, s
    matrices = [row_primitives.interpreter_fp32(t) for t in (residual, branch, branch_weight, gate, weight, modulation)]
    out = row_primitives.interpreter_fp32(new)  # on a GPU, new itself
    row_primitives.launch_rows(
        _residual_norm_quantize, (m, 1), (*matrices, out, q, s), tuple(matrices[i].stride(0) for i in (0, 1, 3, 5)),
        free=(image_rows,), floats=(eps,), num_warps=tile.num_warps,
        K=k, CHUNK=tile.chunk, DTYPE=row_primitives.FLOATS[residual.dtype],
    )  # fmt: skip
    return out.to(new.dtype), q, s
