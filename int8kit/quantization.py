"""Quantize the linears of any module in place: which ones, and the exchange of all of them or none.

    report = quantize_(module)                           the default `Policy`
    report = quantize_(module, Policy(skip=["head"]))    other choices
    replace_linears(module, wanted, plan, device)        every linear whose name is `wanted`

`Policy` judges whether INT8 is worth it. Whether a linear can be replaced at all is judged here and in
`foreign_weights.why_left`. No policy overrules that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from int8kit import adapters, foreign_weights, models, saved_models
from int8kit.database.store import load_plans
from int8kit.errors import InputError, Int8kitError, ShapeError
from int8kit.foreign_weights import is_of
from int8kit.layers import Int8Linear
from int8kit.lookup import Plan

_FEW_ROWS = re.compile(r"emb|time|guidance|modul|ada_?ln|norm|(^|_)mod(_|$)", re.IGNORECASE)
"""Parts of names of linears that see one row per prompt: embedders, and the modulation of norms."""
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|down|up|embedding_[AB])(\.|$)")
_FAMILIES = {"Ideogram4Transformer2DModel": "ideogram4"}
"""Classes of diffusers with an own rule in `models`."""
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """The linears that run in INT8. The first rule that applies decides:

        1. a name that matches `force` is quantized, one that matches `skip` is left
        2. a model that `int8kit.models` knows has its own rule
        3. K or N below `smallest`: quantizing the input takes longer than INT8 saves
        4. K or N that is no multiple of `multiple`: no fast kernel
        5. a name with a part such as time_embed, norm1, adaLN, img_mod: embedders and modulation see one row a prompt
        6. outside the repeated blocks, if the model has any: the first and last projections decide the quality

    A pattern is a dotted name, or a glob such as "blocks.*.attn.to_q". It also matches all linears below the module
    that it names. Its use raises InputError if it matches no linear. A shared linear is judged by its first name.
    """

    skip: Sequence[str] = ()
    force: Sequence[str] = ()
    smallest: int = 256
    multiple: int = 16
    few_rows: re.Pattern[str] | None = _FEW_ROWS  # rule 5; None: no such rule
    inner_only: bool = True  # rule 6


Chooser = Callable[[str, torch.nn.Linear], bool | str | None]
"""(name, linear) -> True: quantize; False or a reason: leave; None: as the default policy decides."""


@dataclass(frozen=True)
class QuantizationReport:
    """The result of `quantize_`, a line for each linear when printed."""

    replaced: dict[str, Int8Linear]  # by dotted name; a shared layer has each of its names
    left: dict[str, str]  # dotted name -> reason

    def __str__(self) -> str:
        """The number of replaced linears; then their names and shapes, and the others with their reasons."""
        total = len(self.replaced) + len(self.left)
        lines = [f"{len(self.replaced)} of {total} linears run in INT8"]
        width = max(map(len, (*self.replaced, *self.left)), default=0)
        for name, layer in self.replaced.items():
            lines.append(f"  int8  {name:{width}}  [{layer.out_features}, {layer.in_features}]")
        lines += [f"  left  {name:{width}}  {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


@dataclass
class _Found:
    """A linear, all places that hold it, and the reason why it stays."""

    linear: torch.nn.Linear
    names: list[str]
    places: list[tuple[torch.nn.Module, str]]
    reason: str
    tied: list[_Found] = field(default_factory=list)  # others with the same Parameter


def quantize_(
    module: torch.nn.Module,
    policy: Policy | Chooser | Sequence[str] | None = None,
    *,
    device: torch.device | str | None = None,
    gpu: str | None = None,
) -> QuantizationReport:
    """Replace the linears of `module` that gain from INT8 with Int8Linear layers: all that are chosen, or none.

    policy: a `Policy`; a function, see `Chooser`; or patterns of the names to quantize. device: quantizes there, one
    weight at a time. gpu: alias of the GPU whose database serves, such as "rtx3090"; default: the GPU that runs the
    layer. Shared linears and tied weights stay shared. Hooks are kept. Until the exchange, old and new weights exist.

    Raises InputError for a module that is a linear itself, a weight on meta, and a weight that cannot be read or is not
    finite; UnknownName for another alias. After an error the module is as before.
    """
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"a {type(module).__name__}: expected a torch.nn.Module, such as pipe.transformer")
    if isinstance(module, torch.nn.Linear):
        raise InputError("the module is itself a linear: expected one that holds linears; use Int8Linear.from_linear")
    if not isinstance(gpu, str | None):
        raise InputError(f"gpu = {gpu!r}: expected the alias of a GPU, such as 'rtx3090'; device takes a number")
    device = None if device is None else foreign_weights.usable(device)
    plan = None if gpu is None else load_plans(gpu)
    found = _find(module)
    reason = _reasons(module, found, policy)
    for one in found:
        one.reason = one.reason or reason(one.names[0], one.linear)
    _leave_half_tied(found)
    left = {name: one.reason for one in found if one.reason for name in one.names}
    replaced = _exchange([one for one in found if not one.reason], plan, device)
    saved_models.mark(module, set(replaced.values()))
    return QuantizationReport(replaced, left)


def chosen(module: torch.nn.Module, policy: Policy | None = None) -> list[str]:
    """Names of the linears that `quantize_` would replace, of a module whose weights may be on meta."""
    found = _find(module)
    reason = _reasons(module, found, policy)
    return [name for one in found if not (one.reason or reason(one.names[0], one.linear)) for name in one.names]


def replace_linears(
    module: torch.nn.Module,
    wanted: Callable[[str], bool],
    plan: Callable[[int, int], Plan] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Int8Linear]:
    """Replace each linear of `module` whose dotted name is `wanted` with an Int8Linear -> the new layers by name.

    plan(n, k): the configurations of a weight [n, k]; default: from the database of the GPU that runs the layer. See
    `quantize_` for the rest and for errors; a module that is itself a linear holds none. A linear that cannot be
    replaced stays: an adapter of a LoRA, a subclass with an own forward, a part of MultiheadAttention.
    """
    found = _find(module)
    for one in found:
        one.reason = one.reason or ("" if wanted(one.names[0]) else "not wanted")
    _leave_half_tied(found)
    replaced = _exchange([one for one in found if not one.reason], plan, device)
    saved_models.mark(module, set(replaced.values()))
    return replaced


def _find(root: torch.nn.Module) -> list[_Found]:
    """The linears below `root` in order of their names, each once, with the reasons that no policy overrules."""
    by_linear: dict[torch.nn.Module, _Found] = {}
    owners: dict[int, list[torch.nn.Module]] = {}
    denied: dict[torch.nn.Module, str] = {}
    for prefix, parent in root.named_modules():
        denied.update(_denied(parent))
        for parameter in parent._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(parent)
        for leaf, child in parent._modules.items():
            if isinstance(child, torch.nn.Linear):
                one = by_linear.setdefault(child, _Found(child, [], [], ""))
                one.names.append(f"{prefix}.{leaf}" if prefix else leaf)
                one.places.append((parent, leaf))
    names = {child: name for name, child in root.named_modules()}
    found = [by_linear[child] for child in names if child in by_linear and child is not root]
    for one in found:
        one.names.sort(key=lambda name: name != names[one.linear])  # the name that torch gives it comes first
        weight = one.linear._parameters.get("weight")
        others = [] if weight is None else [other for other in owners[id(weight)] if other is not one.linear]
        one.tied = [by_linear[other] for other in others if other in by_linear]
        if isinstance(one.linear, Int8Linear):
            one.reason = "it is INT8 already"
        elif one.linear in denied:
            one.reason = denied[one.linear]
        elif any(map(_ADAPTER.search, one.names)):
            one.reason = "a matrix of an adapter"
        else:
            one.reason = foreign_weights.why_left(one.linear)
        if not one.reason and len(one.tied) < len(others):
            [other, *_] = [other for other in others if other not in by_linear]
            one.reason = f"its weight is also the weight of {names[other]!r}"
    return found


def _denied(owner: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Linears below `owner` that it does not merely call, and the reasons."""
    if is_of(owner, "peft", "BaseTunerLayer"):
        for leaf, child in owner._modules.items():
            if child is not None and leaf != "base_layer":
                yield from ((below, "a matrix of an adapter of peft") for below in child.modules())
            elif child is not None and (reason := _why_adapter_needs_floats(owner)):
                yield child, reason
    elif is_of(owner, "peft", "AuxiliaryTrainingWrapper"):
        yield from ((below, "peft keeps a trained copy of it") for below in owner.modules())
    elif isinstance(owner, torch.nn.TransformerEncoderLayer):
        yield from ((below, "TransformerEncoderLayer reads the weight itself") for below in owner.children())


