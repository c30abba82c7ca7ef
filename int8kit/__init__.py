"""int8kit: INT8 linears of diffusion transformers on the GPU's integer tensor cores, tuned, proven bit-exact."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"

# Public name -> module; imported when first used, so that `import int8kit` needs no torch.
_HOMES = {
    "ConfigError": "spec",
    "FileError": "spec",
    "GemmShape": "spec",
    "InputError": "spec",
    "Int8Linear": "runtime.linear",
    "Int8kitError": "spec",
    "Plan": "lookup",
    "ShapeError": "spec",
    "TileConfig": "spec",
    "UnknownName": "spec",
    "Int8SwiGLU": "runtime.linear",
    "int8_linear": "ops",
    "int8_linear_swiglu": "ops",
    "qk_norm_rope": "ops_prologue",
    "quantize": "ops",
    "residual_norm_quantize": "ops_prologue",
    "rms_norm_quantize": "ops_prologue",
    "scaled_mm": "ops",
    "scaled_mm_swiglu": "ops",
    "swiglu_quantize": "ops_prologue",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'int8kit' has no attribute {name!r}")
    return getattr(import_module(f"int8kit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
