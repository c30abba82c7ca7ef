"""Which tiles a program makes, for the kernels written in Gluon: bands of tile rows, and stream-K for the leftover.

A GEMM has tiles = ceil(M / block_m) * ceil(N / block_n), each of steps = ceil(K / block_k), and workers (programs that
run at once). Whole tiles are dealt out in waves of one a worker. The tiles % workers that are left fill no wave; with
stream-K all workers share their leftover * steps steps of K evenly, in order:

    leftover tile   0        1        2             workers = 5: worker c takes the steps from
    steps           |--------|--------|--------|    lo(c) = floor(total * c / workers) up to lo(c + 1),
    worker          |0   |1   |2   |3   |4     |    which lie in at most two tiles, since leftover < workers

A worker that did not take all steps of a tile puts its int32 sums in a slot of its own in global memory; the worker
whose part completes the tile adds up the slots and stores the tile. Integer sums do not depend on the order, so the
result is the same to the bit. Nobody waits for another, so nothing can deadlock.

Atomic additions straight into one int32 tile were rejected: on an H200 they are slower, and neither pays unless K is
long and tiles are few (docs/kernels.md). A slot holds BLOCK_M * BLOCK_N int32; worker c's part of its first tile
is in slot 2c, of its second in slot 2c + 1. done[i] counts the steps of leftover tile i that have been put; the
launcher zeroes it.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from int8kit.spec import TileConfig


def with_names(module: ModuleType, **new_names: str) -> ModuleType:
    """`module` with functions under the names that Triton 3.6 and 3.7 have for them; new_names: what 3.9 calls each."""
    view = ModuleType(module.__name__)
    vars(view).update(vars(module))
    for name, new in new_names.items():
        setattr(view, name, getattr(module, new, None) or getattr(module, name))
    return view


sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def tile_corner(tile, M, N, group_m, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Row and column of a tile's corner: down the columns of bands of group_m tile rows, which keeps operands in L2."""
    tiles_m = gl.cdiv(M, BLOCK_M)
    band = group_m * gl.cdiv(N, BLOCK_N)
    first = tile // band * group_m
    height = gl.minimum(tiles_m - first, group_m)
    return (first + tile % band % height) * BLOCK_M, tile % band // height * BLOCK_N


@gluon.jit
def share(worker, total, workers):
    """First step of `worker`'s share of `total` leftover steps."""
    return total * worker // workers


@gluon.jit
def owner(step, total, workers):
    """The worker in whose share `step` lies: the last c with share(c) <= step."""
    return gl.cdiv((step + 1) * workers, total) - 1


@gluon.jit
def parts_of(worker, total, workers, steps):
    """How many leftover tiles `worker`'s share touches: 0, 1 or 2."""
    lo = share(worker, total, workers)
    hi = share(worker + 1, total, workers)
    return gl.where(hi > lo, (hi - 1) // steps - lo // steps + 1, 0)


@gluon.jit
def part(worker, i, total, workers, steps):
    """Part i of `worker`'s share: the leftover tile's index, and its first and last + 1 step within the tile."""
    lo = share(worker, total, workers)
    hi = share(worker + 1, total, workers)
    index = lo // steps + i
    return index, gl.maximum(lo - index * steps, 0), gl.minimum(hi - index * steps, steps)


@gluon.jit
def combine(
    acc, slots_ptr, done_ptr, worker, i, index, taken, total, workers, steps, PIECES: gl.constexpr, PIECE: gl.constexpr
):
    """Put part i's sums where the others find them -> (the tile is complete, its sums if so).

    acc holds piece PIECE of PIECES equal row pieces of the tile, each summed and counted for itself.
    """
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    rows = gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    cols = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    ptrs = slots_ptr + PIECE * SIZE + gl.expand_dims(rows * acc.shape[1], 1) + gl.expand_dims(cols, 0)
    gl.store(ptrs + (2 * worker + i) * (PIECES * SIZE), acc)
    sync()  # all threads' sums are out before one thread says so, with release
    complete = gl.atomic_add(done_ptr + PIECES * index + PIECE, taken, sem="acq_rel") + taken == steps
    if complete:
        for other in range(owner(index * steps, total, workers), owner(index * steps + steps - 1, total, workers) + 1):
            start = share(other, total, workers)
            if other != worker and share(other + 1, total, workers) > start:  # fewer steps than workers: some have none
                slot = 2 * other + index - start // steps
                acc += gl.load(ptrs + slot * (PIECES * SIZE), cache_modifier=".cg")  # L2: written by another SM
    return complete, acc


class Plan(NamedTuple):
    """What a stream-K launch needs."""

    workers: int
    leftover: int  # tiles that fill no wave
    slots: torch.Tensor  # [2 * workers, block_m * block_n] int32, as it comes
    done: torch.Tensor  # [leftover * pieces] int32, zero


def plan(tiles: int, config: TileConfig, device: torch.device, pieces: int = 1) -> Plan | None:
    """The stream-K launch of `tiles` tiles under `config`; None if its tiles are made whole.

    Also where no tile is left over, since the kernel of the other kind would have to be compiled then. Fresh buffers
    each call, since kernels on two streams may run at once.
    """
    workers = config.stream_k * multiprocessors(device)
    if not workers:
        return None
    leftover = tiles % workers
    slots = torch.empty(
        2 * workers if leftover else 1, config.block_m * config.block_n, dtype=torch.int32, device=device
    )
    return Plan(workers, leftover, slots, torch.zeros(max(leftover, 1) * pieces, dtype=torch.int32, device=device))


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
