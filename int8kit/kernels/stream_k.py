"""Stream-K of the Gluon kernels: programs share, along K, the tiles of the last, partial wave.

A GEMM has tiles = ceil(M / block_m) * ceil(N / block_n), each of steps = ceil(K / block_k). `workers` programs run at
once. Whole tiles are dealt out in waves of one per worker. The last tiles % workers tiles, the leftover tiles, are a
partial wave. With stream-K (Osama et al., 2023) all workers share their steps evenly, in order:

    leftover tile   0        1        2             workers = 5: the range of worker c starts at
    steps           |--------|--------|--------|    range_start(c) = floor(total * c / workers) and
    worker          |0   |1   |2   |3   |4     |    touches at most two tiles, since leftover < workers

The part of a range that lies in one tile is a segment. A worker whose segment is not the whole tile stores its int32
accumulators in its slot of a workspace in global memory. The worker whose segment completes the tile loads the other
slots, adds them (the fix-up) and stores the tile. The order of integer additions does not change the sum, so the result
is the same to the bit. No worker waits for another one, so the kernel cannot deadlock.

Atomic additions into one int32 tile were rejected. On an H200 they are slower, and neither way pays unless K is long
and tiles are few (docs/kernel-experiments.md).

A slot holds BLOCK_M * BLOCK_N int32. Slot 2c belongs to worker c's first segment, slot 2c + 1 to its second one.
arrived[i] counts the steps of leftover tile i whose sums are stored. The launcher sets it to zero.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from int8kit.kernels.triton_compat import barrier
from int8kit.spec import TileConfig


@gluon.jit
def range_start(worker, total, workers):
    """First step of a worker's range of the `total` leftover steps."""
    return total * worker // workers


@gluon.jit
def range_owner(step, total, workers):
    """The worker whose range holds `step`: the last c with range_start(c) <= step."""
    return gl.cdiv((step + 1) * workers, total) - 1


@gluon.jit
def segment_count(worker, total, workers, steps):
    """Number of leftover tiles that a worker's range touches: 0, 1 or 2."""
    lo = range_start(worker, total, workers)
    hi = range_start(worker + 1, total, workers)
    return gl.where(hi > lo, (hi - 1) // steps - lo // steps + 1, 0)


@gluon.jit
def segment(worker, i, total, workers, steps):
    """A worker's segment i: the index of its leftover tile, and its first and last + 1 step within the tile."""
    lo = range_start(worker, total, workers)
    hi = range_start(worker + 1, total, workers)
    index = lo // steps + i
    return index, gl.maximum(lo - index * steps, 0), gl.minimum(hi - index * steps, steps)


@gluon.jit
def fix_up(
    acc, workspace_ptr, arrived_ptr, worker, i, index, taken, total, workers, steps,
    PIECES: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Save a partial sum. The last arriver adds the others and returns (True, full sum); the rest (False, unused).

    acc holds piece PIECE of PIECES equal row pieces of the tile. Each piece is added and counted by itself.
    """
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    rows = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    cols = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    ptrs = workspace_ptr + PIECE * SIZE + gl.expand_dims(rows * acc.shape[1], 1) + gl.expand_dims(cols, 0)
    gl.store(ptrs + (2 * worker + i) * (PIECES * SIZE), acc)
    barrier()  # all threads have stored before one thread counts the arrival, with release
    complete = gl.atomic_add(arrived_ptr + PIECES * index + PIECE, taken, sem="acq_rel") + taken == steps
    if complete:
        first = range_owner(index * steps, total, workers)
        last = range_owner(index * steps + steps - 1, total, workers)
        for other in range(first, last + 1):
            start = range_start(other, total, workers)
            if other != worker and range_start(other + 1, total, workers) > start:  # few steps: some ranges are empty
                slot = 2 * other + index - start // steps
                acc += gl.load(ptrs + slot * (PIECES * SIZE), cache_modifier=".cg")  # L2: written by another SM
    return complete, acc


class StreamK(NamedTuple):
    """Buffers and sizes of a stream-K launch."""

    workers: int
    leftover: int  # tiles of the partial wave
    workspace: torch.Tensor  # [2 * workers, block_m * block_n] int32, not initialized
    arrived: torch.Tensor  # [leftover * pieces] int32, zero: steps whose sums are stored


def stream_k(tiles: int, config: TileConfig, device: torch.device, pieces: int = 1) -> StreamK | None:
    """The stream-K launch of `tiles` tiles under `config`; None if the configuration does not use stream-K.

    A launch without leftover tiles gets the smallest buffers and runs the same compiled kernel. Buffers are new for
    each call, since kernels on two streams may run at once.
    """
    workers = config.stream_k * multiprocessors(device)
    if not workers:
        return None
    leftover = tiles % workers
    slots = 2 * workers if leftover else 1
    workspace = torch.empty(slots, config.block_m * config.block_n, dtype=torch.int32, device=device)
    arrived = torch.zeros(max(leftover, 1) * pieces, dtype=torch.int32, device=device)
    return StreamK(workers, leftover, workspace, arrived)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
