"""The properties that a fault in a file can break, the likely ones first.

    properties_of("kernels/quantize.py", executor)  ->  ("quantize", "operators", ...)

A row kernel is not reached by the properties of the GEMM, and the GEMM not by these of the row kernels. Every other
property is tried, so that a new one needs no entry here.
"""

from __future__ import annotations

from int8kit.spec import Kernel
from int8kit.verify.mutation import sources
from int8kit.verify.properties import registry
from int8kit.verify.properties.proof import Proof
from int8kit.verify.properties.registry import Property

GEMM = ("accumulator", "output", "swiglu")
ROWS = ("quantize", "rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope")
_GEMM_MORE = (
    "refusals", "fallback",
    "batch", "linearity", "zero rows", "nan rows", "strided", "repeats", "order", "configuration", "launch cache",
    "tile order", "tile scheduler", "bias", "epilogue conversion", "accumulator conversion", "swiglu epilogue",
)  # fmt: skip
_ROWS_MORE = ("row launches", "row scale", "row scale of fp32", "quantize, every pair")
_OF_PYTHON = ("lookup", "stamps")
_NORMS = ("rms_norm_quantize", "residual_norm_quantize")
_LIKELY: dict[str, tuple[str, ...]] = {
    "epilogue": ("output", "swiglu", "accumulator"),
    "l2_swizzle": ("tile order", *GEMM),
    "activations": ("swiglu_quantize", "swiglu", "output"),
    "row_primitives": ROWS,
    "quantize": ("quantize",),
    "rms_norm_quantize": _NORMS,
    "residual_norm_quantize": ("residual_norm_quantize",),
    "swiglu_quantize": ("swiglu_quantize",),
    "qk_norm_rope": ("qk_norm_rope",),
    "launch": ("launch cache", "row launches", *GEMM, *ROWS),
    "operands": ("refusals", "output", "accumulator", "swiglu", "launch cache", "operators"),
    "gemm": ("refusals", "fallback", "output", "accumulator", "swiglu"),
    "ops": ("operators",),
    "operand_checks": ("operators", "refusals"),
    "gradient": ("gradients",),
    "lookup": ("lookup", "operators"),
}
_UNREACHED: dict[str, tuple[str, ...]] = {
    "launch": _OF_PYTHON,
    "activations": _OF_PYTHON,
    "ops": (*GEMM, *_GEMM_MORE, *ROWS, *_ROWS_MORE, "stamps"),
    "operand_checks": (
        *GEMM,
        *(name for name in _GEMM_MORE if name != "refusals"),
        *ROWS,
        *_ROWS_MORE,
        *_OF_PYTHON,
    ),
    "gradient": (*GEMM, *_GEMM_MORE, *ROWS, *_ROWS_MORE, *_OF_PYTHON),
    "lookup": (*GEMM, *_GEMM_MORE, *ROWS, *_ROWS_MORE),
    **{
        name: (*GEMM, *_GEMM_MORE, *_OF_PYTHON, *(row for row in ROWS if row not in _LIKELY[name]))
        for name in ("row_primitives", *ROWS)
    },
}


def properties_of(file: str) -> tuple[str, ...]:
    """The properties and proofs to try on a fault in `file`, in order. An executor may lack some of them."""
    stem = sources.stem(file)
    unreached = _UNREACHED.get(stem, (*ROWS, *_ROWS_MORE, *_OF_PYTHON))
    rows: dict[str, Property | Proof] = {**registry.PROPERTIES, **registry.PROOFS}
    present = [name for name, row in rows.items() if row.level == "default" and name not in unreached]
    likely = [name for name in _LIKELY.get(stem, GEMM) if name in present]
    return tuple(dict.fromkeys((*likely, *present)))


def kernels_of(file: str) -> tuple[Kernel, ...]:
    """The kernels whose configurations run the code of `file`."""
    return sources.FILES[file]
