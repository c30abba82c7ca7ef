"""INT8 linear layers: int8 weights with one scale per output channel, activations quantized per token at each call.

    weight [N, K] int8, weight_scale [N] fp32, bias [N] or None; plan: tile configurations of the weight

>>> import torch
>>> layer = Int8Linear.from_linear(torch.nn.Linear(64, 32, bias=False))
>>> layer(torch.ones(2, 3, 64)).shape
torch.Size([2, 3, 32])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from int8kit import adapters, foreign_weights, layer_state, operand_checks, ops
from int8kit.database import store
from int8kit.errors import InputError, ShapeError
from int8kit.lookup import Plan
from int8kit.operand_checks import FLOATS
from int8kit.spec import GemmShape


class Int8Linear(torch.nn.Linear):
    """y = x W^T + b with int8 W. `int8kit.reference.linear` defines the result to the bit.

    x: [..., K] bf16, fp16 or fp32 -> [..., N] of x's dtype. Runs on CUDA and CPU. Raises ShapeError if K > 131071.
    A new layer gives NaN until `load_state_dict`: its scales are NaN, and the rest is not initialized. `from_linear`
    quantizes.

    The gradient of x is grad_y @ (weight * weight_scale[:, None]); the bias may have one, the weight has none. A cast
    such as `.half()` changes the bias alone. `torch.nn.MultiheadAttention` reads the weight of its `out_proj` without a
    call of the layer, so it refuses an INT8 layer there with InputError.
    """

    weight: torch.nn.Parameter  # [N, K] int8, without a gradient
    weight_scale: torch.Tensor  # [N] fp32
    bias: torch.nn.Parameter | None  # type: ignore[assignment]
    paired = False  # whether the rows of the weight come in pairs

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        plan: Plan | None = None,
    ) -> None:
        for name, extent in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(extent, bool) or not isinstance(extent, int):
                raise ShapeError(
                    f"{name} is of type {type(extent).__name__}: expected an int; for tensors call from_int8"
                )
        GemmShape(1, out_features, in_features)
        adapters.watch(Int8Linear)
        if self.paired and out_features % 2:
            raise ShapeError(f"out_features = {out_features}: expected an even number, a gate and an up row in turn")
        if dtype is not None and dtype not in FLOATS:
            raise ShapeError(f"dtype of the bias {dtype}: expected {' or '.join(map(str, FLOATS))}")
        torch.nn.Module.__init__(self)  # that of nn.Linear makes a float weight
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = layer_state.Int8Weight(weight)
        self.register_buffer("weight_scale", torch.full((out_features,), torch.nan, device=device, dtype=torch.float32))
        filled = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if filled is None else torch.nn.Parameter(filled, requires_grad=False)
        self.plan = plan

    @classmethod
    def from_int8(
        cls,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> Self:
        """The layer of an int8 weight [N, K] and its scales [N] fp32, as `int8kit.quantize` returns them.

        The layer keeps the tensors. A scale may be negative. Raises ShapeError if they do not fit together, and
        InputError for a scale that is not finite.
        """
        operand_checks.int8_weight(weight, weight_scale, bias)
        layer_state.check_finite(weight_scale, "weight_scale")
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0], bias is not None, plan=plan)
        layer.weight = layer_state.Int8Weight(weight.detach())
        layer.weight_scale = weight_scale.detach()
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, plan: Plan | None = None, device: torch.device | None = None
    ) -> Int8Linear:
        """Quantize `linear`'s weight, on `device` if given; `foreign_weights` lists the formats.

        Raises InputError for a weight that cannot be read or is not finite, and for a linear with an own forward.
        """
        wq, sw = foreign_weights.quantized(linear, device)
        return cls.from_int8(wq, sw, foreign_weights.bias_of(linear, wq.device), plan)

    @classmethod
    def joined(
        cls, linears: Sequence[torch.nn.Linear], plan: Plan | None = None, device: torch.device | None = None
    ) -> Int8Linear:
        """One layer in place of several with the same input, such as q, k and v: outputs side by side, in order.

        The layer has one quantization of the input and one GEMM. It is bit-equal to the separate layers, since scales
        are per output channel. Raises ShapeError if the inputs differ in width.
        """
        if not linears:
            raise ShapeError("no linears: expected at least one to join")
        if len({linear.in_features for linear in linears}) > 1:
            widths = ", ".join(str(linear.in_features) for linear in linears)
            raise ShapeError(
                f"inputs of {widths} features: expected the same width; only layers with one input can be joined"
            )
        parts = [cls.from_linear(linear, plan, device) for linear in linears]
        biases = [part.bias for part in parts]
        bias = None
        if any(b is not None for b in biases):
            filled = [
                part.weight_scale.new_zeros(part.out_features) if b is None else b
                for part, b in zip(parts, biases, strict=True)
            ]
            bias = torch.cat(filled)
        weight = torch.cat([part.weight for part in parts])
        return cls.from_int8(weight, torch.cat([part.weight_scale for part in parts]), bias, plan)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., K] -> [..., N] of its dtype."""
        layer_state.check_dtypes(self.weight, self.weight_scale)
        return ops.int8_linear(input, self.weight, self.weight_scale, self.bias, plan=_plan_of(self))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = self.weight, self.weight_scale

        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            """`fn`, but the weight and its scales keep dtype and values when a model is cast, and follow its device."""
            made = fn(tensor)
            made = made.data if isinstance(made, layer_state.Int8Weight) else made  # torch makes a Parameter of it
            if tensor is self.weight_scale and tensor.is_meta and not made.is_meta:
                made = made.fill_(torch.nan)  # of to_empty: as in a new layer
            cast = made.dtype is not tensor.dtype and any(tensor is one for one in kept)
            return tensor.to(made.device) if cast else made

        super()._apply(without_cast, recurse)  # type: ignore[no-untyped-call]
        self._keep_kind()  # torch makes a plain Parameter for another kind of device
        return self

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """As of torch, but an int8 `weight` becomes an `Int8Weight`, also one that a state dict assigns."""
        if name == "weight" and param is not None:
            param = layer_state.as_int8_weight(param)
        super().register_parameter(name, param)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_hf_hook":  # of accelerate
            layer_state.check_offload(value, self._buffers.get("weight_scale"))
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> Any:
        """Raise InputError: torch.jit.script calls it."""
        raise InputError("torch.jit.script cannot read an INT8 layer; use torch.jit.trace, torch.export or compile")

    def reset_parameters(self) -> None:
        """Raise InputError: torch would fill the weight with floats."""
        raise InputError("an INT8 layer has no initial values: load a state dict, or call Int8Linear.from_linear")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        layer_state.prepare(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._keep_kind()  # torch may exchange the parameter for a plain one

    def _keep_kind(self) -> None:
        """Make the weight an `Int8Weight`, unless a parametrization holds it."""
        if "weight" in self._parameters:
            self.register_parameter("weight", self._parameters["weight"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(layer_state.upgrade(state))  # type: ignore[no-untyped-call]
        self._keep_kind()  # a pickle holds a plain Parameter

    def extra_repr(self) -> str:
        """Text for print(model), with the entries that serve the layer."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        plan = None if self.plan is None and not self.weight.is_cuda else _plan_of(self)
        return text if plan is None else f"{text}, plan={store.described(plan, *self.weight.shape)}"


class Int8SwiGLU(Int8Linear):
    """silu(x W1^T) * (x W3^T) in one GEMM. `int8kit.reference.linear_swiglu` defines the result to the bit.

    weight [2 F, K]: row 2 j is row j of W1 (the gate), row 2 j + 1 is row j of W3 (the up). The epilogue multiplies
    each pair. x: [..., K] -> [..., F] of x's dtype, which is half of the output of two layers. out_features is 2 F.
    """

    paired = True

    @classmethod
    def from_linears(
        cls,
        gate: torch.nn.Linear,
        up: torch.nn.Linear,
        plan: Plan | None = None,
        device: torch.device | None = None,
    ) -> Int8SwiGLU:
        """Quantize both weights [F, K] and interleave their rows. Raises ShapeError if the two differ in shape."""
        if (gate.in_features, gate.out_features) != (up.in_features, up.out_features):
            raise ShapeError(
                f"gate [{gate.out_features}, {gate.in_features}] and up [{up.out_features}, {up.in_features}]: "
                "expected the same shape"
            )
        both = Int8Linear.joined((gate, up), plan, device)
        turn = torch.arange(both.out_features, device=both.weight.device).view(2, -1).t().reshape(-1)
        bias = None if both.bias is None else both.bias[turn]
        return cls.from_int8(both.weight[turn], both.weight_scale[turn], bias, plan)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., K] -> [..., F] of its dtype."""
        layer_state.check_dtypes(self.weight, self.weight_scale)
        return ops.int8_linear_swiglu(input, self.weight, self.weight_scale, self.bias, plan=_plan_of(self))


def _plan_of(layer: Int8Linear) -> Plan:
    """The plan of `layer`: its own, or the one of its GPU. On a CPU there is nothing to choose.

    The scales name the GPU, since `torch.fx.symbolic_trace` hides the device of an input and of a parameter.
    """
    if layer.plan is not None:
        return layer.plan
    scales = layer.weight_scale
    if not scales.is_cuda:
        return Plan()
    plan: Plan = _found_plan(scales.device.index, layer.out_features, layer.in_features)
    return plan


def _found_plan(device: int, n: int, k: int) -> Plan:
    return store.found_plan(device, n, k)


# A constant for torch.compile, which cannot trace the reading of a database: the mark that
# `torch.compiler.assume_constant_result` sets. That function imports torch's compiler, and Triton with it.
_found_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]
