"""Operands and outputs inside larger buffers, so that a read or a write outside [M, N] shows.

    matrix   [m, n] inside a buffer of poison           a read past a tail changes a sum, or makes a scale NaN
    vector   a slice of a longer vector of poison       a scale or a bias of another column shows
    output   [m, n] inside a buffer of sentinels        no sentinel may change

`padding` elements lie between two rows. `front` elements lie before the first row, and `guard` rows follow the last
row. A faulty tile reaches only them, so the fault shows and harms nothing. `front` also moves the address, which need
not be a multiple of 16. Filling with zeros was rejected: a read too far would change no sum.

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
HUGE_STRIDE_BYTES = 2 * HUGE_STRIDE * torch.float32.itemsize + 2**20  # GPU memory of the largest such matrix
_TILE = max(max(*domain.block_m, *domain.block_n) for domain in DOMAINS.values())


def tile_guard(width: int, tile: int = _TILE) -> int:
    """Number of rows of `width` elements that hold a whole tile of a GEMM past the last element."""
    return tile + tile // width + 1


def chunk_guard(width: int) -> int:
    """Number of rows of `width` elements that hold a whole chunk of a row kernel past the last element."""
    return CHUNKS[-1] // width + 2


def in_poison(matrix: torch.Tensor, padding: int, guard: int, front: int = 0) -> torch.Tensor:
    """A copy of `matrix` [m, k] as a view into a buffer of poison, of m + guard rows of k + padding elements."""
    m, k = matrix.shape
    poison = torch.nan if matrix.is_floating_point() else POISON
    size = front + (m + guard) * (k + padding)
    buffer = torch.full((size,), poison, dtype=matrix.dtype, device=matrix.device)
    return buffer.as_strided((m, k), (k + padding, 1), front).copy_(matrix)


def vector_in_poison(vector: torch.Tensor, front: int) -> torch.Tensor:
    """A copy of `vector` as a slice of a longer vector of NaN, `front` elements past its start."""
    return in_poison(vector[None], 0, -(-_TILE // len(vector)), front)[0]


def huge_stride_matrix(
    m: int, n: int, dtype: torch.dtype, device: str | torch.device, stride: int = HUGE_STRIDE
) -> torch.Tensor:
    """An uninitialized [m, n] matrix whose rows are `stride` elements apart.

    On a GPU it waits up to PATIENCE_S for memory that other processes hold.
    """
    size, end = (m - 1) * stride + n, time.monotonic() + PATIENCE_S
    torch.cuda.empty_cache()  # frees the matrix of the previous example; no effect without a GPU
    while torch.device(device).type == "cuda" and time.monotonic() < end:
        if torch.cuda.mem_get_info()[0] > size * dtype.itemsize:
            break
        time.sleep(0.1)
    return torch.empty(size, dtype=dtype, device=device).as_strided((m, n), (stride, 1))


class GuardedOutput:
    """An output `view` [m, n] inside a buffer of sentinels, of m + guard rows of n + padding elements."""

    def __init__(
        self, m: int, n: int, padding: int, guard: int, dtype: torch.dtype, device: str, front: int = 0
    ) -> None:
        size = front + (m + guard) * (n + padding)
        self.buffer = torch.full((size,), SENTINEL, dtype=dtype, device=device)
        self.view = self.buffer.as_strided((m, n), (n + padding, 1), front)

    def written_outside(self) -> str | None:
        """The number of elements outside the view that were written, as text; None if there are none."""
        written = self.buffer != SENTINEL
        (m, n), (stride, _), front = self.view.shape, self.view.stride(), self.view.storage_offset()
        written.as_strided((m, n), (stride, 1), front).zero_()
        outside = int(written.sum())
        return f"{outside} elements outside [M, N] were written" if outside else None
