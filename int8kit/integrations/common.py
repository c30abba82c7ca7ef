"""The parts that the quantizers of diffusers and of transformers share."""

from __future__ import annotations

from typing import Any

from int8kit.errors import InputError


class ServesInt8:
    """The properties of a model with INT8 layers that both libraries ask for."""

    @property
    def is_trainable(self) -> bool:
        """True: adapters train, since gradients pass the layers. The int8 weights get none."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the layers call torch operators with fake kernels."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise InputError for a device map with the disk: a loader would write float scales or weights there."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InputError(
                "device_map places layers on 'disk'; expected devices and 'cpu'; raise max_memory or offload after "
                "loading"
            )
