"""Fused forward passes of models that the runtime knows, by the name of the model's class.

    register("MyTransformer", fusion)     fusion(model, gpu) changes a model and returns the function that undoes it
    fuse(model) -> bool                   True if the model is fused now
    undo(model) -> bool                   True if it was fused; it is the former one again

A fusion returns None for a model that it cannot serve. BUILT_IN names the fusions of this package.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable

import torch

from int8kit.errors import InputError

Undo = Callable[[], None]
Fusion = Callable[[torch.nn.Module, str | None], Undo | None]
"""gpu: alias of the GPU whose tuning database serves, or None for the present one."""

BUILT_IN = {"Ideogram4Transformer2DModel": "int8kit.runtime.fuse_ideogram4"}
"""Class -> module with its `fusion`, imported when a model of that class is fused."""

_FUSIONS: dict[str, Fusion] = {}
_FUSED: weakref.WeakKeyDictionary[torch.nn.Module, Undo] = weakref.WeakKeyDictionary()


class NotFused(UserWarning):
    """A fused model runs by its own forward: the same result up to rounding, at lower speed."""


def register(class_name: str, fusion: Fusion) -> Undo:
    """Let `fuse` apply `fusion` to models of this class and its subclasses -> the function that takes it back.

    A fusion that raises must leave the model as it was. Raises InputError for a name that has a fusion.
    """
    if class_name in _FUSIONS or class_name in BUILT_IN:
        raise InputError(f"{class_name!r} has a fusion already; expected another class, or a call of its unregister")
    _FUSIONS[class_name] = fusion

    def unregister() -> None:
        if _FUSIONS.get(class_name) is fusion:
            del _FUSIONS[class_name]

    return unregister


def fuse(model: torch.nn.Module, gpu: str | None = None) -> bool:
    """Apply the fusion of the model's class, once. Returns whether the model is fused."""
    if model not in _FUSED:
        fusion = _fusion_of(model)
        undo = fusion(model, gpu) if fusion is not None else None
        if undo is not None:
            _FUSED[model] = undo
    return model in _FUSED


def undo(model: torch.nn.Module) -> bool:
    """Undo the fusion of the model. Returns whether there was one."""
    if model not in _FUSED:
        return False
    _FUSED[model]()
    del _FUSED[model]
    return True


def fused(model: torch.nn.Module) -> bool:
    """Whether the model is fused."""
    return model in _FUSED


def _fusion_of(model: torch.nn.Module) -> Fusion | None:
    """The fusion of the first class of the model that has one."""
    for kind in type(model).__mro__:
        if kind.__name__ in _FUSIONS:
            return _FUSIONS[kind.__name__]
        if kind.__name__ in BUILT_IN:
            found: Fusion = importlib.import_module(BUILT_IN[kind.__name__]).fusion
            return found
    return None
