"""Examples as one line of JSON: reports print them, `replay` and `regressions` read them.

    to_json(Draw(GemmShape(1, 2, 3), ...))   -> {"shape": {"m": 1, ...}, "config": {...}, ..., "bias": "float16"}
    to_json(RowExample("quantize", ...))     -> {"example": "RowExample", "kernel": "quantize", ...}
    from_json(text)                          -> the example

An example is a frozen dataclass of CLASSES. Its fields are numbers, strings, None, dtypes, enums, tuples, and
dataclasses with such fields. The annotations of the fields say how a value is read. A `Draw` has no tag, as in files of
earlier versions.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from importlib import import_module
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from int8kit.errors import InputError

CLASSES = {  # by name: the module, which is imported when it is needed, since it may import this one
    "Draw": "int8kit.verify.examples.strategies",
    "RowExample": "int8kit.verify.properties.row_kernels",
    "LaunchPair": "int8kit.verify.properties.row_launches",
    "Pair": "int8kit.verify.properties.launch_cache",
    "RefusedCall": "int8kit.verify.properties.gemm_calls",
    "FallbackCall": "int8kit.verify.properties.gemm_calls",
    "NeedCall": "int8kit.verify.properties.kernel_needs",
    "OperatorCase": "int8kit.verify.properties.operators",
    "GradientCase": "int8kit.verify.properties.gradients",
    "LayerCase": "int8kit.verify.properties.layers",
    "ChoiceCase": "int8kit.verify.properties.choices",
    "ModuleCase": "int8kit.verify.properties.modules",
    "LookupCase": "int8kit.verify.properties.lookups",
    "StampCase": "int8kit.verify.properties.stamps",
}
"""The module of each class of examples. A class in another module gets a line here."""

_UNTAGGED = "Draw"
_TAG = "example"
_OLD_KINDS = {"least": "all minus 128"}
_OLD_KERNELS = {"pointer": "triton", "ampere": "mma_sync", "hopper": "wgmma"}


def to_json(example: Any) -> str:
    """`example` as one line of JSON, which `from_json` reads. Raises TypeError for a class that CLASSES lacks."""
    name = type(example).__name__
    if CLASSES.get(name) != type(example).__module__:
        raise TypeError(f"an example of the class {name}: expected one of {', '.join(CLASSES)}")
    tag = {} if name == _UNTAGGED else {_TAG: name}
    return json.dumps(tag | _encoded(example))


def from_json(text: str) -> Any:
    """The inverse of `to_json`, also for the spellings of earlier versions.

    Raises ValueError, TypeError, KeyError or InputError for any other text.
    """
    row = json.loads(text)
    if not isinstance(row, dict):
        raise TypeError(f"an example {text[:40]!r}: expected an object")
    name = row.pop(_TAG, _UNTAGGED)
    if name not in CLASSES:
        raise ValueError(f"an example of the class {name}: expected one of {', '.join(CLASSES)}")
    if name == _UNTAGGED:
        _use_present_words(row)
    return _decoded(getattr(import_module(CLASSES[name]), name), row)


def encoded(example: object) -> str | None:
    """`to_json`, or None for an object that is no example, such as a step of a proof."""
    try:
        return to_json(example)
    except TypeError:
        return None


def described(example: object) -> tuple[str, str | None]:
    """The report of a child process before it tries `example`: its words, and its JSON if it has one."""
    return str(example), encoded(example)


def _encoded(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _encoded(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_encoded(one) for one in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} in an example: expected a number, a string, a dtype, a tuple or a dataclass")


def _use_present_words(row: dict[str, Any]) -> None:
    """Replace the words of earlier versions in a `Draw`."""
    if "far" in row:
        row["huge_stride"] = row.pop("far")
    row["kind"] = _OLD_KINDS.get(row["kind"], row["kind"])
    kernel = row["config"]["kernel"]
    row["config"]["kernel"] = _OLD_KERNELS.get(kernel, kernel)


@lru_cache(maxsize=64)
def _hints(of: type) -> dict[str, Any]:
    return get_type_hints(of)


def _decoded(hint: Any, value: Any) -> Any:
    """The value that a field with the annotation `hint` had."""
    if get_origin(hint) in (Union, UnionType):
        for one in get_args(hint):
            try:
                return _decoded(one, value)
            except (TypeError, ValueError, KeyError, InputError):
                continue
        raise ValueError(f"{value!r}: expected {hint}")
    if get_origin(hint) is tuple:
        return _tuple(get_args(hint), value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{value!r}: expected one of {get_args(hint)}")
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, dict) or value.keys() - {f.name for f in fields(hint)}:
            raise ValueError(f"{value!r}: expected the fields of {hint}")
        return hint(**{name: _decoded(_hints(hint)[name], one) for name, one in value.items()})
    return _plain(hint, value)


def _tuple(hints: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list) or (hints and hints[-1] is not Ellipsis and len(hints) != len(value)):
        raise TypeError(f"{value!r}: expected a list")
    each = repeat(hints[0]) if hints and hints[-1] is Ellipsis else hints
    return tuple(_decoded(hint, one) for hint, one in zip(each, value, strict=False))


def _plain(hint: Any, value: Any) -> Any:
    if hint is torch.dtype:
        found = getattr(torch, value) if isinstance(value, str) and hasattr(torch, value) else None
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{value!r}: expected a dtype")
        return found
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not (NoneType if hint is None else hint):
        raise TypeError(f"{value!r}: expected {hint}")
    return value
