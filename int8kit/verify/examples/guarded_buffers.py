"""Operands and outputs inside larger buffers, so that a read or a write outside [M, N] shows.

    operand  [m, k] at the corner of a buffer of poison     a read past a tail changes a sum, or makes a scale NaN
    output   [m, n] at the corner of a buffer of sentinels  no sentinel may change

`padding` elements lie between two rows, and `guard` rows follow the last row. A faulty tile reaches only them, so the
fault shows and harms nothing. Filling with zeros was rejected: a read too far would change no sum.

A matrix with a huge stride has rows HUGE_STRIDE elements apart. Its third row starts beyond 2**31 elements, so 32-bit
offsets leave the matrix. No guard surrounds it. On a CPU nothing touches the pages between its rows, so 2 GiB cost
nothing.
"""

from __future__ import annotations

import time

import torch

from int8kit.kernels.row_primitives import CHUNKS
from int8kit.spec import DOMAINS

POISON = 113  # in int8 buffers; float buffers hold NaN
SENTINEL = 77  # in every element of a fresh output buffer
HUGE_STRIDE = 2**30 + 16
PATIENCE_S = 60.0  # time to wait until other processes free their matrices of this kind
HUGE_STRIDE_BYTES = 3 * HUGE_STRIDE * torch.float16.itemsize  # GPU memory of the largest such matrix, an output


def tile_guard(width: int) -> int:
    """Number of rows of `width` elements that hold a whole tile of a GEMM past the last element."""
    tile = max(max(*domain.block_m, *domain.block_n) for domain in DOMAINS.values())
    return tile + tile // width + 1


def chunk_guard(width: int) -> int:
    """Number of rows of `width` elements that hold a whole chunk of a row kernel past the last element."""
    return CHUNKS[-1] // width + 2


def in_poison(matrix: torch.Tensor, padding: int, guard: int) -> torch.Tensor:
    """A copy of `matrix` [m, k] as a view into a buffer of poison, [m + guard, k + padding]."""
    m, k = matrix.shape
    poison = torch.nan if matrix.is_floating_point() else POISON
    view = torch.full((m + guard, k + padding), poison, dtype=matrix.dtype, device=matrix.device)[:m, :k]
    return view.copy_(matrix)


def huge_stride_matrix(m: int, n: int, dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
    """An uninitialized [m, n] matrix whose rows are HUGE_STRIDE elements apart.

    On a GPU it waits up to PATIENCE_S for memory that other processes hold.
    """
    size, end = (m - 1) * HUGE_STRIDE + n, time.monotonic() + PATIENCE_S
    torch.cuda.empty_cache()  # frees the matrix of the previous example; no effect without a GPU
    while torch.device(device).type == "cuda" and time.monotonic() < end:
        if torch.cuda.mem_get_info()[0] > size * dtype.itemsize:
            break
        time.sleep(0.1)
    return torch.empty(size, dtype=dtype, device=device).as_strided((m, n), (HUGE_STRIDE, 1))


class GuardedOutput:
    """An output `view` [m, n] inside a buffer of sentinels, [m + guard, n + padding]."""

    def __init__(self, m: int, n: int, padding: int, guard: int, dtype: torch.dtype, device: str) -> None:
        self.buffer = torch.full((m + guard, n + padding), SENTINEL, dtype=dtype, device=device)
        self.view = self.buffer[:m, :n]

    def written_outside(self) -> str | None:
        """The number of elements outside the view that were written, as text; None if there are none."""
        m, n = self.view.shape
        outside = int((self.buffer[m:] != SENTINEL).sum()) + int((self.buffer[:m, n:] != SENTINEL).sum())
        return f"{outside} elements outside [M, N] were written" if outside else None
