"""RMSNorm and rotary embedding of the heads of q and k, in one pass over the joined projection, in Triton.

    x = (x * rstd(x)) * weight                                           over each head's D
    y[i]         = x[i] * cos[i] - x[i + D/2] * sin[i]                   i < D/2
    y[i + D/2]   = x[i + D/2] * cos[i + D/2] + x[i] * sin[i + D/2]

    qkv [M, 3 H D], thirds q | k | v   q_weight, k_weight [D]   cos, sin [L, D]: row m uses row m % L
    -> q [M, H D], k [M, H D] of qkv's dtype; v stays in place, qkv[:, 2 H D:]

Every operation is fp32 and rounded by itself. The result is rounded once, to the dtype. The eager model rounds to bf16
after the norm, the weight, both products and the sum. It differs by up to a few units in the last place of bf16.
Bit-equal to `int8kit.reference.qk_norm_rope` under every tile.

A program computes some heads of one row, of q and of k, so cos and sin are read once for both. A head is held as two
halves [heads, D/2] in the same lanes, so the rotation moves nothing between lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from int8kit.errors import ConfigError, ShapeError
from int8kit.kernels import row_primitives
from int8kit.kernels.row_primitives import WARPS, reciprocal_root, sums_of_rows, widen

HEAD_DIMS = (16, 32, 64, 128, 256)
HEADS_MOST = 64  # of a tile


@dataclass(frozen=True)
class HeadTile:
    """Tile configuration of the kernel. Any legal value gives the same bits; only the time differs.

    Raises ConfigError for an illegal value.
    """

    heads: int  # heads per instruction of the program; 512 / D per warp are 16 bytes per thread
    tiles: int  # groups of that many heads, of q and of k, per program
    num_warps: int

    def __post_init__(self) -> None:
        if self.heads not in (1, 2, 4, 8, 16, 32, 64) or not 1 <= self.tiles <= 16 or self.num_warps not in WARPS:
            raise ConfigError(
                f"{self}: expected heads 1 to 64 and num_warps 1 to 16, both powers of two, and tiles 1 to 16"
            )

    def __str__(self) -> str:
        return f"h{self.heads} t{self.tiles} w{self.num_warps}"


def default_tile(heads: int, d: int) -> HeadTile:
    """The tile with 16 bytes per thread and four warps per row, or one warp where the heads are few.

    It was the fastest of eight on an H200 for 18 heads of 256: 0.92 of the speed of a copy. One warp with 3 tiles
    reached 0.83.
    """
    group = max(1, 512 // d)
    warps = 4 if heads >= 4 * group else 1
    count = min(HEADS_MOST, warps * group)
    return HeadTile(count, min(16, -(-heads // count)), warps)


@triton.jit
def _load_half(ptr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """A vector [HALF] as [HEADS, HALF] fp32 with equal rows, in the layout of the heads: no exchange is needed."""
    return widen(tl.load(ptr + tl.arange(0, HEADS)[:, None] * 0 + tl.arange(0, HALF)[None, :]))


@triton.jit
def _load_tiles(ptr, first, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr):
    """The heads from `first` on in the stored dtype: first halves and second halves alternate, tile by tile."""
    xs = ()
    for t in tl.static_range(TILES):
        head = first + t * HEADS + tl.arange(0, HEADS)
        ptrs = ptr + head[:, None] * D + tl.arange(0, D // 2)[None, :]
        if H % (HEADS * TILES) == 0:
            xs = xs + (tl.load(ptrs), tl.load(ptrs + D // 2))  # noqa: RUF005
        else:
            inside = (head < H)[:, None]
            xs = xs + (  # noqa: RUF005
                tl.load(ptrs, mask=inside, other=0.0), tl.load(ptrs + D // 2, mask=inside, other=0.0),
            )  # fmt: skip
    return xs


@triton.jit
def _rotate_tiles(
    out_ptr, xs, weight_ptr, first, cos_0, cos_1, sin_0, sin_1, eps,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Norm, weight, rotation and store of the heads that `_load_tiles` loaded."""
    weight_0 = _load_half(weight_ptr, HEADS, D // 2)
    weight_1 = _load_half(weight_ptr + D // 2, HEADS, D // 2)
    for t in tl.static_range(TILES):
        x_0, x_1 = widen(xs[2 * t]), widen(xs[2 * t + 1])
        total = sums_of_rows(x_0 * x_0) + sums_of_rows(x_1 * x_1)
        rstd = reciprocal_root(tl.div_rn(total, D * 1.0), eps)
        x_0 = (x_0 * rstd) * weight_0
        x_1 = (x_1 * rstd) * weight_1
        y_0 = (x_0 * cos_0 - x_1 * sin_0).to(out_ptr.dtype.element_ty)
        y_1 = (x_1 * cos_1 + x_0 * sin_1).to(out_ptr.dtype.element_ty)
        head = first + t * HEADS + tl.arange(0, HEADS)
        ptrs = out_ptr + head[:, None] * D + tl.arange(0, D // 2)[None, :]
        if H % (HEADS * TILES) == 0:
            tl.store(ptrs, y_0)
            tl.store(ptrs + D // 2, y_1)
        else:
            tl.store(ptrs, y_0, mask=(head < H)[:, None])
            tl.store(ptrs + D // 2, y_1, mask=(head < H)[:, None])


@triton.jit(do_not_specialize=["PERIOD"])
def _qk_norm_rope(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, PERIOD, stride_xm, stride_cl, stride_sl, eps,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (HEADS * TILES)
    qkv_ptr += row * stride_xm
    qs = _load_tiles(qkv_ptr, first, H, D, HEADS, TILES)
    ks = _load_tiles(qkv_ptr + H * D, first, H, D, HEADS, TILES)
    at = (tl.program_id(0) % PERIOD).to(tl.int64)
    cos_ptr += at * stride_cl
    sin_ptr += at * stride_sl
    cos_0, cos_1 = _load_half(cos_ptr, HEADS, HALF), _load_half(cos_ptr + HALF, HEADS, HALF)
    sin_0, sin_1 = _load_half(sin_ptr, HEADS, HALF), _load_half(sin_ptr + HALF, HEADS, HALF)
    q_ptr += row * (H * D)
    k_ptr += row * (H * D)
    _rotate_tiles(q_ptr, qs, q_weight_ptr, first, cos_0, cos_1, sin_0, sin_1, eps, H, D, HEADS, TILES)
    _rotate_tiles(k_ptr, ks, k_weight_ptr, first, cos_0, cos_1, sin_0, sin_1, eps, H, D, HEADS, TILES)


def _check(qkv: torch.Tensor, vectors: tuple[torch.Tensor, ...], tables: tuple[torch.Tensor, ...], heads: int) -> int:
    """D, the width of a head. Raises ShapeError for tensors that the kernel does not accept."""
    row_primitives.check_matrix("qkv", qkv)
    m, width = qkv.shape
    d = width // (3 * heads) if heads > 0 else 0
    if d not in HEAD_DIMS or 3 * heads * d != width:
        raise ShapeError(f"qkv {tuple(qkv.shape)}, {heads} heads: expected [M, 3 H D] with D one of {HEAD_DIMS}")
    for name, vector in zip(("q_weight", "k_weight"), vectors, strict=True):
        row_primitives.check_vector(name, vector, d)
    for name, table in zip(("cos", "sin"), tables, strict=True):
        row_primitives.check_matrix(name, table)
        period = table.shape[0]
        if table.shape[1] != d or period < 1 or m % period or table.shape != tables[0].shape:
            raise ShapeError(
                f"{name} {tuple(table.shape)}: expected [L, {d}] with L a divisor of M = {m}, the same for cos and sin"
            )
    row_primitives.check_one_device(qkv, *vectors, *tables)
    return d


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float = 1e-5,
    *,
    tile: HeadTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and rotation of q and k out of qkv [M, 3 H D] -> q, k [M, H D] of qkv's dtype, contiguous.

    q_weight, k_weight: [D]. cos, sin: [L, D], L a divisor of M: M itself, or one image's length for rows that repeat.
    Each tensor is bf16, fp16 or fp32 and contiguous along its last axis. D is a power of two from 16 to 256. tile:
    chosen by H and D if absent; every tile gives the same bits. Raises ShapeError for other tensors.
    """
    d = _check(qkv, (q_weight, k_weight), (cos, sin), heads)
    m = qkv.shape[0]
    q, k = (torch.empty(m, heads * d, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    tile = tile or default_tile(heads, d)
    if m == 0:
        return q, k
    tensors = [row_primitives.interpreter_fp32(t) for t in (qkv, q_weight, k_weight, cos, sin)]
    outs = [row_primitives.interpreter_fp32(t) for t in (q, k)]  # on a GPU, q and k themselves
    grid = (m, -(-heads // (tile.heads * tile.tiles)))
    row_primitives.launch_rows(
        _qk_norm_rope, grid, (*tensors, *outs), tuple(tensors[i].stride(0) for i in (0, 3, 4)),
        free=(cos.shape[0],), floats=(eps,), num_warps=tile.num_warps,
        H=heads, D=d, HEADS=tile.heads, TILES=tile.tiles,
    )  # fmt: skip
    return outs[0].to(q.dtype), outs[1].to(k.dtype)
