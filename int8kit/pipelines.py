"""INT8 in a diffusers pipeline that is in memory.

    report = optimize(pipe)     INT8 linears in each denoiser; the pipeline is called as before
    restore(pipe)               the former float linears again, if `keep_float` kept them

A denoiser is a component that runs at each step: see `DENOISERS`. Text encoders and the VAE run once per image. A
ControlNet adds to the denoiser's residuals, where errors are not averaged over steps; both stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from int8kit import gpus, saved_models
from int8kit.errors import InputError
from int8kit.integrations import lora
from int8kit.layers import Int8Linear
from int8kit.quantization import Chooser, Policy, quantize_
from int8kit.runtime import fuse

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")
"""Names of the components that `optimize` quantizes."""

Choice = Policy | Chooser | Sequence[str] | None


@dataclass(frozen=True)
class ComponentReport:
    """One denoiser: its INT8 layers by name, the linears that stay float with the reason, and whether it is fused."""

    replaced: dict[str, Int8Linear]
    left: dict[str, str]
    fused: bool


@dataclass(frozen=True)
class OptimizeReport:
    """The denoisers of a pipeline after `optimize`. Its text lists the linears of each."""

    components: dict[str, ComponentReport]

    def __str__(self) -> str:
        lines = []
        for name, part in self.components.items():
            fused = ", fused" if part.fused else ""
            lines.append(f"{name}: {len(part.replaced)} linears in INT8, {len(part.left)} in float{fused}")
            lines += [
                f"  {layer}: INT8, {one.in_features} -> {one.out_features}" for layer, one in part.replaced.items()
            ]
            lines += [f"  {layer}: float, {reason}" for layer, reason in part.left.items()]
        return "\n".join(lines)


class _Place(NamedTuple):
    """A child of a module."""

    parent: torch.nn.Module
    leaf: str
    linear: torch.nn.Module


@dataclass
class _Record:
    """Replaced layers of a denoiser: INT8 layer -> former linear, or None if it was not kept."""

    replaced: dict[str, Int8Linear] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    former: dict[Int8Linear, torch.nn.Module | None] = field(default_factory=dict)
    config: Any = None  # the former quantization_config of the model, for `restore`


_RECORDS: weakref.WeakKeyDictionary[torch.nn.Module, _Record] = weakref.WeakKeyDictionary()


def optimize(
    pipe: Any, policy: Choice = None, gpu: str | None = None, *, keep_float: Literal["cpu", False] = False
) -> OptimizeReport:
    """Replace the linears of each denoiser of a diffusers pipeline with INT8 linears, and return a report.

    policy: chooses the linears, as in `int8kit.quantize_`. gpu: alias of the GPU
    whose tuning database serves. keep_float="cpu" keeps the float linears on the CPU for `restore`.

    All or nothing: an error leaves the pipeline as it was. A second call changes nothing. LoRAs are loaded before or
    after, by the pipeline's own methods. Raises InputError for a pipeline without a denoiser, for weights that are
    offloaded by layer or by group, and for a GPU that int8kit does not support.
    """
    if keep_float not in ("cpu", False):
        raise InputError(f"keep_float={keep_float!r}: expected 'cpu' or False")
    gpus.present()  # refuses a GPU that is not supported
    parts = _denoisers(pipe)
    for name, model in parts.items():
        _check(name, model)
    held: list[_Place] = []
    notes: dict[str, Any] = {}
    new: dict[str, _Record] = {}
    fused: list[torch.nn.Module] = []
    try:
        for name, model in parts.items():
            before = _linears(model)
            held += before
            notes[name] = saved_models.note_of(model)
            replaced, left = _quantize(model, policy, gpu)
            gone = _replaced(before)
            former: dict[Int8Linear, torch.nn.Module | None] = {getattr(p.parent, p.leaf): p.linear for p in gone}
            new[name] = _Record(replaced, left, former, notes[name])
            _park(gone, model)
            if not fuse.fused(model) and fuse.fuse(model, gpu):
                fused.append(model)
        lora.prepare(pipe)
    except BaseException:
        for model in fused:
            fuse.undo(model)
        _put_back(_replaced(held))
        for name, note in notes.items():
            saved_models.set_note(parts[name], note)
        raise
    return _recorded(parts, new, keep_float)


def restore(pipe: Any) -> None:
    """Undo `optimize`: put the former float linears back, with their exact weights. LoRAs that are loaded stay.

    Raises InputError, with the pipeline unchanged, if the float linears were not kept or a LoRA is fused.
    """
    parts = {name: model for name, model in _denoisers(pipe).items() if model in _RECORDS}
    if not parts:
        raise InputError("the pipeline has no denoiser that int8kit.optimize quantized; nothing to restore")
    for name, model in parts.items():
        _check(name, model)
        for layer, former in _RECORDS[model].former.items():
            if former is None:
                raise InputError(
                    f"{name}: the float weights were not kept; load the pipeline again, and call "
                    "optimize(pipe, keep_float='cpu') to be able to restore it"
                )
            if names := getattr(layer, "fused_adapters", ()):
                raise InputError(f"{name}: the LoRA {', '.join(names)} is fused; call pipe.unfuse_lora() first")
    for model in parts.values():
        fuse.undo(model)
        record = _RECORDS.pop(model)
        kept = record.former
        _put_back(
            [
                _Place(place.parent, place.leaf, linear)
                for place in _linears(model)
                if isinstance(place.linear, Int8Linear) and (linear := kept.get(place.linear)) is not None
            ]
        )
        if record.replaced:
            saved_models.set_note(model, record.config)
        if lora.has_adapters(model):
            lora.make_plain(model)
    if not any(model in _RECORDS for model in _denoisers(pipe).values()):
        lora.release(pipe)


def _quantize(model: torch.nn.Module, policy: Choice, gpu: str | None) -> tuple[dict[str, Int8Linear], dict[str, str]]:
    """INT8 layers in place of linears of `model` -> the new layers, and the reason of each linear that stays float."""
    report = quantize_(model, policy, gpu=gpu)
    left = {name: why for name, why in report.left.items() if not isinstance(model.get_submodule(name), Int8Linear)}
    return report.replaced, left


def _recorded(
    parts: dict[str, torch.nn.Module], new: dict[str, _Record], keep_float: Literal["cpu", False]
) -> OptimizeReport:
    """Remember the replaced layers of this call and of earlier ones -> the report."""
    found = {}
    for name, model in parts.items():
        record = _RECORDS.setdefault(model, _Record())
        if not record.replaced:
            record.config = new[name].config
        record.replaced.update(new[name].replaced)
        record.left = new[name].left
        record.former.update({layer: one if keep_float else None for layer, one in new[name].former.items()})
        found[name] = ComponentReport(dict(record.replaced), dict(record.left), fuse.fused(model))
    return OptimizeReport(found)


def _denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The denoisers by name; a model under two names is there once. Raises InputError if there are none."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise InputError(f"{type(pipe).__name__}: expected a diffusers pipeline; int8kit.quantize_ takes any module")
    found: dict[str, torch.nn.Module] = {}
    for name in DENOISERS:
        model = components.get(name)
        if isinstance(model, torch.nn.Module) and not any(model is other for other in found.values()):
            found[name] = model
    if not found:
        raise InputError(
            f"{type(pipe).__name__} has the components {', '.join(sorted(components))}; expected one of "
            f"{', '.join(DENOISERS)}"
        )
    return found


def _check(name: str, model: torch.nn.Module) -> None:
    """Raise InputError for a denoiser whose linears cannot be exchanged now."""
    for child in model.modules():
        if child is not model and hasattr(child, "_hf_hook"):
            raise InputError(
                f"{name}: accelerate holds its weights layer by layer, for sequential offload or a device map; call "
                "pipe.remove_all_hooks() first, and enable the offload again afterwards"
            )
        hooks = getattr(getattr(child, "_diffusers_hook", None), "hooks", {})
        if any("group_offloading" in hook or "layerwise_casting" in hook for hook in hooks):
            raise InputError(
                f"{name}: group offloading or layerwise casting holds its weights; call optimize before you enable it"
            )
        if getattr(child, "merged_adapters", ()):
            raise InputError(f"{name}: a LoRA is fused; call pipe.unfuse_lora() first, and fuse it again afterwards")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{name}: weights are on the meta device; load them first")


def _linears(model: torch.nn.Module) -> list[_Place]:
    """Each place of a linear in `model`. A linear that is shared has several."""
    return [
        _Place(parent, leaf, child)
        for parent in model.modules()
        for leaf, child in parent._modules.items()
        if isinstance(child, torch.nn.Linear)
    ]


def _replaced(places: list[_Place]) -> list[_Place]:
    """The places where another layer is now."""
    return [place for place in places if getattr(place.parent, place.leaf) is not place.linear]


def _park(places: list[_Place], model: torch.nn.Module) -> None:
    """Move linears that were replaced to the CPU, so that a GPU holds one denoiser in float at most."""
    live = {id(parameter) for parameter in model.parameters()}
    for place in places:
        if not any(id(parameter) in live for parameter in place.linear.parameters()):
            place.linear.to("cpu")


def _put_back(places: list[_Place]) -> None:
    """Put linears into their places, on the device of the layer that is there."""
    for parent, leaf, linear in places:
        device: torch.device = getattr(parent, leaf).weight.device
        linear.to(device)
        setattr(parent, leaf, linear)
