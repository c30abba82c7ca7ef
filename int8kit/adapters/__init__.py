"""Adapters of peft over INT8 layers: notice of each adapter layer that takes an INT8 layer as its base.

peft picks the class of an adapter layer by a fixed list, and diffusers gives no access to it. `watch` registers a hook
of torch instead, which sees the base layer when the adapter layer takes it. The adapter layer then gets a class of
`int8kit.adapters.peft_layers`. peft itself stays as it is, and is imported by nobody who does not use it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

_PLAIN: list[type[torch.nn.Module]] = []


def watch(plain: type[torch.nn.Module]) -> None:
    """Watch for adapters over layers of the class `plain`, from now on. A second call changes nothing."""
    if not _PLAIN:
        torch.nn.modules.module.register_module_module_registration_hook(_registered)
    if plain not in _PLAIN:
        _PLAIN.append(plain)


def _registered(module: torch.nn.Module, name: str, child: Any) -> None:
    """torch calls it for each module that becomes a child of another."""
    if name != "base_layer" or "peft" not in sys.modules:
        return
    for plain in _PLAIN:
        if isinstance(child, plain):
            from int8kit.adapters import peft_layers

            peft_layers.adapt(module, child, plain)
