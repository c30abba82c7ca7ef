"""The note in a model's configuration by which diffusers and transformers load its saved INT8 layers.

Without it, `from_pretrained` takes the integers for float weights, and loses their scales. With it, a process that has
not imported `int8kit.integrations.diffusers` gets an error that names int8kit.
"""

from __future__ import annotations

from typing import Any

import torch

METHOD = "int8kit"
DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of float parameters that a saved folder remembers."""


def mark(module: torch.nn.Module, layers: set[torch.nn.Module]) -> None:
    """Note the quantization in each model of diffusers or transformers in `module` that holds one of `layers`."""
    for model in module.modules():
        if (_is_of_diffusers(model) or _is_of_transformers(model)) and any(
            child in layers for child in model.modules()
        ):
            dtype = str(getattr(model, "dtype", None)).removeprefix("torch.")
            set_note(model, {"quant_method": METHOD, "dtype": dtype if dtype in DTYPES else None})


def note_of(model: Any) -> Any:
    """The quantization_config of a model, or None."""
    if _is_of_diffusers(model):
        return model.config.get(_NAME)
    return vars(model.config).get(_NAME) if _is_of_transformers(model) else None


def set_note(model: Any, value: Any) -> None:
    """Set the quantization_config that `save_pretrained` writes; None removes it. Other modules have none."""
    if _is_of_diffusers(model):
        model._internal_dict = type(model.config)({k: v for k, v in model.config.items() if k != _NAME})
        if value is not None:
            model.register_to_config(quantization_config=value)
    elif _is_of_transformers(model):
        vars(model.config).pop(_NAME, None)
        if value is not None:
            model.config.quantization_config = value


_NAME = "quantization_config"


def _is_of_diffusers(model: Any) -> bool:
    return hasattr(model, "register_to_config") and isinstance(getattr(model, "config", None), dict)


def _is_of_transformers(model: Any) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_diff_dict")
