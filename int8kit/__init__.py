"""int8kit: INT8 linears of diffusion transformers on the GPU's integer tensor cores, tuned, proven bit-exact."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"

# Public name -> module; imported when first used, so that `import int8kit` needs no torch.
_HOMES = {
    "ConfigError": "errors",
    "FileError": "errors",
    "GemmShape": "spec",
    "InputError": "errors",
    "Int8Linear": "layers",
    "Int8kitError": "errors",
    "Plan": "lookup",
    "ShapeError": "errors",
    "TileConfig": "spec",
    "UnknownName": "errors",
    "Int8SwiGLU": "layers",
    "int8_linear": "ops",
    "int8_linear_swiglu": "ops",
    "qk_norm_rope": "ops",
    "quantize": "ops",
    "residual_norm_quantize": "ops",
    "rms_norm_quantize": "ops",
    "scaled_mm": "ops",
    "scaled_mm_swiglu": "ops",
    "swiglu_quantize": "ops",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'int8kit' has no attribute {name!r}")
    return getattr(import_module(f"int8kit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
