"""LoRA files for models with INT8 linears, through diffusers' own loaders.

    prepare(pipe)         pipe.load_lora_weights checks each key, and casts A and B to the model's dtype
    prepare_model(model)  the same for one model: the layouts that the pipeline's own reader refuses stay refused
    release(pipe)         the loaders are diffusers' own again

`int8kit.optimize` calls `prepare`. A model that is loaded in INT8 has had `prepare_model`. The pipeline's methods stay
the interface: load_lora_weights, set_adapters, fuse_lora, unfuse_lora, unload_lora_weights.

Layouts: `named_as_in` finds the linear that a key means. A file of which any key means no linear is refused, so that no
part of a LoRA is lost in silence. A LoRA belongs to the component that the pipeline's loader takes; in Ideogram 4 that
is `transformer`, never `unconditional_transformer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from int8kit.errors import InputError

IDEOGRAM4 = "Ideogram4Transformer2DModel"
PREFIXES = ("transformer.", "diffusion_model.", "conditional_transformer.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
PARTS = {
    ".lora_A.weight": "A", ".lora_down.weight": "A", ".lora_B.weight": "B", ".lora_up.weight": "B",
    ".alpha": "alpha", ".lora_B.bias": "bias",
}  # fmt: skip
ALIASES = {  # module names of Ideogram's own checkpoint, as (pattern of ours, theirs)
    "qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "o": ("attention.to_out.0",),
}
LOADER = "load_lora_adapter"
READER = "lora_state_dict"

State = dict[str, torch.Tensor]


def prepare(pipe: Any) -> None:
    """Make the loaders of a pipeline check and cast LoRAs. A second call changes nothing."""
    for model in _models(pipe):
        prepare_model(model)
        if has_adapters(model):
            _make_exact(model)
    if type(getattr(pipe, "transformer", None)).__name__ == IDEOGRAM4 and READER not in vars(pipe):
        vars(pipe)[READER] = partial(_read, pipe)


def prepare_model(model: torch.nn.Module) -> None:
    """Make the loader of one model check and cast LoRAs. A model without such a loader stays as it is."""
    if hasattr(type(model), LOADER) and LOADER not in vars(model):
        vars(model)[LOADER] = partial(_load_adapter, model)  # a partial follows the model into a deepcopy


def release(pipe: Any) -> None:
    """Give a pipeline diffusers' own loaders again. LoRAs that are loaded stay."""
    for model in _models(pipe):
        if isinstance(vars(model).get(LOADER), partial):
            del vars(model)[LOADER]
    if isinstance(vars(pipe).get(READER), partial):
        del vars(pipe)[READER]


def _models(pipe: Any) -> Iterator[torch.nn.Module]:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module) and hasattr(type(component), LOADER):
            yield component


def _read(pipe: Any, source: Any, **options: Any) -> Any:
    """`pipe.lora_state_dict` for Ideogram 4: a file's tensors, as transformer.NAME.lora_A.weight and lora_B."""
    from diffusers.loaders.lora_base import _fetch_state_dict

    wants_metadata = options.pop("return_lora_metadata", False)
    safe = options.pop("use_safetensors", None)
    names = ("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision")
    given = {name: options.pop(name, None) for name in (*names, "subfolder")}
    given["force_download"] = bool(given["force_download"])
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    state, metadata = _fetch_state_dict(
        source, use_safetensors=safe is not False, allow_pickle=safe is None, user_agent=agent, **given
    )
    state = {f"transformer.{key}": tensor for key, tensor in named_as_in(pipe.transformer, state).items()}
    return (state, metadata) if wants_metadata else state


TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
"""Beginnings of keys for other components than the denoiser."""


