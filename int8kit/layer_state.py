"""The tensors that an INT8 layer holds and loads: its weight's parameter, state dicts and pickles of other versions.

`prepare` checks a layer's part of a state dict and brings it to the present form. `upgrade` does so for the state of a
pickled layer. `check_dtypes`, `check_finite` and `check_offload` look at the tensors of a layer.

A scale may be negative: the weight is weight * weight_scale, and some formats of other libraries have such scales. It
may not be a NaN or an infinity, except in a layer that was not loaded yet.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import torch

from int8kit.errors import InputError, ShapeError

_OLD_NAMES = {"wq": "weight", "sw": "weight_scale"}
_FROZEN = "an int8 weight has no gradient and stays frozen: train adapters, such as a LoRA, or the float model"
_NO_FLOATS = "the integers would lose the scales; call Int8Linear.from_linear with the float layer"


class Int8Weight(torch.nn.Parameter):
    """The parameter of an int8 weight. It never requires a gradient.

    `requires_grad_(True)` and `requires_grad = True` warn and change nothing. `Module.requires_grad_` asks each
    parameter of a model in turn, so an exception would leave the model with half of its parameters changed.
    """

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Self:
        """The parameter of int8 `data`. requires_grad: as deepcopy and accelerate pass it."""
        data = data.data if isinstance(data, Int8Weight) else data  # torch takes no subclass whose detach() is plain
        return super().__new__(cls, data, requires_grad)

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Warn of a gradient that is asked for: see the class."""
        if requires_grad:
            warnings.warn(_FROZEN, stacklevel=2)
        return self

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> Self:
        """As of torch, but floats are refused: torch would cut them off to integers."""
        if isinstance(other, torch.Tensor) and other.is_floating_point():
            raise InputError(f"{other.dtype} copied into an int8 weight: {_NO_FLOATS}")
        super().copy_(other, non_blocking)
        return self

    def fill_(self, value: Any) -> Self:
        """As of torch, but a number that is no integer is refused: torch would cut it off."""
        if isinstance(value, float) and not value.is_integer():
            raise InputError(f"{value} filled into an int8 weight: {_NO_FLOATS}")
        super().fill_(value)
        return self


def as_int8_weight(param: torch.nn.Parameter) -> Int8Weight:
    """An int8 parameter as an Int8Weight: the same object where possible, so that tied weights stay tied."""
    if isinstance(param, Int8Weight):
        return param
    if param.dtype is not torch.int8:
        raise InputError(f"weight {param.dtype}: expected torch.int8; call Int8Linear.from_linear")
    if type(param) is torch.nn.Parameter:
        param.__class__ = Int8Weight
        return param  # type: ignore[return-value]
    made = Int8Weight(param.detach())
    vars(made).update(vars(param))  # loaders mark a parameter by an attribute
    return made


def prepare(state_dict: dict[str, Any], prefix: str) -> None:
    """Bring the entries of one layer in `state_dict` to the present names and dtypes, in place.

    Raises InputError for a weight that is not int8, for scales that are not finite, and for scales that lost their
    meaning in another dtype. Warns of scales that were rounded.
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
    elif isinstance(scales, torch.Tensor):
        check_finite(scales, f"{prefix}weight_scale")


def check_finite(scales: torch.Tensor, name: str) -> None:
    """Raise InputError for a scale that is a NaN or an infinity. A tensor without values passes."""
    if type(scales) not in (torch.Tensor, torch.nn.Parameter) or scales.is_meta or bool(scales.isfinite().all()):
        return
    raise InputError(
        f"{name}: {int((~scales.isfinite()).sum())} of {scales.numel()} scales are not finite: expected finite "
        "numbers; the weight was damaged, or saved before it was loaded; quantize it again"
    )


def check_dtypes(weight: Any, scales: Any) -> None:
    """Raise ShapeError for tensors of a layer that a cast outside of the layer changed. A proxy of a tracer passes."""
    if isinstance(weight, torch.Tensor) and weight.dtype is not torch.int8:
        raise ShapeError(
            f"weight is {weight.dtype}: expected torch.int8; its data was replaced by floats, so load its state dict "
            "again, or quantize again"
        )
    if isinstance(scales, torch.Tensor) and scales.dtype is not torch.float32:
        raise ShapeError(
            f"weight_scale is {scales.dtype}: expected torch.float32; a loader or a loop over buffers cast it, so load "
            "the state dict again without a dtype, and cast by model.to(dtype)"
        )


def check_offload(hook: Any, scales: Any) -> None:
    """Raise InputError for a hook of accelerate that reads weights from a map, over scales that were not loaded.

    With a disk offload, `load_checkpoint_and_dispatch` drops the buffers of the checkpoint.
    """
    if not isinstance(scales, torch.Tensor) or scales.is_meta:
        return
    maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", (hook,))]
    if any(one is not None for one in maps) and bool(scales.isnan().all()):
        raise InputError(
            "the scales of an INT8 layer were not loaded: accelerate drops buffers that go to the disk; pass "
            "offload_buffers=True"
        )


def _as_float32(scales: torch.Tensor, weight: torch.Tensor | None, name: str) -> torch.Tensor:
    """The scales in float32. A scale may be zero only where its row of the weight is."""
    if not scales.is_floating_point():
        raise InputError(f"{name} is {scales.dtype}: expected torch.float32; load the layer's own scales")
    wide = scales.detach().float()
    if wide.is_meta:
        return wide
    wrong = ~wide.isfinite()
    if weight is not None and not weight.is_meta and weight.dim() == 2 and wide.shape == weight.shape[:1]:
        wrong |= (wide == 0) & (weight != 0).any(1).to(wide.device)
    if wrong.any():
        raise InputError(
            f"{name} is {scales.dtype}, and {int(wrong.sum())} of {wide.numel()} scales are infinite, NaN or zero: "
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
