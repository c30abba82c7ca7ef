"""Joined products of a block: q, k and v in one GEMM, and w1 and w3 in one GEMM with SwiGLU in its epilogue.

    side_by_side([q, k, v], given, plans)   [M, 3 W], of one linear or several
    gated(gate, up, given, plans)           silu(gate(x)) * up(x), [M, F]

Linears in INT8 are joined in their own memory, see `tied_weights`. A LoRA on q, k or v adds a side path. A LoRA on w1
or w3 is inside silu, so these two then run one after the other. Every other linear runs by its own forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from int8kit import ops
from int8kit.database import store
from int8kit.layers import Int8Linear
from int8kit.lookup import Plan
from int8kit.runtime import tied_weights

Plans = Callable[[int, int], Plan] | None
"""The plan of a weight [n, k]; None: from the database of the weight's GPU."""


class Inputs:
    """The normed and modulated input of a product: int8 with scales, and in the model's dtype if asked for."""

    def __init__(self, x: torch.Tensor, norm: Any, scale: torch.Tensor, q: torch.Tensor, s: torch.Tensor) -> None:
        self.q, self.s, self.dtype = q, s, x.dtype
        self._x, self._norm, self._scale = x, norm, scale
        self._normed: torch.Tensor | None = None

    def normed(self) -> torch.Tensor:
        """[M, W] of the model's dtype, by the stock model's operations."""
        if self._normed is None:
            self._normed = scaled(self._norm(self._x), 1.0 + self._scale)
        return self._normed


def scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x [M, W] times factor [S, W], where each row of the factor serves M / S rows."""
    product: torch.Tensor = (x.unflatten(0, (len(factor), -1)) * factor[:, None]).flatten(0, 1)
    return product


def side_by_side(parts: Sequence[Any], given: Inputs, plans: Plans) -> torch.Tensor:
    """The outputs of the linears `parts` side by side, [M, sum of N]."""
    bases = [base for part in parts if (base := _int8_base(part)) is not None]
    if len(bases) < len(parts):
        return torch.cat([part(given.normed()) for part in parts], -1)
    weight = tied_weights.side_by_side(bases)
    scales = _kept(bases, "scales", lambda: torch.cat([base.weight_scale for base in bases]))
    bias = _side_by_side_bias(bases)
    joined = ops.scaled_mm(given.q, weight, given.s, scales, bias, out_dtype=given.dtype, plan=plan_of(weight, plans))
    for part, out in zip(parts, joined.chunk(len(parts), -1), strict=True):
        _add_adapters(part, given, out)
    return joined


def gated(gate: Any, up: Any, given: Inputs, plans: Plans) -> torch.Tensor:
    """silu(gate(x)) * up(x), [M, F]."""
    if not (type(gate) is type(up) is Int8Linear and (gate.bias is None) is (up.bias is None)):
        hidden: torch.Tensor = torch.nn.functional.silu(gate(given.normed())) * up(given.normed())
        return hidden
    weight = tied_weights.in_turn(gate, up)
    pair = [gate, up]
    scales = _kept(pair, "scales", lambda: torch.stack([one.weight_scale for one in pair], 1).flatten())
    bias = None if gate.bias is None else torch.stack([gate.bias, up.bias], 1).flatten()  # type: ignore[list-item]
    return ops.scaled_mm_swiglu(
        given.q, weight, given.s, scales, bias, out_dtype=given.dtype, plan=plan_of(weight, plans)
    )


def plan_of(weight: torch.Tensor, plans: Plans) -> Plan:
    """The plan of a joined weight [n, k]."""
    n, k = weight.shape
    if plans is not None:
        return plans(n, k)
    return store.found_plan(weight.device.index, n, k) if weight.is_cuda else Plan()


def is_int8(part: torch.nn.Module) -> bool:
    """Whether a linear is in INT8, alone or under adapters."""
    return isinstance(getattr(part, "base_layer", part), Int8Linear)


def _int8_base(part: Any) -> Int8Linear | None:
    """The INT8 layer of a linear, under its LoRAs; None if the linear has to run by its own forward."""
    if type(part) is Int8Linear:
        return part
    base = getattr(part, "base_layer", None)
    if type(base) is not Int8Linear or not hasattr(part, "lora_A"):
        return None
    if getattr(part, "lora_variant", None) or (part.disable_adapters and part.merged):
        return None  # such as DoRA; or peft takes a merged adapter out when the layer runs
    return base


def _add_adapters(part: Any, given: Inputs, out: torch.Tensor) -> None:
    """Add the active LoRAs of a linear to its output `out`, in place."""
    if type(part) is Int8Linear or part.disable_adapters or part.merged:
        return
    for name in part.active_adapters:
        if name in part.lora_A:
            a, b = part.lora_A[name], part.lora_B[name]
            x = part.lora_dropout[name](given.normed().to(a.weight.dtype))
            out += b(a(x)) * part.scaling[name]


def _side_by_side_bias(bases: Sequence[Int8Linear]) -> torch.Tensor | None:
    biases = [base.bias for base in bases]
    if all(bias is None for bias in biases):
        return None
    zeros = [base.weight_scale.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
    return torch.cat([bias.float() for bias in zeros])


_KEPT: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple[Any, torch.Tensor]]] = weakref.WeakKeyDictionary()


def _kept(layers: Sequence[Int8Linear], what: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor made of the layers' scales, kept until one of these is another tensor or has other values."""
    scales = [layer.weight_scale for layer in layers]
    if any(scale.is_inference() for scale in scales):  # they count no versions
        return make()
    key = tuple((id(scale), scale.data_ptr(), scale._version) for scale in scales)
    kept = _KEPT.setdefault(layers[0], {})
    if what not in kept or kept[what][0] != key:
        with torch.inference_mode(False), torch.no_grad():
            kept[what] = key, make()
    return kept[what][1]
