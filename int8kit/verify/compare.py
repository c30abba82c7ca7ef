"""Operands of a GEMM example at their places in memory, bitwise comparison, and a guard against writes to operands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from int8kit import reference
from int8kit.spec import Kernel
from int8kit.verify.examples import epilogue_table
from int8kit.verify.examples.guarded_buffers import (
    HUGE_STRIDE,
    POISON,
    SENTINEL,
    GuardedOutput,
    huge_stride_matrix,
    in_poison,
    tile_guard,
    vector_in_poison,
)
from int8kit.verify.examples.layouts import laid_out
from int8kit.verify.examples.strategies import Draw, int8_matrix, scales

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""x [M, K] int8, w [N, K] int8, sx [M] fp32, sw [N] fp32, and the bias [N] or None."""

MATRICES = ("x", "w", "out")
VECTORS = ("sx", "sw", "bias")
_FRONT = 512  # elements before the first one of a vector: two tiles


def bitwise_diff(got: torch.Tensor, want: torch.Tensor) -> str | None:
    """None if two tensors are bit-equal, where any NaN equals any NaN; else the number of differences and the first."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[want.element_size()]
    wrong = got.view(bits) != want.view(bits)
    if want.is_floating_point():
        wrong &= ~(got.isnan() & want.isnan())
    count = int(wrong.sum())
    if not count:
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    place = ", ".join(map(str, first))
    return f"{count} of {want.numel()} differ, first [{place}]: got {got[first].item()!r}, want {want[first].item()!r}"


def columns(d: Draw) -> int:
    """The number of columns of the result of `d`."""
    return d.shape.n // 2 if d.variant == "swiglu" else d.shape.n


def out_dtype(d: Draw) -> torch.dtype:
    """The dtype of the result of `d`."""
    return torch.int32 if d.variant == "int32" else d.out_dtype


def strides(d: Draw) -> dict[str, int]:
    """The row strides of x, w and out. With padding, they differ from each other, from K and from N.

    A padding of a multiple of 16 gives strides of multiples of 16, as the Gluon kernels need for x and w, and the wgmma
    kernel for out. The mma_sync kernel takes any `out`: with an odd shift it gets another stride.
    """
    taken, found = {d.shape.k, d.shape.n, columns(d)}, {}
    for times, name in enumerate(MATRICES, 1):
        width = columns(d) if name == "out" else d.shape.k
        padding, align = times * d.padding, 1 if d.padding % 16 or not d.padding else 16
        if name == "out" and _any_out(d):
            padding, align = d.padding and 3, 1
        if name == "out" and d.config.kernel is Kernel.WGMMA:
            align = 16
        stride = _up(width + padding, align)
        while padding and stride in taken:
            stride += align
        taken.add(stride)
        found[name] = stride
    return found


def _any_out(d: Draw) -> bool:
    return d.config.kernel is Kernel.MMA_SYNC and d.shift % 2 == 1


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def fronts(d: Draw) -> dict[str, int]:
    """The number of poisoned elements before each operand: a row or more, and its own step past a multiple of 16."""
    found = {name: _up(stride, 16) + i * d.offset for i, (name, stride) in enumerate(strides(d).items(), 1)}
    if _any_out(d):
        found["out"] += 1
    return found | {name: _FRONT + i * (16 + d.shift) for i, name in enumerate(VECTORS, 1)}


def place(d: Draw, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the operand `name` of `d`, at its place in a buffer of poison. It may have more rows than in `d`."""
    if name in VECTORS:
        return vector_in_poison(tensor, fronts(d)[name])
    if d.huge_stride == name:
        rows, width = tensor.shape
        empty = huge_stride_matrix(rows, width, tensor.dtype, tensor.device, huge_stride(d, name))
        return empty.copy_(tensor)
    tile = max(d.config.block_m, d.config.block_n)
    stride = strides(d)[name]
    return in_poison(tensor, stride - tensor.shape[1], tile_guard(stride, tile), fronts(d)[name])


def huge_stride(d: Draw, name: str) -> int:
    """The stride of a matrix in which an offset of a tile passes 2**31 elements."""
    if d.config.kernel is Kernel.MMA_SYNC and name != "out":
        return 2**23 - 16  # the largest that it takes
    return HUGE_STRIDE