def _why_adapter_needs_floats(tuner: Any) -> str:
    """The reason why an adapter of peft loses its effect on an INT8 base layer, or ""."""
    kind = type(tuner)
    if kind.__name__ != "Linear" or not kind.__module__.startswith("peft.tuners.lora."):
        return f"the adapter {kind.__module__.split('.')[2]}.{kind.__name__} may read its weight: merge it first"
    if tuner.merged:
        return "an adapter is merged into its weight: unmerge it first, or unload peft"
    if tuner.lora_variant:
        return "the adapter reads its weight, as DoRA does: merge it first with merge_and_unload()"
    return ""


def _leave_half_tied(found: list[_Found]) -> None:
    """Leave a linear if another one with the same Parameter stays: a second copy of the weight would save nothing."""
    for one in found:
        for other in one.tied:
            if one.reason and not other.reason:
                other.reason = f"its weight is also the weight of {one.names[0]!r}"


def _reasons(
    root: torch.nn.Module, found: list[_Found], policy: Policy | Chooser | Sequence[str] | None
) -> Callable[[str, torch.nn.Linear], str]:
    """The function (name, linear) -> reason to leave it, or ""."""
    rules = policy if isinstance(policy, Policy) else Policy()
    default = _default_reasons(root, rules)
    names = [name for one in found for name in one.names]
    if policy is None or isinstance(policy, Policy):
        _check_patterns((*rules.skip, *rules.force), names)
        return default
    if not callable(policy):
        patterns = (policy,) if isinstance(policy, str) else tuple(policy) if isinstance(policy, Sequence) else ()
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise InputError(f"policy = {policy!r}: expected a Policy, a function of name and linear, or patterns")
        _check_patterns(patterns, names)
        return lambda name, linear: "" if _matches(name, patterns) else "no pattern of the policy matches"

    def reason(name: str, linear: torch.nn.Linear) -> str:
        answer = policy(name, linear)
        if answer is None:
            return default(name, linear)
        return answer if isinstance(answer, str) else "" if answer else "the policy leaves it"

    return reason


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, (pattern,)) for name in names):
            raise InputError(f"the pattern {pattern!r} matches no linear; expected a name or a glob, as {names[:1]}")


