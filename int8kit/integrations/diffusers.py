"""INT8 models by diffusers' own `from_pretrained` and `save_pretrained`. The import registers the quantizer "int8kit".

    import int8kit.integrations.diffusers
    model = Ideogram4Transformer2DModel.from_pretrained(folder, quantization_config=Int8KitConfig())
    model.save_pretrained(other)
    model = Ideogram4Transformer2DModel.from_pretrained(other)

The same name is registered with transformers, for text encoders: see `int8kit.integrations.transformers`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from transformers.quantizers import auto as transformers_auto

from int8kit.errors import InputError
from int8kit.integrations import lora
from int8kit.integrations.common import ServesInt8
from int8kit.integrations.config import DTYPES, METHOD, Int8KitConfig, as_patterns, linears, select
from int8kit.integrations.loader import BASE, WITHOUT_LORA, Loader, dequantize_layers, replace
from int8kit.integrations.transformers import Int8KitHfQuantizer

__all__ = ["Int8KitConfig", "Int8KitHfQuantizer", "Int8KitQuantizer", "register"]


class Int8KitQuantizer(ServesInt8, DiffusersQuantizer):  # type: ignore[misc]
    """Loads a diffusers model with INT8 layers, from float files, fp8 files, or files of `save_pretrained`."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Int8KitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config.copy(), **kwargs)  # the caller's object may serve another model
        self.keys: list[str] = []
        self.loader: Loader | None = None
        self.float32: set[str] = set()

    @property
    def is_serializable(self) -> bool:
        """True: `save_pretrained` works."""
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        """False: one thread, because a weight and its scale may be in different files."""
        return False

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of the float parameters: as asked, else as saved, else bf16. Raises InputError for another."""
        dtype = torch_dtype if torch_dtype is not None else DTYPES[self.quantization_config.dtype or "bfloat16"]
        if dtype not in DTYPES.values():
            raise InputError(f"dtype = {dtype}; expected one of {', '.join(map(str, DTYPES.values()))}")
        self.quantization_config.dtype = str(dtype).removeprefix("torch.")
        return dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Keep the list. It gets the model's names later, when the model is known."""
        self.keys = list(loaded_keys)
        return self.keys

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        config, every = self.quantization_config, linears(model)
        scaled = Loader(model, (), self.keys, ours=True).scaled
        if self.pre_quantized and config.policy is None:
            names = [name for name in every if name in scaled]
        else:
            names = select(model, config, keep_in_fp32_modules or [])
        config.policy = as_patterns(names, every)
        replace(model, names)
        self.loader = Loader(model, names, self.keys, self.pre_quantized)
        self.keys[:] = self.loader.loaded()  # the list of `maybe_update_loaded_keys`, which the caller holds
        self.float32 = set(keep_in_fp32_modules or [])

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """No keys, or FileError. This is the last call before tensors are read."""
        self._reading().check()
        return []

    def _reading(self) -> Loader:
        if self.loader is None:
            raise InputError("the model was loaded already; expected a call of from_pretrained")
        return self.loader

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors of one file under the model's names. Raises FileError for a wrong dtype."""
        return self._reading().read(state_dict)

    def check_if_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether `create_quantized_param` sets this tensor."""
        return self._reading().handles(param_name)

    def create_quantized_param(
        self,
        model: Any,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **kwargs: Any,
    ) -> None:
        """Set one weight. `param_value` is cast already, so that the weight comes from `state_dict`."""
        dtype = torch.float32 if self.float32 & set(param_name.split(".")) else dtype
        self._reading().create(model, param_name, state_dict[param_name], target_device, dtype)

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Nothing: the INT8 layers are in place, so that a device map counts their true bytes."""
        return {}

    def get_cuda_warm_up_factor(self) -> int:
        """2: one byte for each element, where the loader counts with bf16."""
        return 2

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._reading().finish(model)
        self.loader, self.keys = None, []
        lora.prepare_model(model)
        model.register_to_config(quantization_config=self.quantization_config)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors that `save_pretrained` writes. Raises InputError for a model with a LoRA: nothing loads it."""
        adapted = [name for name in state_dict if BASE in name]
        if adapted:
            raise InputError(f"an adapter is loaded over {adapted[0].partition(BASE)[0]!r}: {WITHOUT_LORA}")
        return state_dict, {}

    def _dequantize(self, model: Any) -> Any:
        dequantize_layers(model)
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
        return model


def register() -> None:
    """Register "int8kit" with diffusers and transformers. A second call changes nothing."""
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = Int8KitQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Int8KitConfig
    if METHOD not in transformers_auto.AUTO_QUANTIZER_MAPPING:
        transformers_auto.register_quantization_config(METHOD)(Int8KitConfig)
        transformers_auto.register_quantizer(METHOD)(Int8KitHfQuantizer)


register()
