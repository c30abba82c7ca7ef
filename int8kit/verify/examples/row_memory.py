"""Memory of the row kernels' examples: operands inside poison, outputs inside sentinels, and a choice of rows.

    operand   [m, k] in a buffer of NaN, `padding` elements between rows, at `offset` elements   a read outside shows
    output    that a kernel allocates itself, in a buffer of sentinels          a write outside shows, and a missing one

Triton's interpreter takes milliseconds for a row. Of many rows it executes `picked` ones, where a row number, an image
or an offset may pass a limit. The other rows keep their sentinels, and nobody compares them. A GPU executes all rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest import mock

import torch

from int8kit.kernels.launch import interpreted
from int8kit.kernels.row_primitives import CHUNKS
from int8kit.verify.examples.guarded_buffers import PATIENCE_S, SENTINEL

LEAD = 64  # elements before the first row: addresses stay multiples of 16
TAIL = 2 * CHUNKS[-1]  # elements after the last row: a whole chunk of any row kernel
MANY_ROWS = 200  # beyond it the interpreter executes picked rows
LARGE = 2**27  # elements; a larger operand is one row, repeated, and a larger output is compared at picked rows
_LIMITS = (1, 255, 256, 4095, 4096, 4097, 32767, 32768, 65535, 65536)
_EMPTY = torch.empty


def placed(plain: torch.Tensor, padding: int, offset: int) -> torch.Tensor:
    """A copy of `plain` ([k] or [m, k]) as a view into a buffer of NaN."""
    m, k = plain.shape if plain.dim() == 2 else (1, len(plain))
    size = LEAD + offset + (m - 1) * (k + padding) + k + TAIL
    buffer = torch.full((size,), torch.nan, dtype=plain.dtype, device=plain.device)
    view = buffer.as_strided((m, k), (k + padding, 1), LEAD + offset)
    return view.copy_(plain) if plain.dim() == 2 else view[0].copy_(plain)


def picked(rows: int, elements: int) -> list[int] | None:
    """The rows that are compared, of outputs with so many elements; None for all rows."""
    if elements <= LARGE and not (interpreted() and rows > MANY_ROWS):
        return None
    return sorted({0, rows // 2 + 1, rows - 2, rows - 1, *(row for row in _LIMITS if row < rows)})


@contextmanager
def only_rows(rows: list[int] | None) -> Iterator[None]:
    """A context in which Triton's interpreter executes these rows only, of a grid with more than MANY_ROWS rows.

    The interpreter walks a grid with `range`, a name that its module does not define.
    """
    if rows is None or not interpreted():
        yield
        return
    from triton.runtime import interpreter

    def few(*limits: Any) -> Any:
        full = range(*limits)
        return full if len(full) <= MANY_ROWS else [row for row in rows if row in full]

    interpreter.range = few
    try:
        yield
    finally:
        del interpreter.range


def _wait_for_memory(size: int) -> None:
    """Wait up to PATIENCE_S until the GPU has `size` bytes, which other processes may hold."""
    torch.cuda.empty_cache()
    end = time.monotonic() + PATIENCE_S
    while torch.cuda.mem_get_info()[0] < size and time.monotonic() < end:
        time.sleep(0.1)


class GuardedAllocations:
    """Replaces `torch.empty` in a context: each tensor lies in a buffer of sentinels, and holds sentinels itself.

    rows: the rows of a matrix on the CPU that get sentinels, if it is LARGE. So the other pages stay untouched.
    """

    def __init__(self, rows: list[int] | None) -> None:
        self.rows = rows
        self.guards: list[torch.Tensor] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """The context."""
        with mock.patch.object(torch, "empty", self._empty):
            yield

    def written_outside(self) -> str | None:
        """The number of elements outside the tensors that were written, as text; None if there are none."""
        count = sum(int((guard != SENTINEL).sum()) for guard in self.guards)
        return f"{count} elements outside the output were written" if count else None

    def _empty(self, *size: Any, dtype: torch.dtype | None = None, device: Any = None, **more: Any) -> torch.Tensor:
        if dtype is None or more:  # no output of a row kernel
            return _EMPTY(*size, dtype=dtype, device=device, **more)
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        count = prod(shape)
        if count > LARGE and torch.device(device or "cpu").type == "cuda":
            _wait_for_memory(2 * count * dtype.itemsize)
        buffer = _EMPTY(LEAD + count + TAIL, dtype=dtype, device=device)
        view = buffer[LEAD : LEAD + count].view(shape)
        if count <= LARGE or self.rows is None or buffer.is_cuda:
            buffer.fill_(SENTINEL)
        else:
            view[self.rows] = SENTINEL
            buffer[:LEAD], buffer[LEAD + count :] = SENTINEL, SENTINEL
        self.guards += [buffer[:LEAD], buffer[LEAD + count :]]
        return view
