"""Joined products of a block: q, k and v in one GEMM, and w1 and w3 in one GEMM with SwiGLU in its epilogue.

    side_by_side([q, k, v], given, plans)   [M, 3 W], of one linear or several
    gated(gate, up, given, plans)           silu(gate(x)) * up(x), [M, F]

Linears in INT8 are joined in their own memory, see `tied_weights`. A LoRA on q, k or v adds a side path. A LoRA on w1
or w3 is inside silu, so these two then run one after the other. Every other linear runs by its own forward.
"""

from __future__ import annotations

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
    if len(bases) < len(parts) or not tied_weights.are_distinct(bases):
        return torch.cat([part(given.normed()) for part in parts], -1)
    weight = tied_weights.side_by_side(bases)
    scales = tied_weights.side_by_side(bases, "weight_scale")
    bias = _side_by_side_bias(bases)
    joined = ops.scaled_mm(given.q, weight, given.s, scales, bias, out_dtype=given.dtype, plan=plan_of(weight, plans))
    for part, out in zip(parts, joined.chunk(len(parts), -1), strict=True):
        _add_adapters(part, given, out)
    return joined


def gated(gate: Any, up: Any, given: Inputs, plans: Plans) -> torch.Tensor:
    """silu(gate(x)) * up(x), [M, F]."""
    pair = [base for part in (gate, up) if (base := _int8_base(part)) is not None]
    alike = len(pair) == 2 and (pair[0].bias is None) == (pair[1].bias is None) and tied_weights.are_distinct(pair)
    if not alike or _active(gate) or _active(up):
        first, third = (side_by_side((part,), given, plans) for part in (gate, up))
        return torch.nn.functional.silu(first) * third
    weight = tied_weights.in_turn(*pair)
    scales = torch.stack([one.weight_scale for one in pair], 1).flatten()  # the kernel reads them without a stride
    biases: list[torch.Tensor] = [one.bias for one in pair if one.bias is not None]
    bias = torch.stack(biases, 1).flatten() if biases else None
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
    if getattr(part, "lora_variant", None):  # such as DoRA
        return None
    if part.disable_adapters and part.merged:
        part.unmerge()  # as peft's own forward does
    return base


def _active(part: Any) -> list[str]:
    """The LoRAs whose side path adds to the output of a linear now."""
    if type(part) is Int8Linear or part.disable_adapters or part.merged:
        return []
    return [name for name in part.active_adapters if name in part.lora_A]


def _add_adapters(part: Any, given: Inputs, out: torch.Tensor) -> None:
    """Add the active LoRAs of a linear to its output `out`, in place."""
    for name in _active(part):
        a, b = part.lora_A[name], part.lora_B[name]
        x = part.lora_dropout[name](given.normed().to(a.weight.dtype))
        if b.bias is None and b.weight.dtype == out.dtype:
            out.addmm_(a(x), b.weight.t(), alpha=part.scaling[name])  # one pass over `out` instead of four
        else:
            out += b(a(x)) * part.scaling[name]


def _side_by_side_bias(bases: Sequence[Int8Linear]) -> torch.Tensor | None:
    biases = [base.bias for base in bases]
    if all(bias is None for bias in biases):
        return None
    zeros = [base.weight_scale.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
    return torch.cat([bias.float() for bias in zeros])
