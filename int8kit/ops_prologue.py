"""torch operators over the kernels that do a linear's surroundings in one pass: the door to them, as `ops` is.

    int8kit::rms_norm_quantize(x [M, K], weight [K]?, modulation [B, K]?, eps) -> (q [M, K] int8, s [M] fp32)
    int8kit::residual_norm_quantize(residual [M, K], branch [M, K], branch_weight [K], gate [B, K], weight [K],
                                    modulation [B, K], eps) -> (new [M, K], q [M, K] int8, s [M] fp32)
    int8kit::swiglu_quantize(gu [M, 2 F]) -> (q [M, F] int8, s [M] fp32)
    int8kit::qk_norm_rope(qkv [M, 3 H D], q_weight [D], k_weight [D], cos [L, D], sin [L, D], heads, eps)
                                    -> (q [M, H D], k [M, H D])

On CUDA they run the Triton kernel of the same name with its default tile, on the CPU the function of the same name in
`int8kit.reference`; both give the same bits. Importing this module registers them, once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from int8kit import reference

_LIBRARY = torch.library.Library("int8kit", "FRAGMENT")


def _quantized(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty q and s for the rows of x."""
    return x.new_empty((x.shape[0], width), dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _rms_norm_fake(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return _quantized(x, x.shape[1])


def _residual_norm_fake(residual: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return residual.new_empty(residual.shape), *_quantized(residual, residual.shape[1])


def _swiglu_fake(gu: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _quantized(gu, gu.shape[1] // 2)


def _qk_norm_rope_fake(qkv: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    shape = (qkv.shape[0], qkv.shape[1] // 3)
    return qkv.new_empty(shape), qkv.new_empty(shape)


_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "rms_norm_quantize": (
        "(Tensor x, Tensor? weight, Tensor? modulation, float eps) -> (Tensor, Tensor)",
        _rms_norm_fake,
    ),
    "residual_norm_quantize": (
        "(Tensor residual, Tensor branch, Tensor branch_weight, Tensor gate, Tensor weight, Tensor modulation, "
        "float eps) -> (Tensor, Tensor, Tensor)",
        _residual_norm_fake,
    ),
    "swiglu_quantize": ("(Tensor gu) -> (Tensor, Tensor)", _swiglu_fake),
    "qk_norm_rope": (
        "(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, float eps)"
        " -> (Tensor, Tensor)",
        _qk_norm_rope_fake,
    ),
}


def _register(name: str, schema: str, fake: Callable[..., Any]) -> None:
    def cuda(*args: Any) -> Any:  # triton is imported when a kernel first runs
        return getattr(import_module(f"int8kit.kernels.{name}"), name)(*args)

    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, cuda, "CUDA")
    _LIBRARY.impl(name, getattr(reference, name), "CPU")
    torch.library.register_fake(f"int8kit::{name}", fake, lib=_LIBRARY)


for _name, _operator in _OPERATORS.items():
    _register(_name, *_operator)


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None = None, modulation: torch.Tensor | None = None, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, weight and modulation, then int8: see `reference.rms_norm_quantize`; ShapeError outside its domain."""
    q, s = torch.ops.int8kit.rms_norm_quantize(x, weight, modulation, eps)
    return q, s


def residual_norm_quantize(
    residual: torch.Tensor,
    branch: torch.Tensor,
    branch_weight: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    modulation: torch.Tensor,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The residual stream's new value and the next input in int8: see `reference.residual_norm_quantize`."""
    new, q, s = torch.ops.int8kit.residual_norm_quantize(residual, branch, branch_weight, gate, weight, modulation, eps)
    return new, q, s


def swiglu_quantize(gu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of interleaved columns, then int8: see `reference.swiglu_quantize`."""
    q, s = torch.ops.int8kit.swiglu_quantize(gu)
    return q, s


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k out of the joined projection, normed and rotated: see `reference.qk_norm_rope`."""
    q, k = torch.ops.int8kit.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)
    return q, k