def _load_adapter(
    model: Any, source: Any, prefix: str | None = "transformer", hotswap: bool = False, **options: Any
) -> None:
    """`model.load_lora_adapter` that refuses keys without a linear, and casts A and B to the model's dtype."""
    before = set(getattr(model, "peft_config", ()))
    if isinstance(source, dict) and source and all(key.startswith(TEXT_ENCODERS) for key in source):
        return  # the pipeline gives these to the text encoders next
    if isinstance(source, dict):
        source = _checked(model, source, prefix)
    type(model).load_lora_adapter(model, source, prefix=prefix, hotswap=hotswap, **options)
    if not hotswap and source and set(getattr(model, "peft_config", ())) == before:
        raise InputError(f"the LoRA has no key for {type(model).__name__}; expected keys that start with {prefix!r}")
    if has_adapters(model):
        _cast(model)
        _make_exact(model)


def _checked(model: torch.nn.Module, state: State, prefix: str | None) -> State:
    """The tensors for `model` under their names with the prefix, in the model's dtype; others are left out."""
    start = f"{prefix}." if prefix else ""
    ours = {key: tensor for key, tensor in state.items() if key.startswith(start)}
    if not ours and state:
        rest = {key: tensor for key, tensor in state.items() if not key.startswith(TEXT_ENCODERS)}
        ours = {start + key: tensor for key, tensor in named_as_in(model, rest).items()}
    if not any(".lora_A." in key for key in ours):  # layouts of other models, which diffusers converts
        return ours
    targets = _targets(model)
    for key, tensor in ours.items():
        split = _split(key.removeprefix(start))
        if split is None or split.module not in targets:
            raise _unmatched(key, model)
        _check_size(key, tensor, split.part, *targets[split.module])
    dtype = _dtype(model)
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in ours.items()}


class _Key(NamedTuple):
    """The module that a key names, and the part of the LoRA."""

    module: str
    part: str


def _split(key: str) -> _Key | None:
    for suffix, part in PARTS.items():
        if key.endswith(suffix):
            return _Key(key.removesuffix(suffix), part)
    return None


def _check_size(key: str, tensor: torch.Tensor, part: str, out: int, width: int) -> None:
    """Raise InputError for A or B of a linear of another size. torch would name all of them, and load the rest."""
    expected, found = {"A": width, "B": out}.get(part, 0), tensor.shape[part == "A" :][:1]
    if expected and found != (expected,):
        wanted = f"[r, {width}]" if part == "A" else f"[{out}, r]"
        raise InputError(
            f"LoRA key {key!r} has the shape {[*tensor.shape]}; expected {wanted}; the file is for another model; "
            "nothing was loaded"
        )


def named_as_in(model: torch.nn.Module, state: State) -> State:
    """The tensors of a LoRA file under the names of the linears of `model`: NAME.lora_A.weight, NAME.lora_B.weight.

    It knows the names of diffusers and of Ideogram's checkpoint, where q, k and v are one linear. Prefixes:
    `transformer.`, `diffusion_model.`, `conditional_transformer.`, or none; `lora_unet_` with underscores for dots. A
    and B may be `lora_down` and `lora_up`. An `alpha` is folded into A. Raises InputError for the first key that means
    no linear, and for factors of other shapes.
    """
    targets, found = _targets(model), {}
    flat = {name.replace(".", "_"): name for name in (*targets, *_theirs(targets))}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    first: dict[str, str] = {}
    for key, tensor in state.items():
        split = _split(key)
        name = None if split is None else _plain(split.module, flat)
        if split is None or name is None or not _meant(name, targets):
            raise _unmatched(key, model)
        parts.setdefault(name, {})[split.part] = tensor
        first.setdefault(name, key)
    for name, factors in parts.items():
        for linear, part, tensor in _factors(name, factors, targets, first[name]):
            found[f"{linear}.lora_{part}"] = tensor
    return found


