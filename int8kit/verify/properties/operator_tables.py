"""The cases of the property `operators` that every run tries, for each operator.

    dtypes     each dtype of the matrices with each dtype of the vectors, and each output dtype of a product
    shapes     no row, one row, several images, x of one and of three axes, slices of larger matrices; N = K
    plans      each plan at several M: the candidates' own, between them, and far from them
    values     every kind of data and of scales; K whose sums pass 2**24; many rows, and wide N
    limits     the least and the largest extents that an operator takes
    gradients  each operand that requires a gradient, of an operator that has none
    refusals   each operand of a wrong dtype, shape, stride and device

The kernel half of `linear` and `linear_swiglu` has no case without rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import strategies as st

from int8kit import ops
from int8kit.verify.examples.limits import HEAD_DIMS, K_MAX, K_MAX_HELD
from int8kit.verify.examples.strategies import FLOAT_KINDS, OUT_DTYPES, SCALE_KINDS
from int8kit.verify.properties.operators import PLANS, PRODUCTS, OperatorCase, arguments

_OPTIONAL = {"rms_norm_quantize": (("weight",), ("modulation",), ("weight", "modulation")), "scaled_mm": (("bias",),),
             "scaled_mm_swiglu": (("bias",),), "linear": (("bias",),), "linear_swiglu": (("bias",),)}  # fmt: skip
_TAKEN = (
    *((name, "x", fault) for name in ("linear", "linear_swiglu") for fault in ("stride", "axes", "device")),
    *(("quantize", "x", fault) for fault in ("shape", "device")),
    ("swiglu_quantize", "gu", "device"),
)
"""Operands that are no mistake although another operator refuses them, or that no other operand contradicts."""


def base(operator: str) -> OperatorCase:
    """A small case of an operator."""
    if operator == "qk_norm_rope":
        return OperatorCase(operator, (3, 2), 16, n=3)
    return OperatorCase(operator, (3, 2) if operator not in PRODUCTS else (5,), 40)


def always() -> Iterator[OperatorCase]:
    """All cases."""
    for operator in ops.OPERATORS:
        yield from _dtypes(base(operator))
        yield from _shapes(base(operator))
        yield from _values(base(operator))
        yield from _limits(base(operator))
        yield from _gradients(base(operator))
        yield from refusals(base(operator))
        if operator in PRODUCTS:
            for plan in range(len(PLANS)):
                for m in (5, 33, 70) if operator.startswith("linear") else (5, 16, 24, 33, 70, 300):
                    yield replace(base(operator), rows=(m,), plan=plan)


def _dtypes(c: OperatorCase) -> Iterator[OperatorCase]:
    for dtype in OUT_DTYPES:
        for other in OUT_DTYPES:
            yield replace(c, dtype=dtype, vectors=other)
            if c.operator.startswith("scaled"):
                yield replace(c, out_dtype=dtype, vectors=other)
    for out_dtype in OUT_DTYPES if c.operator.startswith("scaled") else ():
        yield replace(c, out_dtype=out_dtype, left_out=("bias",))


def _values(c: OperatorCase) -> Iterator[OperatorCase]:
    kinds = {"linear": FLOAT_KINDS, "linear_swiglu": FLOAT_KINDS}.get(c.operator, ("nan", "inf", "largest", "tiny"))
    for kind in kinds if not c.operator.startswith("scaled") else ():
        for dtype in OUT_DTYPES if kind in ("nan", "inf", "subnormal", "largest") else (torch.float32,):
            yield replace(c, kind=kind, dtype=dtype)
    if c.operator in PRODUCTS:
        for scales in dict.fromkeys(SCALE_KINDS):
            if scales != "table":
                yield from (replace(c, scales=scales, dtype=dtype, out_dtype=dtype) for dtype in OUT_DTYPES)
        for dtype in (torch.float32, torch.bfloat16):
            wide = replace(c, dtype=dtype, out_dtype=dtype)
            yield replace(wide, rows=(3,), n=4, k=20001, kind="wide")
            yield replace(wide, rows=(3,), n=4, k=9000, scales="signed")
            yield replace(wide, rows=(3,), n=1100, k=16)
            if c.operator.startswith("scaled"):
                yield replace(wide, rows=(1100,), n=16, k=16)
        if c.operator == "linear":
            yield replace(c, rows=(1100,), n=16, k=16)
    elif c.operator != "qk_norm_rope":
        yield from (replace(c, k=k, rows=(3, 1)) for k in (1, 5000))


def _limits(c: OperatorCase) -> Iterator[OperatorCase]:
    """The extents next to the ones that `refusals` has; vectors of one element, whose stride means nothing."""
    one = replace(c, rows=(1,), dtype=torch.bfloat16)
    if c.operator in PRODUCTS:
        n = 2 if c.operator.endswith("swiglu") else 1
        yield from (replace(one, n=n, k=1), replace(one, n=n, contiguous=False))
        if c.operator == "linear":
            yield replace(one, n=n, k=K_MAX)
    elif c.operator == "qk_norm_rope":
        yield from (replace(one, n=1, k=k) for k in HEAD_DIMS)
        yield replace(one, n=128)
    else:
        yield replace(one, rows=(2, 1), k=K_MAX_HELD, contiguous=False)
        if c.operator == "quantize":
            yield replace(one, k=K_MAX_HELD + 1)


def _gradients(c: OperatorCase) -> Iterator[OperatorCase]:
    if not c.operator.startswith("linear"):
        for name, value in arguments(c, "cpu").items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                yield replace(c, requires_grad=name)


def _shapes(c: OperatorCase) -> Iterator[OperatorCase]:
    linear = c.operator.startswith("linear")
    yield replace(c, rows=(1,))
    yield replace(c, contiguous=False)
    yield replace(c, contiguous=False, dtype=torch.float16, vectors=torch.bfloat16)
    if c.operator not in ("qk_norm_rope", "swiglu_quantize"):
        yield replace(c, k=1, contiguous=False)
    yield replace(c, rows=(7,), eps=1e-3)
    yield replace(c, rows=(2, 1))
    yield replace(c, rows=(1, 4))
    for left_out in _OPTIONAL.get(c.operator, ()):
        yield replace(c, left_out=left_out)
    if c.operator == "quantize":
        yield replace(c, k=0)
    if linear:
        for rows in ((), (2, 3), (2, 3, 2)):
            for dtype in (torch.float32, torch.bfloat16):
                yield replace(c, rows=rows, dtype=dtype)
        yield replace(c, rows=(4, 3), contiguous=False)
        yield replace(c, rows=(2, 3, 2), contiguous=False)
        yield replace(c, rows=(4, 3), contiguous=False, dtype=torch.bfloat16)
        for rows in ((4, 3), (2, 3, 2)):  # an output of x's shape must not take its layout
            square = replace(c, rows=rows, n=c.k * (2 if c.operator.endswith("swiglu") else 1))
            yield from (square, replace(square, contiguous=False))
        for empty in ((0,), (2, 0), (0, 3)):
            yield replace(c, rows=empty)
    else:
        yield replace(c, rows=(0,))
        yield replace(c, rows=(0,), left_out=_OPTIONAL.get(c.operator, ((),))[-1], dtype=torch.bfloat16)


def refusals(c: OperatorCase) -> Iterator[OperatorCase]:
    """Each operand wrong in each way in which it can be."""
    for name, value in arguments(c, "cpu").items():
        if isinstance(value, torch.Tensor):
            for fault in ("dtype", "shape", "axes", "stride", "device"):
                if (c.operator, name, fault) not in _TAKEN:
                    yield replace(c, wrong=name, fault=fault)
            if value.is_floating_point():
                yield replace(c, wrong=name, fault="float64")
        if name in ("gate", "modulation", "cos", "sin"):
            yield replace(c, wrong=name, fault="images")
            if c.operator != "rms_norm_quantize":
                yield replace(c, wrong=name, fault="one row")
        if name == "heads":
            yield replace(c, wrong=name, fault="zero")
    if c.operator.startswith("scaled"):
        yield from (replace(c, wrong="out_dtype", fault=fault) for fault in ("dtype", "float64"))
    if c.operator in PRODUCTS:
        yield replace(c, rows=(1,), k=K_MAX + 1, wrong="wq", fault="largest k")
    if c.operator.endswith("swiglu"):
        yield replace(c, n=23, wrong="wq", fault="odd n")
    if c.operator == "qk_norm_rope":
        yield replace(c, wrong="heads", fault="shape")
        yield from (replace(c, k=k, wrong="qkv", fault="width") for k in (8, 24, 512))
    elif c.operator not in (*PRODUCTS, "quantize"):
        first = next(iter(arguments(c, "cpu")))
        yield from (replace(c, k=k, wrong=first, fault="width") for k in (0, K_MAX_HELD + 1))


def examples() -> st.SearchStrategy[OperatorCase]:
    """Strategy for cases of every operator."""
    one = st.builds(
        OperatorCase,
        operator=st.sampled_from(tuple(ops.OPERATORS)),
        rows=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
        k=st.sampled_from((1, 17, 40, 64)),
        n=st.sampled_from((2, 16, 24, 40, 64, 80)),
        dtype=st.sampled_from(OUT_DTYPES),
        vectors=st.sampled_from(OUT_DTYPES),
        out_dtype=st.sampled_from(OUT_DTYPES),
        contiguous=st.booleans(),
        kind=st.sampled_from(FLOAT_KINDS),
        scales=st.sampled_from(tuple(kind for kind in SCALE_KINDS if kind != "table")),
        plan=st.integers(0, len(PLANS) - 1),
    )
    return one.map(lambda c: replace(c, k=32) if c.operator == "qk_norm_rope" else c)
