"""Fused forward passes of models that the runtime knows, by the name of the model's class.

    register("MyTransformer", fusion)     fusion(model) joins layers of a model and returns the function that undoes it
    fuse(model) -> bool                   True if the model is fused now
    undo(model) -> bool                   True if it was fused; its layers are the former ones again

The registry is empty until a module registers a fusion.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from int8kit.errors import InputError

Undo = Callable[[], None]
Fusion = Callable[[torch.nn.Module], Undo]

_FUSIONS: dict[str, Fusion] = {}
_FUSED: weakref.WeakKeyDictionary[torch.nn.Module, Undo] = weakref.WeakKeyDictionary()


def register(class_name: str, fusion: Fusion) -> Undo:
    """Let `fuse` apply `fusion` to models of this class and its subclasses -> the function that takes it back.

    A fusion that raises must leave the model as it was. Raises InputError for a name that has a fusion.
    """
    if class_name in _FUSIONS:
        raise InputError(f"{class_name!r} has a fusion already; expected another class, or a call of its unregister")
    _FUSIONS[class_name] = fusion

    def unregister() -> None:
        if _FUSIONS.get(class_name) is fusion:
            del _FUSIONS[class_name]

    return unregister


def fuse(model: torch.nn.Module) -> bool:
    """Apply the fusion of the model's class, once. Returns whether the model is fused."""
    if model not in _FUSED:
        names = [kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _FUSIONS]
        if names:
            _FUSED[model] = _FUSIONS[names[0]](model)
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
