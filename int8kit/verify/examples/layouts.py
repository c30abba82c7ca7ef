"""Unusual row strides of a matrix, for the GEMM and the row kernels, and a guard against writes into operands.

    expanded      all rows in one place, as `expand` gives: stride 0
    overlapping   a row begins inside the row before it, as in a sliding window
    apart         K = 1, and the stride along K is 2: the one element of a row has no neighbour

A launcher that computes a stride, instead of reading it, passes with every matrix whose rows lie one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

LAYOUTS = ("expanded", "overlapping", "apart")
"""Every layout; the last one needs K = 1."""

_FRONT, _BEHIND = 1024, 2**16  # elements of poison: a faulty stride reads there


def laid_out(plain: torch.Tensor, layout: str, poison: float) -> torch.Tensor:
    """An [m, k] view of that layout, inside a buffer of poison, with the first elements of `plain` [m, k]."""
    m, k = plain.shape
    column = 2 if layout == "apart" else 1
    row = {"expanded": 0, "overlapping": 16 if k > 16 else 1}.get(layout, 4)
    span = (m - 1) * row + (k - 1) * column + 1
    buffer = torch.full((_FRONT + span + _BEHIND,), poison, dtype=plain.dtype, device=plain.device)
    view = buffer.as_strided((m, k), (row, column), _FRONT)
    if layout == "apart":
        return view.copy_(plain)
    buffer[_FRONT : _FRONT + span] = plain.flatten()[:span]
    return view


class Unchanged:
    """The values of operands before a call. Tensors of more than `most` elements are left out."""

    def __init__(self, operands: Iterable[tuple[str, object]], most: int = 2**24) -> None:
        self._kept = [(name, t, t.clone()) for name, t in operands if isinstance(t, torch.Tensor) and t.numel() <= most]

    def written(self) -> str | None:
        """The first operand that has other values now, as text, or None."""
        from int8kit.verify.compare import bitwise_diff

        for name, now, before in self._kept:
            if why := bitwise_diff(now, before):
                return f"the operand {name} was written: {why}"
        return None


def shares_memory(results: Iterable[object], others: Iterable[object]) -> bool:
    """Whether one of the results lies in the storage of one of the others."""
    places = {t.untyped_storage().data_ptr() for t in others if isinstance(t, torch.Tensor) and t.numel()}
    found = [t.untyped_storage().data_ptr() for t in results if isinstance(t, torch.Tensor) and t.numel()]
    return not places.isdisjoint(found)
