"""LoRA layers of peft whose merge rounds once and whose unmerge restores the exact bits.

peft adds a delta to `base_layer.weight.data` and subtracts it again. In int8 the sum is impossible, or the delta is
cast to zero. In bf16 the difference is not the former weight.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from int8kit import ops
from int8kit.errors import InputError

INITS = ("gaussian", "eva", "orthogonal")  # methods to fill A and B that do not read the base weight


class ExactLoraLinear(Linear):
    """peft's LoRA on a linear: `merge` adds in float32 and rounds once, `unmerge` restores the former bits.

    The former weight waits on the CPU. Raises InputError for a weight that is offloaded and for sums that are not
    finite; the weight is unchanged then.
    """

    _former: dict[str, torch.Tensor] | None = None  # tensors of the base layer before the first merge
    _folded: dict[str, float] | None = None  # the scaling of each adapter when it was merged
    _fused_before: tuple[str, ...] = ()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters, or those named, to the base weight. `safe_merge` changes nothing: see the class."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base: Any = self.get_base_layer()
        _refuse_offloaded(base)
        former, scales = self._former or _tensors(base), {name: self.scaling[name] for name in names}
        folded = {**(self._folded or {}), **scales}
        if any(name in self.lora_variant for name in names):  # such as DoRA, which has own arithmetic
            super().merge(safe_merge=safe_merge, adapter_names=names)
        else:
            whole = all(name in self.lora_A and name not in self.lora_variant for name in folded)
            sums = self._sum(former, folded) if whole else self._sum(_tensors(base), scales)
            _write(base, sums)
            self.merged_adapters.extend(names)
        if self._former is None:
            self._former, self._fused_before = former, getattr(base, "fused_adapters", ())
        self._folded = folded
        base.fused_adapters = (*self._fused_before, *folded)

    def unmerge(self) -> None:
        """Restore the base weight of the time before the first merge, bit by bit."""
        if not self.merged or self._former is None:
            super().unmerge()  # it says that nothing is merged
            return
        base: Any = self.get_base_layer()
        _refuse_offloaded(base)
        _write(base, self._former)
        base.fused_adapters = self._fused_before
        self._former = self._folded = None
        self.merged_adapters.clear()

    def _sum(self, former: dict[str, torch.Tensor], scales: dict[str, float]) -> dict[str, torch.Tensor]:
        """New tensors of the base layer: the former weight plus the deltas, added in float32."""
        base: Any = self.get_base_layer()
        device = base.weight.device
        weight, bias = former["weight"].to(device).float(), former.get("bias")
        if "weight_scale" in former:
            weight *= former["weight_scale"].to(device)[:, None]
        new = {}
        for name, scale in scales.items():
            lora_a: Any = self.lora_A[name]
            lora_b: Any = self.lora_B[name]
            a, b = (factor.weight.detach().to(device).float() for factor in (lora_a, lora_b))
            weight = weight + (b @ a) * scale  # not in place: a float32 weight is the former one itself
            if self.lora_bias[name]:
                if bias is None:
                    raise InputError(f"adapter {name!r} has a bias and its layer has none; it cannot be merged")
                bias = bias.to(device).float() + lora_b.bias.detach().to(device).float() * scale
        if not torch.isfinite(weight).all():
            raise InputError(f"merging {', '.join(map(repr, scales))}: the sum is not finite; the adapter is damaged")
        if bias is not None:
            new["bias"] = bias
        if "weight_scale" in former:
            new["weight"], new["weight_scale"] = ops.quantize(weight)
        else:
            new["weight"] = weight
        return new


class Int8LoraLinear(ExactLoraLinear):
    """peft's LoRA on an Int8Linear. `merge` adds in float32 and quantizes once.

    Raises InputError for variants that read the base weight, such as DoRA.
    """

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        config = kwargs["config"]
        variant, init = self.resolve_lora_variant(config=config), config.init_lora_weights
        if variant is not None:
            raise InputError(
                f"adapter {adapter_name!r}: {type(variant).__name__} on an INT8 layer; expected a LoRA without variants"
            )
        if isinstance(init, str) and init not in INITS:
            raise InputError(
                f"adapter {adapter_name!r}: init_lora_weights={init!r} reads the base weight, which is int8; expected "
                f"True, False or one of {', '.join(INITS)}"
            )
        super().update_layer(adapter_name, *args, **kwargs)


class _Unmergeable:
    """An adapter beside an INT8 layer that cannot be folded into int8."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raise InputError."""
        raise InputError(f"{type(self).__name__} cannot be merged into an INT8 layer; use it unmerged, or use a LoRA")


class Int8LoKrLinear(_Unmergeable, LoKrLinear):
    """peft's LoKr on an Int8Linear."""


class Int8LoHaLinear(_Unmergeable, LoHaLinear):
    """peft's LoHa on an Int8Linear."""


KINDS: dict[type, type] = {Linear: Int8LoraLinear, LoKrLinear: Int8LoKrLinear, LoHaLinear: Int8LoHaLinear}
KINDS[ExactLoraLinear] = Int8LoraLinear


def adapt(layer: torch.nn.Module, base: torch.nn.Module, plain: type[torch.nn.Module]) -> None:
    """Give an adapter layer that takes the INT8 layer `base` a class that knows int8. Raises InputError if none does.

    plain: the class of INT8 layers with one output feature for each row of the weight.
    """
    if not isinstance(layer, BaseTunerLayer):
        return
    kind = type(layer)
    if type(base).forward is not plain.forward:
        raise InputError(
            f"an adapter on {type(base).__name__}, which joins several linears; expected an {plain.__name__}; put the "
            "linears back before you load the adapter"
        )
    if kind in KINDS:
        layer.__class__ = KINDS[kind]
    elif kind not in KINDS.values():
        raise InputError(f"an adapter of {kind.__module__} on an INT8 layer; expected a LoRA, LoKr or LoHa")


def make_exact(model: torch.nn.Module) -> None:
    """Give every LoRA layer on a floating linear of `model` the exact merge and unmerge."""
    for module in model.modules():
        if type(module) is Linear and not module.merged and isinstance(module.get_base_layer(), torch.nn.Linear):
            module.__class__ = ExactLoraLinear


def make_plain(model: torch.nn.Module) -> None:
    """Give the LoRA layers on floating linears of `model` peft's own class again."""
    for module in model.modules():
        if isinstance(module, ExactLoraLinear) and not module.merged and not hasattr(module.base_layer, "weight_scale"):
            module.__class__ = Linear  # type: ignore[assignment]


def _refuse_offloaded(base: torch.nn.Module) -> None:
    if any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers())):
        raise InputError("the weight is offloaded; call pipe.remove_all_hooks() before merging or unmerging a LoRA")


def _tensors(base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weight, its scales and the bias on the CPU."""
    found = {name: getattr(base, name, None) for name in ("weight", "weight_scale", "bias")}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def _write(base: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into the base layer. In place, since offloading keeps references to the memory."""
    for name, tensor in tensors.items():
        getattr(base, name).data.copy_(tensor)
