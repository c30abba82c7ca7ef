"""Unusual row strides of a matrix, for the GEMM and the row kernels.

    expanded      all rows in one place, as `expand` gives: stride 0
    overlapping   a row begins inside the row before it, as in a sliding window
    loose         one element between rows, so that the stride is odd beside an even K
    apart         K = 1, and the stride along K is 2: the one element of a row has no neighbour

A launcher that computes a stride, instead of reading it, passes with every matrix whose rows lie one behind the other.
"""

from __future__ import annotations

import torch

LAYOUTS = ("expanded", "overlapping", "apart")
"""The layouts of most properties; the last one needs K = 1."""

_FRONT, _BEHIND = 1024, 2**16  # elements of poison: a faulty stride reads there


def laid_out(plain: torch.Tensor, layout: str, poison: float) -> torch.Tensor:
    """An [m, k] view of that layout, inside a buffer of poison, with the first elements of `plain` [m, k]."""
    m, k = plain.shape
    column = 2 if layout == "apart" else 1
    row = {"expanded": 0, "overlapping": 16 if k > 16 else 1, "loose": k + 1}.get(layout, 4)
    span = (m - 1) * row + (k - 1) * column + 1
    buffer = torch.full((_FRONT + span + _BEHIND,), poison, dtype=plain.dtype, device=plain.device)
    view = buffer.as_strided((m, k), (row, column), _FRONT)
    if layout in ("apart", "loose"):
        return view.copy_(plain)
    buffer[_FRONT : _FRONT + span] = plain.flatten()[:span]
    return view
