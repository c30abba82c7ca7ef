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
GEMM_MORE = (
    "batch", "linearity", "zero rows", "nan rows", "strided", "repeats", "order", "configuration",
)  # fmt: skip
ROWS = ("quantize", "rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope")
_NORMS = ("rms_norm_quantize", "residual_norm_quantize")
_LIKELY: dict[str, tuple[str, ...]] = {
    "epilogue": ("output", "swiglu", "accumulator"),
    "activations": ("swiglu_quantize", "swiglu", "output"),
    "row_primitives": ROWS,
    "quantize": ("quantize",),
    "rms_norm_quantize": _NORMS,
    "residual_norm_quantize": ("residual_norm_quantize",),
    "swiglu_quantize": ("swiglu_quantize",),
    "qk_norm_rope": ("qk_norm_rope",),
    "launch": ("launch cache", *GEMM, *ROWS),
    "operands": ("output", "accumulator", "swiglu", "launch cache", "refused operands", "operators"),
    "ops": ("operators",),
    "lookup": ("operators",),
}
_OF_ROWS = {"row_primitives", *ROWS}
_OF_BOTH = {"launch", "activations"}
_OF_OPERATORS = {"ops", "lookup"}


def properties_of(file: str) -> tuple[str, ...]:
    """The properties and proofs to try on a fault in `file`, in order. An executor may lack some of them."""
    stem = sources.stem(file)
    unreached: tuple[str, ...] = ()
    if stem in _OF_ROWS:
        unreached = (*GEMM, *GEMM_MORE, *(name for name in ROWS if name not in _LIKELY[stem]))
    elif stem in _OF_OPERATORS:
        unreached = (*GEMM, *GEMM_MORE, *ROWS)
    elif stem not in _OF_BOTH:
        unreached = ROWS
    rows: dict[str, Property | Proof] = {**registry.PROPERTIES, **registry.PROOFS}
    present = [name for name, row in rows.items() if row.level == "default" and name not in unreached]
    likely = [name for name in _LIKELY.get(stem, GEMM) if name in present]
    return tuple(dict.fromkeys((*likely, *present)))


def kernels_of(file: str) -> tuple[Kernel, ...]:
    """The kernels whose configurations run the code of `file`."""
    return sources.FILES[file]
