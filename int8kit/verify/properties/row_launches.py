"""The property `row launches`: a compiled row kernel is never launched for an example that needs other code.

The launcher stores compiled kernels by a key (`kernels.launch`). A key that lacks a value gives an example the kernel
of another one. So two examples that differ in one thing run one after the other, in both orders, each time from an
empty store. Each field of `RowExample` is changed by a function of CHANGES, so that no field is forgotten. Triton's
interpreter keeps no kernel. There `launch_keys` says which kernel each launch would run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from int8kit.kernels import launch
from int8kit.kernels.qk_norm_rope import HeadTile, default_tile
from int8kit.kernels.row_primitives import K_MAX_HELD, RowTile
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation
from int8kit.verify.properties import row_kernels
from int8kit.verify.properties.launch_keys import observed_launches
from int8kit.verify.properties.launch_store import stored_kernels
from int8kit.verify.properties.row_kernels import KERNELS, OPERANDS, PER_IMAGE, TABLES, VECTORS, RowExample


@dataclass(frozen=True)
class LaunchPair:
    """Two examples of one kernel that run in one process."""

    first: RowExample
    second: RowExample

    def __str__(self) -> str:
        return f"{self.first}; then {self.second}"


def base(kernel: str) -> RowExample:
    """An example whose addresses and strides are multiples of 16, so that its kernel is stored."""
    bf16, heads = torch.bfloat16, kernel == "qk_norm_rope"
    k, count, tile = (64, 4, HeadTile(2, 2, 1)) if heads else (512, 1, RowTile(256, 1))
    return RowExample(
        kernel, 2, 2, k, "normal", 1, bf16, bf16, padding=16, heads=count, tile=tile, offset=8,
        given_out=kernel == "quantize",
    )  # fmt: skip


def _changed(e: RowExample, field: str, value: Any) -> RowExample:
    change: dict[str, Any] = {field: value}
    return replace(e, **change)


def _of_each(field: str) -> Callable[[RowExample], Iterable[RowExample]]:
    """Examples in which `field` names one operand after the other."""
    return lambda e: (_changed(e, field, name) for name in OPERANDS[e.kernel])


def _values(field: str, *values: Any, only: str = "") -> Callable[[RowExample], Iterable[RowExample]]:
    return lambda e: (_changed(e, field, value) for value in values if only in ("", e.kernel))


def _tiles(e: RowExample) -> Iterator[RowExample]:
    heads = (HeadTile(1, 2, 1), HeadTile(2, 1, 1), HeadTile(2, 2, 4))
    for tile in heads if e.kernel == "qk_norm_rope" else (RowTile(512, 1), RowTile(256, 4)):
        yield replace(e, tile=tile)


def _widths(e: RowExample) -> Iterator[RowExample]:
    yield replace(e, k=128 if e.kernel == "qk_norm_rope" else 528)
    if e.kernel != "qk_norm_rope":
        yield replace(e, k=300)  # rows that lie at no multiple of 16
    if e.kernel == "quantize":
        yield from (replace(e, k=k) for k in (K_MAX_HELD, K_MAX_HELD + 512))


def _huge(e: RowExample) -> Iterator[RowExample]:
    """Strides that need 64 bits, on which Triton specializes a kernel too. The last row is the third."""
    for name in OPERANDS[e.kernel]:
        if name not in VECTORS:
            images, rows = (3, 1) if name in PER_IMAGE else (1, 3)
            yield replace(e, huge_stride=name, images=images, rows=rows)


UNCHANGED = ("kernel", "refused")  # a refused example launches nothing; padding changes the strides
CHANGES: dict[str, Callable[[RowExample], Iterable[RowExample]]] = {
    "images": _values("images", 1, 3, 7),
    "rows": _values("rows", 1, 16, 17),
    "k": _widths,
    "dtype": _values("dtype", torch.float16, torch.float32),
    "vectors": _values("vectors", torch.float16, torch.float32),
    "padding": _values("padding", 0, 3),
    "heads": _values("heads", 3, 5, only="qk_norm_rope"),
    "left_out": _values("left_out", ("weight",), ("modulation",), ("weight", "modulation"), only="rms_norm_quantize"),
    "eps": _values("eps", 1.0, 0.0),
    "tile": _tiles,
    "offset": _values("offset", 1),
    "other_dtype": _of_each("other_dtype"),
    "unaligned": _of_each("unaligned"),
    "huge_stride": _huge,
    "layout": lambda e: (replace(e, layout=f"loose {n}") for n in OPERANDS[e.kernel] if n not in VECTORS),
    "special": lambda e: (replace(e, special=n) for n in OPERANDS[e.kernel] if n in (*VECTORS, *PER_IMAGE, *TABLES)),
    "given_out": _values("given_out", False, only="quantize"),
    "kind": _values("kind", "subnormal", "huge"),
    "seed": _values("seed", 2),
}
"""The changed examples, by the field that changes. A change of data shows a launch with stale arguments."""


def pairs(*, huge_strides: bool) -> Iterator[LaunchPair]:
    """Each base example beside each changed example."""
    for kernel in KERNELS:
        for field, changed in CHANGES.items():
            if huge_strides or field != "huge_stride":
                yield from (LaunchPair(base(kernel), other) for other in changed(base(kernel)))


def examples() -> st.SearchStrategy[LaunchPair]:
    """Strategy for pairs whose two examples have one kernel and differ in anything."""
    one = st.sampled_from(tuple(KERNELS)).flatmap(
        lambda kernel: st.tuples(row_kernels.examples(kernel, 600), row_kernels.examples(kernel, 600))
    )
    return one.map(lambda two: LaunchPair(*two))


def check(pair: LaunchPair, on: Executor | Implementation) -> str | None:
    """How an example of the pair differs from the reference after the other one, or is launched wrongly; or None."""
    if on.device == "cpu":
        first, second = pair.first, pair.second
        return keys((first, second, first)) or keys((second, first, second))
    return executed(pair, on)


def executed(pair: LaunchPair, on: Executor | Implementation) -> str | None:
    """As `check`, by the bits of each launch."""
    for order in ((pair.first, pair.second, pair.first), (pair.second, pair.first, pair.second)):
        launch._COMPILED.clear()
        for number, one in enumerate(order):
            with stored_kernels() as launched:
                if why := row_kernels.check(one, on):
                    return f"launch {number + 1}, {one}: {why}"
            if why := launched.differs(aligned=one == base(one.kernel), again=number == 2):
                return f"launch {number + 1}, {one}: {why}"
            if wrong := [grid for grid in launched.grids if grid[:2] != (one.m, _programs(one))]:
                return f"launch {number + 1}, {one}: a grid of {wrong[0]}, expected {one.m}, {_programs(one)}"
            if other := {key[0].__name__ for key in launched.added} - {_function(one)}:
                return f"launch {number + 1}, {one}: {min(other)} was launched, expected {_function(one)}"
    return None


def keys(order: tuple[RowExample, ...]) -> str | None:
    """How a launch would run the kernel of another one, or would not find its own again; or None.

    Nothing is executed.
    """
    with observed_launches() as seen:
        for number, one in enumerate(order):
            compiled = seen.compiled
            more: dict[str, Any] = {} if one.tile is None else {"tile": one.tile}
            given = row_kernels._Given(one, "cpu") if one.given_out else None
            more |= {} if given is None else {"out": given.out}
            KERNELS[one.kernel](*row_kernels.operands(one, "cpu"), **more)
            if seen.launches != number + 1:
                return f"launch {number + 1}, {one}: {seen.launches - number} launches, expected 1"
            if seen.problems:
                return f"launch {number + 1}, {one}: {seen.problems[0]}"
            if number == 2 and one == base(one.kernel) and seen.compiled > compiled:
                return f"launch {number + 1}, {one}: the stored kernel is not found"
    return None


def _programs(e: RowExample) -> int:
    """Programs that share a row of `e`."""
    if e.kernel != "qk_norm_rope":
        return 1
    tile = e.tile or default_tile(e.heads, e.k)
    assert isinstance(tile, HeadTile)
    return -(-e.heads // (tile.heads * tile.tiles))


def _function(e: RowExample) -> str:
    """The name of the Triton function that serves `e`."""
    return "_quantize_long" if e.kernel == "quantize" and e.k > K_MAX_HELD else f"_{e.kernel}"
