"""Format of a shapes file, as pydantic models. Unknown fields are refused. `trace` explains the fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from int8kit.spec import GemmShape

FORMAT = "int8kit.shapes/1"
Whole = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GemmRow(_Row):
    """One matrix product [m, k] @ [k, n], `count` times in a forward pass."""

    m: int
    n: int
    k: int
    count: Whole
    bias: bool
    layers: tuple[str, ...]
    op: str | None = None
    int8: bool | None = None  # quantized by `run`; absent in files of other tracers
    flops: Count | None = None
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None


class JoinedRow(_Row):
    """One GEMM of the fused forward, for linears that read the same input; n: rows of their weights together."""

    m: int
    n: int
    k: int
    count: Whole
    epilogue: Literal["none", "swiglu"]
    layers: tuple[str, ...]


class AttentionRow(_Row):
    """One attention call, `count` times in a forward pass."""

    batch: Whole
    heads: Whole
    queries: Whole
    keys: Whole
    head_dim: Whole
    mask: bool
    count: Whole
    flops: Count


class CaseRow(_Row):
    """One forward pass."""

    height: Whole
    width: Whole
    batch: Whole
    text_tokens: Count
    branch: str
    gemms: tuple[GemmRow, ...]
    joined: tuple[JoinedRow, ...] = ()
    attention: tuple[AttentionRow, ...] = ()
    slots: Count | None = None
    tokens: Count | None = None
    frames: Whole | None = None
    gemm_flops: Count | None = None
    attention_flops: Count | None = None
    model: str | None = None
    source: str | None = None


class ShapesDocument(_Row):
    """A complete file."""

    format: Literal["int8kit.shapes/1"]
    model: str
    cases: tuple[CaseRow, ...]
    text_tokens: Count | None = None
    note: str | None = None


def check(document: ShapesDocument) -> None:
    """Raises ValueError for figures that contradict each other, ShapeError for a GEMM outside the kernels' domain."""
    for number, case in enumerate(document.cases):
        seen = set()
        for row in case.gemms:
            shape = GemmShape(row.m, row.n, row.k)
            if row.flops is not None and row.flops != shape.flops * row.count:
                raise ValueError(f"case {number}, {shape}: {row.flops} FLOPs; expected {shape.flops * row.count}")
            if (key := (row.op, shape, row.bias, row.int8, row.layers)) in seen:
                raise ValueError(f"case {number}, {shape} occurs twice")
            seen.add(key)
        for joined in case.joined:
            GemmShape(joined.m, joined.n, joined.k)
            if joined.epilogue == "swiglu" and joined.n % 2:
                raise ValueError(f"case {number}: swiglu with n = {joined.n}; expected an even number")
        total = sum(2 * row.m * row.n * row.k * row.count for row in case.gemms)
        if case.gemm_flops is not None and case.gemm_flops != total:
            raise ValueError(f"case {number}: {case.gemm_flops} FLOPs in GEMMs; expected {total}")
        attention = sum(row.flops for row in case.attention)
        if case.attention_flops is not None and case.attention_flops != attention:
            raise ValueError(f"case {number}: {case.attention_flops} FLOPs in attention; expected {attention}")
