"""`Int8KitConfig`, the `quantization_config` of diffusers and transformers, and the linears that it selects.

A configuration holds texts only, because both libraries write it to config.json.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from int8kit import quantization
from int8kit.errors import FileError, InputError

METHOD = "int8kit"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Method(StrEnum):
    """The name of the quantizer. Both libraries read `.value`."""

    INT8KIT = METHOD


@dataclass(kw_only=True)
class Int8KitConfig(QuantizationConfigMixin, TransformersConfigMixin):  # type: ignore[misc]
    """Selects the linears of a model that become `int8kit.Int8Linear`. Use it as `quantization_config`.

    policy: patterns of dotted names, such as `layers.*.attention.*`; None selects the default of the model.
    modules_to_not_convert: linears that stay float: names, or parts of names, such as `adaln_modulation`.
    dtype: dtype of the parameters that stay float, if `from_pretrained` gets none; None stands for bfloat16.
    A saved model has all three in its config.json. Raises InputError for a value of another type.
    """

    policy: Sequence[str] | None = None
    modules_to_not_convert: Sequence[str] = ()
    dtype: str | None = None
    quant_method: Method = Method.INT8KIT

    def __post_init__(self) -> None:
        self.quant_method = Method.INT8KIT  # config.json gives a text
        self.policy = None if self.policy is None else _texts("policy", self.policy)
        self.modules_to_not_convert = _texts("modules_to_not_convert", self.modules_to_not_convert or ())
        if self.dtype is not None and (type(self.dtype) is not str or self.dtype not in DTYPES):
            raise InputError(f"dtype = {self.dtype!r}; expected one of {', '.join(DTYPES)}, as a text")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration of a config.json. Raises FileError for a key of a later version."""
        unknown = sorted(set(config_dict) - set(cls.__dataclass_fields__))
        if unknown:
            raise FileError(
                f"quantization_config has unknown keys {', '.join(unknown)}; expected "
                f"{', '.join(cls.__dataclass_fields__)}; update int8kit"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: texts and lists of texts."""
        lists = {
            "policy": self.policy if self.policy is None else [*self.policy],
            "modules_to_not_convert": [*self.modules_to_not_convert],
        }
        return {**lists, "dtype": self.dtype, "quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`, for `repr`."""
        return self.to_dict()

    def copy(self) -> Self:
        """An equal configuration that shares nothing with this one."""
        made: Self = type(self).from_dict(self.to_dict())
        return made


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(type(one) is str for one in value):
        raise InputError(f"{name} = {value!r}; expected a list of texts, such as ['layers.*.attention.*']")
    return list(value)


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linears of a model by dotted name. Subclasses are left out: their `forward` or weight may differ."""
    found = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in found if type(module) is torch.nn.Linear}


def excludes(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern equals the name or some of its consecutive parts: `to_q` excludes `layers.0.to_q`."""
    return any(fnmatchcase(f".{name}.", f"*.{pattern}.*") for pattern in patterns)


def select(
    model: torch.nn.Module,
    config: Int8KitConfig,
    kept: Iterable[str] = (),
    prefix: str = "",
) -> list[str]:
    """Names of the linears of `model` that become INT8. kept: further names that stay float.

    Without a policy, `int8kit.quantization.Policy` decides. prefix: a first part of names that a pattern may lack.
    Raises InputError if the policy selects none.
    """
    names = quantization.chosen(model) if config.policy is None else []
    if config.policy:
        found = linears(model)
        names = [name for name in found if any(fnmatchcase(n, p) for n in forms(name, prefix) for p in config.policy)]
        if not names:
            raise InputError(
                f"policy {config.policy} selects no linear of {type(model).__name__}; expected patterns of dotted "
                f"names, such as {next(iter(found), 'layers.*')!r}"
            )
    return [name for name in names if not excludes(name, [*config.modules_to_not_convert, *kept])]


def forms(name: str, prefix: str) -> set[str]:
    """The name of a linear with and without the first part that a model with a head adds."""
    return {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")} if prefix else {name}


def as_patterns(names: Collection[str], every: Collection[str]) -> list[str]:
    """The shortest list that the function knows of patterns which select `names` and no other name of `every`."""
    found = []
    for pattern in dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names):
        selected = [name for name in every if fnmatchcase(name, pattern)]
        found += [pattern] if set(selected) <= set(names) else [name for name in selected if name in names]
    return list(dict.fromkeys(found))