def operands(d: Draw, device: str) -> Operands:
    """The operands of the example `d`, each at its own place in a buffer of poison."""
    m, n, k = d.shape.m, d.shape.n, d.shape.k
    x = int8_matrix(m, k, d.kind, d.seed, device)
    if d.scales == "nan":
        x[::3] = 0  # as `quantize` leaves a row with a NaN: 0 * NaN is NaN, not the bias
    if d.kind == "table":
        w = epilogue_table.w_rows(n, k, d.seed + 100, device)
    else:
        w = int8_matrix(n, k, d.kind, d.seed + 100, device)
    if d.scales == "table":
        sx = epilogue_table.row_scales(m, d.seed, device)
        sw = epilogue_table.column_scales(n, d.seed + 7, device)
    else:
        sx, sw = scales(m, d.scales, d.seed, device), scales(n, d.scales, d.seed + 7, device)
    return (
        _matrix(d, "x", x), _matrix(d, "w", w), place(d, "sx", sx), place(d, "sw", sw),
        None if d.bias is None else place(d, "bias", _bias(d, d.bias, device)),
    )  # fmt: skip


def _matrix(d: Draw, name: str, matrix: torch.Tensor) -> torch.Tensor:
    """x or w at its place, or in the layout that `d` names for it."""
    layout, _, of = d.layout.partition(" ")
    return laid_out(matrix, layout, POISON) if of == name else place(d, name, matrix)


def _bias(d: Draw, dtype: torch.dtype, device: str) -> torch.Tensor:
    if d.scales == "table":
        return epilogue_table.bias(d.shape.n, dtype, d.seed, device)
    g = torch.Generator(device).manual_seed(d.seed)
    return torch.randn(d.shape.n, generator=g, device=device).to(dtype)


@contextmanager
def another_default_dtype() -> Iterator[None]:
    """A context in which torch allocates float64 where no dtype is named, as in a process that has changed it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Output:
    """The place of a result of `d` with `m` rows: `view` in a buffer of sentinels."""

    def __init__(self, d: Draw, m: int, device: str) -> None:
        n, dtype = columns(d), out_dtype(d)
        self._guarded: GuardedOutput | None = None
        if d.huge_stride == "out":
            self.view = huge_stride_matrix(m, n, dtype, device, huge_stride(d, "out")).fill_(SENTINEL)
            return
        stride = strides(d)["out"]
        guard = tile_guard(stride, max(d.config.block_m, d.config.block_n))
        self._guarded = GuardedOutput(m, n, stride - n, guard, dtype, device, fronts(d)["out"])
        self.view = self._guarded.view

    def written_outside(self) -> str | None:
        """The number of elements outside the view that were written, as text; None if there are none."""
        return self._guarded.written_outside() if self._guarded else None


def expected(
    d: Draw, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The reference's result for the variant of `d`."""
    if d.variant == "int32":
        return reference.accumulate(x, w)
    product = reference.scaled_mm_swiglu if d.variant == "swiglu" else reference.scaled_mm
    return product(x, w, sx, sw, bias, out_dtype=d.out_dtype)


class Unchanged:
    """The values of operands before a call. Tensors of more than `most` elements are left out."""

    def __init__(self, operands: Iterable[tuple[str, object]], most: int = 2**24) -> None:
        self._kept = [(name, t, t.clone()) for name, t in operands if isinstance(t, torch.Tensor) and t.numel() <= most]

    def written(self) -> str | None:
        """The first operand that has other values now, as text, or None."""
        for name, now, before in self._kept:
            if why := bitwise_diff(now, before):
                return f"the operand {name} was written: {why}"
        return None


def shares_memory(results: Iterable[object], others: Iterable[object]) -> bool:
    """Whether one of the results lies in the storage of one of the others."""
    places = {t.untyped_storage().data_ptr() for t in others if isinstance(t, torch.Tensor) and t.numel()}
    found = [t.untyped_storage().data_ptr() for t in results if isinstance(t, torch.Tensor) and t.numel()]
    return not places.isdisjoint(found)
