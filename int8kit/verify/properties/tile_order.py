"""The proof `tile order`: the L2 swizzle numbers every tile of a matrix once, for every width of its groups.

A small kernel computes the corners of all tiles of a grid at once. So a grid of thousands of tiles costs one program,
where a GEMM needs one program for each tile. Only the numbering decides which tiles are computed, so a GEMM need not
run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from int8kit.kernels.l2_swizzle import tile_corner
from int8kit.spec import Kernel, TileConfig
from int8kit.verify.executors import Executor
from int8kit.verify.properties.proof import Outcome, Proof, Report

BLOCK_M, BLOCK_N = 16, 32
SIZE = 1024  # tiles of one program
GROUP_M = range(1, 65)  # every value that `spec.why_illegal` admits
GRIDS = ((1, 1), (2, 3), (63, 65), (130, 7))  # rows and columns of tiles
LARGE_GRIDS = ((1, 5000), (5000, 1), (9, 300), (70, 131), (257, 257))
LARGE_GROUP_M = (1, 2, 3, 4, 7, 8, 12, 16, 33, 64)


@triton.jit(do_not_specialize=["M", "N", "group_m", "tiles"])
def _corners(corner_ptr, M, N, group_m, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr):
    tile = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    row, col = tile_corner(tile, M, N, group_m, BLOCK_M, BLOCK_N)
    tl.store(corner_ptr + tile, row, mask=tile < tiles)
    tl.store(corner_ptr + tiles + tile, col, mask=tile < tiles)


def grids() -> Iterator[tuple[int, int, int, int, int]]:
    """M, N, group_m and the rows and columns of tiles of every case: the last tile is whole, or has one row."""
    cases = [(grid, group_m) for grid in GRIDS for group_m in GROUP_M]
    cases += [(grid, group_m) for grid in LARGE_GRIDS for group_m in LARGE_GROUP_M]
    for i, ((rows, columns), group_m) in enumerate(cases):
        m = rows * BLOCK_M - (BLOCK_M - 1) * (i % 2)
        n = columns * BLOCK_N - (BLOCK_N - 1) * (i // 2 % 2)
        yield m, n, group_m, rows, columns


def run(executor: Executor, tiles: tuple[TileConfig, ...], on_example: Report) -> Outcome:
    """Try every case of `grids`."""
    count = 0
    for m, n, group_m, rows, columns in grids():
        case = f"{rows} x {columns} tiles of {m} x {n} elements, group_m = {group_m}"
        if count % 32 == 0:
            on_example(case)
        count += 1
        if why := _differs(m, n, group_m, rows, columns, executor.device):
            return Outcome(count, f"{case}: {why}")
    return Outcome(count)


def _differs(m: int, n: int, group_m: int, rows: int, columns: int, device: str) -> str | None:
    total = rows * columns
    corners = torch.full((2, total), -1, dtype=torch.int32, device=device)
    _corners[(triton.cdiv(total, SIZE),)](
        corners, m, n, group_m, total, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, SIZE=SIZE
    )  # fmt: skip
    row, col = corners.cpu()
    inside = (row >= 0) & (row < m) & (row % BLOCK_M == 0) & (col >= 0) & (col < n) & (col % BLOCK_N == 0)
    if not bool(inside.all()):
        at = int((~inside).nonzero()[0])
        return f"tile {at} is at [{int(row[at])}, {int(col[at])}], which is no tile"
    times = torch.bincount(row // BLOCK_M * columns + col // BLOCK_N, minlength=total)
    if int(times.min()) == 1:
        return None
    lost = int((times == 0).nonzero()[0])
    return f"no number gives the tile at [{lost // columns * BLOCK_M}, {lost % columns * BLOCK_N}]"


PROOFS = (
    Proof(
        "tile order", "each tile of a matrix has one number, for every width of the L2 swizzle", "sampled", run,
        mutants_of=(Kernel.TRITON,),
    ),
)  # fmt: skip
"""The rows of this module in `registry.PROOFS`."""
