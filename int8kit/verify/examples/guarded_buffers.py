"""Where the checks put operands and outputs: inside larger buffers, so that whatever lies beside them shows.

    operand  [m, k] at the corner of a buffer of poison     a read past a tail changes a sum, or makes a scale NaN
    output   [m, n] at the corner of a buffer of sentinels  of which none may change

Rows are `padding` elements further apart than they need be, and `guard` rows follow the last: what a faulty tile
reaches, so that the fault shows and harms nothing. Filling with zeros was rejected: a read too far then changes no sum.

A matrix that is far has rows FAR elements apart, so that its third lies beyond 2**31: 32-bit offsets leave it. Nothing
surrounds it, and on a CPU nobody touches the pages in between: 2 GiB that cost nothing.
"""

from __future__ import annotations

import time

import torch

from int8kit.kernels.row_primitives import CHUNKS
from int8kit.spec import DOMAINS

POISON = 113  # int8 beyond an operand; float operands have NaN there
SENTINEL = 77  # in every element of a fresh output buffer
FAR = 2**30 + 16
PATIENCE_S = 60.0  # how long a far matrix waits for other processes to free theirs
FAR_ROOM = 3 * FAR * torch.float16.itemsize  # bytes free on a card that the largest far matrix, an output, needs


def tile_guard(width: int) -> int:
    """Rows of `width` elements that hold a whole tile of a GEMM past the last element."""
    tile = max(max(*domain.block_m, *domain.block_n) for domain in DOMAINS.values())
    return tile + tile // width + 1


def chunk_guard(width: int) -> int:
    """Rows of `width` elements that hold a whole chunk of a kernel over rows past the last element."""
    return CHUNKS[-1] // width + 2


def padded(matrix: torch.Tensor, padding: int, guard: int) -> torch.Tensor:
    """`matrix` [m, k] as a view into a buffer of poison, [m + guard, k + padding]."""
    m, k = matrix.shape
    poison = torch.nan if matrix.is_floating_point() else POISON
    view = torch.full((m + guard, k + padding), poison, dtype=matrix.dtype, device=matrix.device)[:m, :k]
    return view.copy_(matrix)


def far(m: int, n: int, dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
    """An uninitialized [m, n] whose rows are FAR elements apart; on a card, once other processes leave room."""
    size, end = (m - 1) * FAR + n, time.monotonic() + PATIENCE_S
    torch.cuda.empty_cache()  # of the one before; nothing without a card
    while torch.device(device).type == "cuda" and time.monotonic() < end:
        if torch.cuda.mem_get_info()[0] > size * dtype.itemsize:
            break
        time.sleep(0.1)
    return torch.empty(size, dtype=dtype, device=device).as_strided((m, n), (FAR, 1))


class Canvas:
    """An output [m, n], `view`, inside a buffer of sentinels, [m + guard, n + padding]."""

    def __init__(self, m: int, n: int, padding: int, guard: int, dtype: torch.dtype, device: str) -> None:
        self.buffer = torch.full((m + guard, n + padding), SENTINEL, dtype=dtype, device=device)
        self.view = self.buffer[:m, :n]

    def touched(self) -> str | None:
        """How many elements outside the view were written, if any."""
        m, n = self.view.shape
        outside = int((self.buffer[m:] != SENTINEL).sum()) + int((self.buffer[:m, n:] != SENTINEL).sum())
        return f"{outside} elements outside [M, N] were written" if outside else None
