"""INT8 linears of diffusion transformers on the GPU's integer tensor cores, tuned per shape and proven bit-exact."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from int8kit.database.database import Database
    from int8kit.database.store import NotTuned, load_database, load_plans
    from int8kit.errors import CheckFailed, ConfigError, FileError, InputError, Int8kitError, ShapeError, UnknownName
    from int8kit.integrations import pipeline_config
    from int8kit.layers import Int8Linear, Int8SwiGLU
    from int8kit.lookup import Plan
    from int8kit.ops import (
        int8_linear,
        int8_linear_swiglu,
        qk_norm_rope,
        quantize,
        residual_norm_quantize,
        rms_norm_quantize,
        scaled_mm,
        scaled_mm_swiglu,
        swiglu_quantize,
    )
    from int8kit.pipelines import optimize, restore
    from int8kit.quantization import Policy, QuantizationReport, quantize_, replace_linears
    from int8kit.spec import GemmShape, Kernel, Operation, Source, TileConfig

__version__ = "0.2.0"

__all__ = [
    "CheckFailed",
    "ConfigError",
    "Database",
    "FileError",
    "GemmShape",
    "InputError",
    "Int8Linear",
    "Int8SwiGLU",
    "Int8kitError",
    "Kernel",
    "NotTuned",
    "Operation",
    "Plan",
    "Policy",
    "QuantizationReport",
    "ShapeError",
    "Source",
    "TileConfig",
    "UnknownName",
    "__version__",
    "int8_linear",
    "int8_linear_swiglu",
    "load_database",
    "load_plans",
    "optimize",
    "pipeline_config",
    "qk_norm_rope",
    "quantize",
    "quantize_",
    "replace_linears",
    "residual_norm_quantize",
    "restore",
    "rms_norm_quantize",
    "scaled_mm",
    "scaled_mm_swiglu",
    "swiglu_quantize",
]

_MODULES = {
    "database.database": ("Database",),
    "database.store": ("NotTuned", "load_database", "load_plans"),
    "errors": ("CheckFailed", "ConfigError", "FileError", "InputError", "Int8kitError", "ShapeError", "UnknownName"),
    "integrations": ("pipeline_config",),
    "layers": ("Int8Linear", "Int8SwiGLU"),
    "lookup": ("Plan",),
    "ops": (
        "int8_linear",
        "int8_linear_swiglu",
        "qk_norm_rope",
        "quantize",
        "residual_norm_quantize",
        "rms_norm_quantize",
        "scaled_mm",
        "scaled_mm_swiglu",
        "swiglu_quantize",
    ),
    "pipelines": ("optimize", "restore"),
    "quantization": ("Policy", "QuantizationReport", "quantize_", "replace_linears"),
    "spec": ("GemmShape", "Kernel", "Operation", "Source", "TileConfig"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take every name for Any

    def __getattr__(name: str) -> object:
        """A public name, whose module is imported at the first use: `import int8kit` loads neither torch nor triton."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'int8kit' has no attribute {name!r}")
        value = getattr(import_module(f"int8kit.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