def _default_reasons(root: torch.nn.Module, policy: Policy) -> Callable[[str, torch.nn.Linear], str]:
    """The rules of `Policy` for the linears below `root`."""
    blocks, families, has_blocks = [], [], False
    for name, child in root.named_modules():
        below = f"{name}." if name else ""
        if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential):
            of_a_kind = _blocks_of_a_kind(child)
            has_blocks |= of_a_kind > 1
            if of_a_kind > 1 or (of_a_kind and isinstance(child, torch.nn.ModuleList)):  # a level with one block
                blocks.append(below)
        if type(child).__name__ in _FAMILIES:
            families.append((below, models.MODELS[_FAMILIES[type(child).__name__]]))

    def reason(name: str, linear: torch.nn.Linear) -> str:
        if _matches(name, policy.force):
            return ""
        if _matches(name, policy.skip):
            return "the policy skips it"
        for below, model in families:
            if name.startswith(below):
                return "" if model.quantizes(name.removeprefix(below)) else f"the policy of {model.name} leaves it"
        n, k = linear.out_features, linear.in_features
        if min(n, k) < policy.smallest:
            return f"[{n}, {k}] is small: below {policy.smallest}"
        if n % policy.multiple or k % policy.multiple:
            return f"[{n}, {k}]: no fast kernel, since one is no multiple of {policy.multiple}"
        part = next((p for p in name.split(".") if policy.few_rows is not None and policy.few_rows.search(p)), None)
        if part is not None:
            return f"few rows: {part!r} names an embedder or a modulation"
        if policy.inner_only and has_blocks and not any(map(name.startswith, blocks)):
            return "outside the repeated blocks: a first or last projection"
        return ""

    return reason


