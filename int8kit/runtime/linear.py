"""An INT8 linear layer: int8 weight, one scale an output channel; activations quantized per token at the call.

wq [N, K] int8, sw [N] fp32, bias [N] or None, plan: the weight's tile configurations

>>> import torch
>>> layer = Int8Linear.from_linear(torch.nn.Linear(64, 32, bias=False))
>>> layer(torch.ones(2, 3, 64)).shape
torch.Size([2, 3, 32])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from int8kit import ops
from int8kit.spec import GemmShape, Plan


class Int8Linear(torch.nn.Module):
    """y = x W^T + b with int8 W, as `int8kit.reference.linear` defines it to the bit.

    x: [..., K] bf16, fp16 or fp32 -> [..., N] of x's dtype. Runs on CUDA and CPU. Raises ShapeError if K > 131071.
    """

    wq: torch.Tensor
    sw: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None = None, plan: Plan = Plan()):
        super().__init__()
        GemmShape(1, wq.shape[0], wq.shape[1])
        self.out_features, self.in_features = wq.shape
        self.register_buffer("wq", wq)
        self.register_buffer("sw", sw)
        self.register_buffer("bias", bias)
        self.plan = plan

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, plan: Plan = Plan(), device: torch.device | None = None
    ) -> Int8Linear:
        """Quantize `linear`'s weight, on `device` if given; a bitsandbytes 4-bit weight is dequantized first."""
        weight = _weight(linear)
        wq, sw = ops.quantize((weight if device is None else weight.to(device)).contiguous())
        bias = None if linear.bias is None else linear.bias.detach().to(wq.device)
        return cls(wq, sw, bias, plan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] of x's dtype."""
        return ops.linear(x, self.wq, self.sw, self.bias, plan=self.plan)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # Scales stay float32 when a model is cast: they are moved as integers, which no cast of floats touches.
        self.sw = self.sw.view(torch.int32)
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self.sw = self.sw.view(torch.float32)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _weight(linear: torch.nn.Linear) -> torch.Tensor:
    weight = linear.weight.detach()
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return weight
    import bitsandbytes

    full: torch.Tensor = bitsandbytes.functional.dequantize_4bit(weight, state)
    return full


def replace_linears(
    module: torch.nn.Module,
    wanted: Callable[[str], bool],
    plan: Callable[[int, int], Plan],
    device: torch.device | None = None,
) -> dict[str, Int8Linear]:
    """Put an Int8Linear in place of each nn.Linear of `module` whose dotted name is `wanted`; returns them by name.

    plan(n, k): the configurations of a weight [n, k]. One weight at a time goes to `device`, so that the memory there
    grows by the int8 weights and one bf16 weight only.
    """
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)]
    done = {}
    for name, linear in found:
        if wanted(name):
            layer = Int8Linear.from_linear(linear, plan(linear.out_features, linear.in_features), device)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, layer)
            done[name] = layer
    return done
