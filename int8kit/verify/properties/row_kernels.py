"""Properties of the row kernels: each gives the bits of its reference.

    quantize                x [M, K]                                                       -> q, s
    rms_norm_quantize       x [M, K], weight [K], modulation [B, K]                        -> q, s
    residual_norm_quantize  residual, branch [M, K], two weights, gate, modulation [B, K]  -> new, q, s
    swiglu_quantize         gu [M, 2 K]                                                    -> q, s
    qk_norm_rope            qkv [M, 3 H K], two weights [K], cos, sin [L, K]               -> q, k

An example of a fused kernel has B images of L rows, M = B L; K is the width of a head in the last kernel. Matrices are
rows of wider buffers of NaN. The fused kernels allocate their outputs, so no sentinels show a store outside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from int8kit import reference
from int8kit.kernels import quantize
from int8kit.kernels.qk_norm_rope import HEAD_DIMS, HeadTile, qk_norm_rope
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize
from int8kit.kernels.row_primitives import CHUNKS, RowTile
from int8kit.kernels.swiglu_quantize import swiglu_quantize
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples.guarded_buffers import GuardedOutput, chunk_guard, in_poison
from int8kit.verify.examples.strategies import FLOAT_KINDS, OUT_DTYPES, Rows, float_matrix, sizes
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation

KERNELS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "rms_norm_quantize": rms_norm_quantize,
    "residual_norm_quantize": residual_norm_quantize,
    "swiglu_quantize": swiglu_quantize,
    "qk_norm_rope": qk_norm_rope,
}
_OUTPUTS = {"residual_norm_quantize": ("new", "q", "s"), "qk_norm_rope": ("q", "k")}
_WIDTHS = {"swiglu_quantize": 12288, "qk_norm_rope": 256}  # of Ideogram 4; else 4608
_ROW_TILES = (None, *(RowTile(chunk, chunk // 256) for chunk in CHUNKS[:4]))
_HEAD_TILES = (None, HeadTile(1, 1, 1), HeadTile(2, 3, 1), HeadTile(4, 2, 2), HeadTile(16, 1, 4))
_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("weight",), ("modulation",), ("weight", "modulation"))


@dataclass(frozen=True)
class Fused:
    """One example of a fused row kernel."""

    kernel: str
    images: int
    rows: int  # of each image
    k: int
    kind: str  # one of `strategies.FLOAT_KINDS`
    seed: int
    dtype: torch.dtype  # of the matrices
    vectors: torch.dtype  # of weights, gates, modulations, cos and sin
    padding: int = 0
    heads: int = 1
    left_out: tuple[str, ...] = ()  # optional operands of `rms_norm_quantize` that are None
    eps: float = 1e-5
    tile: RowTile | HeadTile | None = None

    def __str__(self) -> str:
        heads = f" of {self.heads} heads" if self.kernel == "qk_norm_rope" else ""
        without = "".join(f", no {name}" for name in self.left_out)
        return (
            f"{self.images} x {self.rows} rows of K = {self.k}{heads}, {_short(self.dtype)}, {self.kind} data of seed "
            f"{self.seed}, {_short(self.vectors)} vectors{without}, padding {self.padding}, eps {self.eps}, "
            f"tile {self.tile or 'by default'}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def examples(kernel: str) -> st.SearchStrategy[Fused]:
    """Strategy for examples of `kernel`, a name of KERNELS."""
    heads = kernel == "qk_norm_rope"
    return st.builds(
        Fused,
        kernel=st.just(kernel),
        images=st.integers(1, 3),
        rows=st.integers(1, 4),
        k=st.sampled_from(HEAD_DIMS) if heads else sizes(128, 3000),
        kind=st.sampled_from(FLOAT_KINDS),
        seed=st.integers(0, 7),
        dtype=st.sampled_from(OUT_DTYPES),
        vectors=st.sampled_from(OUT_DTYPES),
        padding=st.sampled_from((0, 3)),
        heads=st.integers(1, 7) if heads else st.just(1),
        left_out=st.sampled_from(_LEFT_OUT) if kernel == "rms_norm_quantize" else st.just(()),
        eps=st.sampled_from((1e-5, 1e-6)),
        tile=st.sampled_from(_HEAD_TILES if heads else _ROW_TILES),
    )


def always(kernel: str) -> tuple[Fused, ...]:
    """Examples of `kernel` that every run tries: the model's width, and each kind in each dtype."""
    k, heads = (64, 3) if kernel == "qk_norm_rope" else (300, 1)
    every = (Fused(kernel, 2, 2, k, kind, 1, dtype, dtype, 3, heads) for kind in FLOAT_KINDS for dtype in OUT_DTYPES)
    bf16 = torch.bfloat16
    return (Fused(kernel, 1, 2, _WIDTHS.get(kernel, 4608), "normal", 0, bf16, bf16, heads=6 * heads), *every)