def _blocks_of_a_kind(container: torch.nn.Module) -> int:
    """The largest number of children that are of one class and have linears inside."""
    kinds = Counter(
        type(child)
        for child in container.children()
        if not isinstance(child, torch.nn.Linear) and any(isinstance(m, torch.nn.Linear) for m in child.modules())
    )
    return max(kinds.values(), default=0)


def _exchange(
    found: list[_Found], plan: Callable[[int, int], Plan] | None, device: torch.device | str | None
) -> dict[str, Int8Linear]:
    """Build all layers, then put them in place -> the layers by name. `found` is empty afterwards."""
    on_meta = [one.names[0] for one in found if one.linear.weight.is_meta]
    if on_meta:
        more = f" and {len(on_meta) - 3} more" if len(on_meta) > 3 else ""
        raise InputError(
            f"the weights of {', '.join(map(repr, on_meta[:3]))}{more} are on the device meta; load them first, and "
            "quantize before offloading"
        )
    waits = _waiting_place(found) if device is None else None
    layers: list[Int8Linear] = []
    shared: dict[int, Int8Linear] = {}
    for one in found:
        weight = id(one.linear.weight)
        layer = _layer_of(one, shared.get(weight), plan, device)
        shared.setdefault(weight, layer)
        _carry(one.linear, layer)
        layers.append(layer if waits is None else layer.to(waits))
    done: dict[str, Int8Linear] = {}
    for one, layer in zip(found, layers, strict=True):  # from here on nothing can fail
        home = one.linear.weight.device
        for parent, leaf in one.places:
            parent._modules[leaf] = layer
            adapters.placed(parent, leaf, layer)
        del one.linear  # and with it the float weight
        if waits is not None:
            layer.to(home)
        done.update(dict.fromkeys(one.names, layer))
    return done


def _waiting_place(found: list[_Found]) -> str | None:
    """The CPU if a GPU has no room for the int8 weights beside the float ones; else None."""
    needed: Counter[torch.device] = Counter()
    for one in found:
        if one.linear.weight.is_cuda:
            needed[one.linear.weight.device] += one.linear.out_features * one.linear.in_features
    for device, size in needed.items():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if size > 0.8 * (torch.cuda.mem_get_info(device)[0] + unused):
            return "cpu"
    return None


def _layer_of(
    one: _Found,
    first: Int8Linear | None,
    plan: Callable[[int, int], Plan] | None,
    device: torch.device | str | None,
) -> Int8Linear:
    """The layer of one linear. first: the layer of a linear with the same Parameter; its int8 weight is shared."""
    linear, found = one.linear, None if plan is None else plan(one.linear.out_features, one.linear.in_features)
    if first is not None:
        bias = foreign_weights.bias_of(linear, first.weight.device)
        layer = Int8Linear.from_int8(first.weight, first.weight_scale, bias, found)
        layer.weight = first.weight
        return layer
    try:
        return Int8Linear.from_linear(linear, found, None if device is None else torch.device(device))
    except Int8kitError as error:
        kind = ShapeError if isinstance(error, ShapeError) else InputError
        raise kind(f"{one.names[0]!r}: {error}") from error


def _carry(linear: torch.nn.Linear, layer: Int8Linear) -> None:
    """Give `layer` what was put on `linear`: hooks, mode, attributes, tensors, and accelerate's hook of its forward."""
    for name in _HOOKS:  # the same dictionaries, so that the handles of the hooks can still remove them
        setattr(layer, name, getattr(linear, name))
    layer.training = linear.training
    if type(linear).forward is torch.nn.Linear.forward:  # others have attributes of their format
        known = {*vars(layer), *foreign_weights.BESIDE, "forward", "_old_forward", "_hf_hook"}
        known.add("_compiled_call_impl")  # of linear.compile(): it calls the former forward
        vars(layer).update({name: value for name, value in vars(linear).items() if name not in known})
        for name, parameter in linear._parameters.items():  # of the hooks, for example
            if parameter is not None and name not in (*layer._parameters, *foreign_weights.BESIDE):
                layer.register_parameter(name, parameter)
        for name, buffer in linear._buffers.items():
            if name not in (*layer._buffers, *foreign_weights.BESIDE):
                layer.register_buffer(name, buffer, name not in linear._non_persistent_buffers_set)
    if "_hf_hook" in vars(linear):
        from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped]

        add_hook_to_module(layer, vars(linear)["_hf_hook"])
