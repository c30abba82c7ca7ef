"""The tensors that an INT8 layer holds and loads: its weight's parameter, state dicts and pickles of other versions.

`prepare` checks a layer's part of a state dict and brings it to the present form. `upgrade` does so for the state of a
pickled layer.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import torch

from int8kit.errors import InputError

_OLD_NAMES = {"wq": "weight", "sw": "weight_scale"}
_FROZEN = "an int8 weight has no gradient and stays frozen: train adapters, such as a LoRA, or the float model"


class Int8Weight(torch.nn.Parameter):
    """The parameter of an int8 weight. It never requires a gradient.

    `requires_grad_(True)` warns and changes nothing. `Module.requires_grad_` asks each parameter of a model in turn, so
    an exception would leave the model with half of its parameters changed.
    """

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Self:
        """The parameter of int8 `data`. requires_grad: as deepcopy and accelerate pass it."""
        data = data.data if isinstance(data, Int8Weight) else data  # torch takes no subclass whose detach() is plain
        return super().__new__(cls, data, requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Warn of a gradient that is asked for: see the class."""
        if requires_grad:
            warnings.warn(_FROZEN, stacklevel=2)
        return self


def prepare(state_dict: dict[str, Any], prefix: str) -> None:
    """Bring the entries of one layer in `state_dict` to the present names and dtypes, in place.

    Raises InputError for a weight that is not int8 and for scales that lost their meaning in another dtype. Warns of
    scales that were rounded.
    """
    for old, new in _OLD_NAMES.items():
        if prefix + old in state_dict and prefix + new not in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
    weight, scales = (state_dict.get(prefix + name) for name in ("weight", "weight_scale"))
    if isinstance(weight, torch.Tensor) and weight.dtype is not torch.int8:
        raise InputError(
            f"{prefix}weight is {weight.dtype}: expected torch.int8; "
            "load it into a float layer and call Int8Linear.from_linear"
        )
    if isinstance(scales, torch.Tensor) and scales.dtype is not torch.float32:
        state_dict[prefix + "weight_scale"] = _as_float32(scales, weight, f"{prefix}weight_scale")


def _as_float32(scales: torch.Tensor, weight: torch.Tensor | None, name: str) -> torch.Tensor:
    """The scales in float32. A scale may be zero only where its row of the weight is."""
    if not scales.is_floating_point():
        raise InputError(f"{name} is {scales.dtype}: expected torch.float32; load the layer's own scales")
    wide = scales.detach().float()
    if wide.is_meta:
        return wide
    wrong = ~wide.isfinite() | (wide < 0)
    if weight is not None and not weight.is_meta and weight.dim() == 2 and wide.shape == weight.shape[:1]:
        wrong |= (wide == 0) & (weight != 0).any(1).to(wide.device)
    if wrong.any():
        raise InputError(
            f"{name} is {scales.dtype}, and {int(wrong.sum())} of {wide.numel()} scales are not finite and positive: "
            "expected torch.float32; load a state dict whose scales were not cast"
        )
    if not torch.equal(wide.to(torch.float64), scales.detach().to(torch.float64)) or scales.dtype.itemsize < 4:
        loss = max(torch.finfo(scales.dtype).eps, torch.finfo(torch.float32).eps) / 2
        warnings.warn(
            f"{name} is {scales.dtype}: each scale was rounded by up to {100 * loss:.2g} %, and each output with it; "
            "load a state dict whose scales are torch.float32",
            stacklevel=2,
        )
    return wide


def upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a pickled layer whose tensors were the buffers wq, sw and bias, with the present names."""
    if "wq" not in state["_buffers"]:
        return state
    buffers, parameters = dict(state["_buffers"]), dict(state["_parameters"])
    weight, bias = buffers.pop("wq"), buffers.pop("bias")
    parameters["weight"] = Int8Weight(weight)
    parameters["bias"] = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    buffers["weight_scale"] = buffers.pop("sw")
    plan = state["plan"] if state["plan"].candidates else None  # the default was an empty plan
    return {**state, "_buffers": buffers, "_parameters": parameters, "plan": plan}