def _plain(name: str, flat: dict[str, str]) -> str | None:
    """A module's dotted name without the prefix of its file; None for a flat name that is unknown."""
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            return flat.get(name.removeprefix(prefix))
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _targets(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Names of the linears of `model` with or without adapters -> (out features, in features)."""
    found = {}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", module)
        inside = name.endswith(".base_layer") or ".lora_" in name
        if not inside and isinstance(base, torch.nn.Linear):
            found[name] = (base.out_features, base.in_features)
        elif not inside and isinstance(base, torch.nn.modules.conv._ConvNd | torch.nn.Embedding):
            found[name] = (0, 0)  # diffusers' loader checks these
    return found


def _meant(name: str, targets: dict[str, tuple[int, int]]) -> list[str]:
    """The linears that a module name means: itself, or those that Ideogram's checkpoint joins. Empty: none."""
    if name in targets:
        return [name]
    block, _, leaf = name.rpartition("attention.")
    meant = [block + part for part in ALIASES.get(leaf, ())]
    return meant if meant and all(part in targets for part in meant) else []


def _theirs(targets: Iterable[str]) -> set[str]:
    """Names of Ideogram's checkpoint for linears among `targets`."""
    ends = {parts[0]: alias for alias, parts in ALIASES.items()}
    return {
        target.removesuffix(end) + f"attention.{alias}"
        for target in targets
        for end, alias in ends.items()
        if re.search(rf"(?:^|\.){re.escape(end)}$", target)
    }


def _factors(
    name: str, factors: State, targets: dict[str, tuple[int, int]], key: str
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(linear, part, tensor) of one module of a file. Raises InputError for a missing factor or another shape."""
    if not {"A", "B"} <= set(factors):
        raise InputError(f"LoRA key {key!r}: its module lacks A or B; the file is incomplete")
    a, b = factors["A"], factors["B"]
    meant = _meant(name, targets)
    out, width = sum(targets[linear][0] for linear in meant), targets[meant[0]][1]
    if width and (a.ndim != 2 or b.ndim != 2 or a.shape != (b.shape[1], width) or b.shape[0] != out):
        raise InputError(
            f"LoRA key {key!r}: A {list(a.shape)} and B {list(b.shape)}; expected [r, {width}] and [{out}, r]; the "
            "file is for another model"
        )
    if "alpha" in factors:
        a = a * (factors["alpha"].item() / a.shape[0])
    sizes = [targets[linear][0] for linear in meant] if len(meant) > 1 else [b.shape[0]]
    biases = factors["bias"].split(sizes) if "bias" in factors else [None] * len(meant)
    for linear, part, bias in zip(meant, b.split(sizes), biases, strict=True):
        yield linear, "A.weight", a.clone()
        yield linear, "B.weight", part.contiguous()
        if bias is not None:
            yield linear, "B.bias", bias.contiguous()


def _unmatched(key: str, model: torch.nn.Module) -> InputError:
    if key.endswith("dora_scale"):
        return InputError(f"LoRA key {key!r} belongs to a DoRA; expected a LoRA without variants; nothing was loaded")
    return InputError(
        f"LoRA key {key!r} means no linear of {type(model).__name__}; expected names as in the model, such as "
        f"'transformer.{next(iter(_targets(model)), 'NAME')}.lora_A.weight'; nothing was loaded"
    )


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether adapters of peft are in the model."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def _make_exact(model: torch.nn.Module) -> None:
    from int8kit.adapters import peft_layers

    peft_layers.make_exact(model)


def make_plain(model: torch.nn.Module) -> None:
    """Give the adapter layers over float linears peft's own class again."""
    from int8kit.adapters import peft_layers

    peft_layers.make_plain(model)


def _dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The dtype that the model computes in: that of its first floating parameter that is no adapter's."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in name and not any(part in name for part in kept):
            return parameter.dtype
    return None


def _cast(model: torch.nn.Module) -> None:
    """Cast A and B over INT8 layers to the model's dtype, where a loader left them in the file's."""
    dtype = _dtype(model)
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if dtype is not None and getattr(base, "weight_scale", None) is not None:
            for factors in (getattr(module, "lora_A", None), getattr(module, "lora_B", None)):
                if isinstance(factors, torch.nn.Module):
                    factors.to(dtype)


__all__ = ["named_as_in", "prepare", "prepare_model", "release"]
