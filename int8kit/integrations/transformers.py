"""INT8 text encoders by transformers' own `from_pretrained` and `save_pretrained`.

`int8kit.integrations.diffusers` registers the class. Files are safetensors of floats, or of `save_pretrained`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from int8kit.errors import FileError
from int8kit.integrations.common import ServesInt8
from int8kit.integrations.config import DTYPES, Int8KitConfig, as_patterns, forms, linears, select
from int8kit.integrations.loader import SCALE, dequantize_layers, describes_weight, names_of, quantized, replace
from int8kit.layers import Int8Linear

FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors writes them


class Quantize(ConversionOps):  # type: ignore[misc]
    """Turns a float weight into an int8 weight and its scales, when the weight arrives."""

    def convert(self, input_dict: dict[str, Any], *args: Any, full_layer_name: str = "", **kwargs: Any) -> Any:
        """{name: weight} -> {name: int8 weight, name of the scales: scales}."""
        [value] = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        q, scale = quantized(weight)
        return {full_layer_name: q, f"{full_layer_name.removesuffix('weight')}{SCALE}": scale}


class Int8KitHfQuantizer(ServesInt8, HfQuantizer):  # type: ignore[misc]
    """Loads a transformers model with INT8 layers, from float files or from files of `save_pretrained`."""

    quantization_config: Int8KitConfig

    def __init__(self, quantization_config: Int8KitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config.copy(), **kwargs)

    def is_serializable(self) -> bool:
        """True: `save_pretrained` works."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        dtypes = self._check_files(checkpoint_files or [])
        config = self.quantization_config
        kept = model._keep_in_fp32_modules or []
        prefix = model.base_model_prefix
        names = select(model, config, kept, prefix=prefix)
        if self.pre_quantized and config.policy is None:  # as `quantize_` chose
            names = [n for n in linears(model) if any(f"{one}.{SCALE}" in dtypes for one in forms(n, prefix))]
        config.policy = as_patterns(names, linears(model))
        replace(model, names)
        for name in names:  # transformers would draw random numbers for a missing tensor
            model.get_submodule(name)._is_hf_initialized = True

    def _check_files(self, paths: list[str]) -> dict[str, str]:
        """The dtypes of all tensors. Raises FileError for weights of another layout. Only headers are read."""
        dtypes: dict[str, str] = {}
        for path in paths:
            if not str(path).endswith(".safetensors"):
                raise FileError(f"cannot quantize {str(path)!r} on loading; expected safetensors files")
            with safe_open(path, framework="pt") as file:
                dtypes.update({key: file.get_slice(key).get_dtype() for key in file.keys()})  # noqa: SIM118
        wrong = [key for key, dtype in dtypes.items() if not self._can_read(key, dtype, dtypes)]
        expected = "int8 weights and float32 scales; save the model again"
        if not self.pre_quantized:
            expected = "float weights without scales"
        if wrong:
            raise FileError(f"the files hold tensors of another layout: {names_of(wrong)}; expected {expected}")
        return dtypes

    def _can_read(self, key: str, dtype: str, dtypes: dict[str, str]) -> bool:
        """Whether a tensor is a float weight or, in files of ours, an int8 weight or its scale."""
        module, _, leaf = key.rpartition(".")
        if leaf in ("weight", "bias"):
            if self.pre_quantized and leaf == "weight" and f"{module}.{SCALE}" in dtypes:
                return dtype == "I8"
            return dtype in FLOATS or (self.pre_quantized and dtype == "I8")  # a missing scale is named after loading
        if f"{module}.weight" not in dtypes and module not in dtypes:
            return True
        ours = self.pre_quantized and leaf == SCALE and dtype == "F32"
        return ours or not describes_weight(key)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor is the weight of an INT8 layer."""
        module, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(module), Int8Linear)

    def get_quantize_ops(self) -> Quantize:
        """The operation on each weight that `param_needs_quantization`."""
        return Quantize()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        tensors = model.state_dict(keep_vars=True)
        ignored = model._keys_to_ignore_on_load_missing or []
        missing = [name for name, t in tensors.items() if not getattr(t, "_is_hf_initialized", False)]
        missing = [name for name in missing if not any(re.search(pattern, name) for pattern in ignored)]
        if missing:
            raise FileError(f"the files lack {names_of(missing)}; expected all tensors of the model")
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dequantize_layers(model, DTYPES[dtype] if isinstance(dtype, str) else dtype)
        return model
