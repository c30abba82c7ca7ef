"""Modules of other libraries that take an INT8 layer as their child, and read its weight by themselves.

peft picks the class of an adapter layer by a fixed list, and diffusers gives no access to it. `watch` registers a hook
of torch instead, which sees the base layer when the adapter layer takes it. The adapter layer then gets a class of
`int8kit.adapters.peft_layers`. peft itself stays as it is, and is imported by nobody who does not use it.

The same hook sees two more readers. `MultiheadAttention` multiplies by the weight of its out_proj: the layer is
refused. `fuse_projections` of diffusers copies the weights of q, k and v into a float linear: it is replaced on the
instance by `refuse_fusing`, as long as INT8 layers are there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from int8kit.errors import InputError

_FUSED = frozenset(("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"))
_READ = {"base_layer", "out_proj", *_FUSED}
_PLAIN: list[type[torch.nn.Module]] = []


def watch(plain: type[torch.nn.Module]) -> None:
    """Watch for adapters over layers of the class `plain`, from now on. A second call changes nothing."""
    if not _PLAIN:
        torch.nn.modules.module.register_module_module_registration_hook(_registered)
    if plain not in _PLAIN:
        _PLAIN.append(plain)


def _registered(module: torch.nn.Module, name: str, child: Any) -> None:
    """torch calls it for each module that becomes a child of another."""
    if name not in _READ:
        return
    if name in _FUSED:
        placed(module, name, child)
    for plain in _PLAIN:
        if not isinstance(child, plain):
            continue
        if name == "out_proj" and type(module).forward is torch.nn.MultiheadAttention.forward:
            raise InputError(
                f"{plain.__name__} as the out_proj of MultiheadAttention, which reads the weight itself: expected a "
                "float linear; leave it in float"
            )
        if name == "base_layer" and "peft" in sys.modules:
            from int8kit.adapters import peft_layers

            peft_layers.adapt(module, child, plain)


def placed(module: torch.nn.Module, name: str, child: Any) -> None:
    """Let an attention of diffusers refuse to fuse its projections while one of them is INT8.

    child: the module that comes, or has come, into the place `name`.
    """
    if name not in _FUSED or not hasattr(type(module), _FUSE):
        return
    children = {**module._modules, name: child}
    if any(isinstance(children.get(one), tuple(_PLAIN)) for one in _FUSED):
        if not getattr(module, "fused_projections", False):
            vars(module)[_FUSE] = refuse_fusing
    elif vars(module).get(_FUSE) is refuse_fusing:
        del vars(module)[_FUSE]


def refuse_fusing(*args: Any, **kwargs: Any) -> None:
    """Raise InputError. It has no reference to its module, so that copies and pickles of the module keep it."""
    raise InputError(
        "fuse_qkv_projections would copy INT8 weights into a float linear: call it on the float model, before "
        "int8kit.optimize or quantize_, or leave it out"
    )


_FUSE = "fuse_projections"