def operands(f: Fused, device: str) -> tuple[Any, ...]:
    """The arguments of the kernel and of its reference for `f`."""

    def matrix(width: int, salt: int = 0, kind: str = f.kind) -> torch.Tensor:
        plain = float_matrix(f.images * f.rows, width, kind, f.seed + salt, f.dtype, device)
        return in_poison(plain, f.padding, chunk_guard(width))

    def vectors(count: int, around: float = 0.0) -> torch.Tensor:
        return (torch.randn(count, f.k, generator=g) * 0.5 + around).to(f.vectors).to(device)

    g = torch.Generator().manual_seed(f.seed)
    if f.kernel == "swiglu_quantize":
        return (matrix(2 * f.k),)
    weights = vectors(2, 1.0)
    if f.kernel == "qk_norm_rope":
        angles = torch.rand(f.rows, f.k, generator=g) * 100
        cos, sin = (t.to(f.vectors).to(device) for t in (angles.cos(), angles.sin()))
        return matrix(3 * f.heads * f.k), weights[0], weights[1], cos, sin, f.heads, f.eps
    modulation = vectors(f.images)
    if f.kernel == "rms_norm_quantize":
        given = {"weight": weights[0], "modulation": modulation} | dict.fromkeys(f.left_out)
        return matrix(f.k), given["weight"], given["modulation"], f.eps
    residual = matrix(f.k, 1, f.kind if f.seed % 2 else "normal")
    return residual, matrix(f.k), weights[0], vectors(f.images).tanh(), weights[1], modulation, f.eps


def check(f: Fused, on: Executor | Implementation) -> str | None:
    """How an output of the fused kernel differs from the reference's output, or None."""
    args = operands(f, on.device)
    got = KERNELS[f.kernel](*args, tile=f.tile)
    want = getattr(reference, f.kernel)(*args)
    for name, mine, theirs in zip(_OUTPUTS.get(f.kernel, ("q", "s")), got, want, strict=True):
        if mine.dtype is not theirs.dtype:
            return f"{name}: {mine.dtype}, expected {theirs.dtype}"
        if why := bitwise_diff(mine, theirs):
            return f"{name}: {why}"
    return None


def check_quantize(r: Rows, on: Executor | Implementation) -> str | None:
    """How q or s of `quantize` differs from the reference, or None."""
    guard = chunk_guard(r.k)
    x = in_poison(float_matrix(r.m, r.k, r.kind, r.seed, r.dtype, on.device), r.padding, guard)
    values = GuardedOutput(r.m, r.k, 2 * r.padding, guard, torch.int8, on.device)  # another stride than that of x
    column = GuardedOutput(1, r.m, 0, 1, torch.float32, on.device)
    q, s = quantize.quantize(x, out=(values.view, column.view[0]))
    want_q, want_s = reference.quantize(x)
    why_s = bitwise_diff(s, want_s) or column.written_outside()
    why_q = bitwise_diff(q, want_q) or values.written_outside()
    return (why_s and f"scales: {why_s}") or (why_q and f"values: {why_q}")
