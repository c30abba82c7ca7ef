"""Cost model: the estimated time of a configuration from the resources of its compiled kernel."""

from __future__ import annotations

import math

from int8kit.database.schema import Resources
from int8kit.gpus import Gpu
from int8kit.spec import GemmShape, Kernel, TileConfig, warp_grid

REGISTERS_SM = 65536

BLOCKS_SM = 16

SHARED_BYTES_CLOCK = 128  # a multiprocessor's shared memory reads this much a clock

# What a part takes and what hides it. Fits to times on an H200 (docs/results); no other card has been asked: of sm_86
# code 6167 of an exhaustive run and 3211 of a tuner's, of wgmma code 1339 of a tuner's.
L2_REACH = 3.0  # times `Gpu.l2_gb_s`: several multiprocessors read a tile at once

SMOOTH = 5.0  # the norm that stands for the most of several, each of which shows where they are near

LAUNCH_US = 10.3  # of a launch, its first copies and its last stores

# mma.sync code
FRAGMENT_CLOCKS = 17.4  # of a warp's load of 512 bytes of fragments, in the way of its products

STEP_CLOCKS = {Kernel.TRITON: 290.0, Kernel.MMA_SYNC: 51.0}  # of a step that a lone warp a scheduler does not hide

COPY_CLOCKS = 1150.0  # until a step of few bytes is in shared memory, shared by the steps in flight

COPY_BYTES = 32768  # of a step that takes twice as long

BLOCK_CLOCKS = 320.0  # of a tile that nothing hides

STREAM_CLOCKS = 41600.0  # of putting and fetching the sums of 128 x 128

# wgmma code
TENSOR = {Kernel.TRITON: 1.54, Kernel.WGMMA: 1.07}  # times what the tensor cores' peak takes

WGMMA_COPY_CLOCKS = 1460.0

TILE_CLOCKS = {Kernel.TRITON: 22500.0, Kernel.WGMMA: 3270.0}  # of a tile beside its steps; pointer: of 128 x 128

EPILOGUE_CLOCKS = 7030.0  # of 128 x 128 of a tile that both multipliers share, and nothing hides

SUMS_CLOCKS = 57700.0  # of 128 x 128 that are put and fetched


def blocks_per_sm(config: TileConfig, resources: Resources, gpu: Gpu) -> int:
    """Blocks resident on one multiprocessor; 0 if not even one fits.

    Registers are allotted in steps of 8 a thread, shared memory with 1 KiB a block on top.
    """
    threads = 32 * config.num_warps
    registers = math.ceil(resources.registers / 8) * 8
    return min(
        REGISTERS_SM // (registers * threads),
        gpu.shared_memory_sm // (resources.shared_bytes + 1024),
        gpu.threads_sm // threads,
        BLOCKS_SM,
    )


def estimate(shape: GemmShape, config: TileConfig, resources: Resources, gpu: Gpu) -> float:
    """Estimated time of one GEMM in microseconds; infinity if no block fits.

    The tiles are made in rounds of one a resident block and multiprocessor, the last by as many as are left, so

        t = launch + most(sum over rounds of clocks(blocks resident in it) / clock, DRAM bytes / DRAM rate)

    Stream-K deals all of them out evenly, for the price of putting and fetching sums. See `_mma_clocks` and
    `_wgmma_clocks` for what a round takes, `_dram_bytes` for what passes L2 by.
    """
    resident = blocks_per_sm(config, resources, gpu)
    if resident == 0:
        return math.inf
    tiles = math.ceil(shape.m / config.block_m) * math.ceil(shape.n / config.block_n)
    dram_us = _dram_bytes(shape, config, gpu, resident) / gpu.dram_gb_s / 1e3
    warpgroups = gpu.arch in (90, 100) and config.num_warps >= 4 and config.block_m >= 64
    if config.kernel is Kernel.WGMMA or (config.kernel is Kernel.TRITON and warpgroups):
        clocks = _wgmma_clocks(shape, config, gpu, tiles, resident)
    else:
        clocks = _mma_clocks(shape, config, resources, gpu, tiles, resident)
    return LAUNCH_US + _most(clocks / gpu.clock_mhz, dram_us)


def _dram_bytes(shape: GemmShape, config: TileConfig, gpu: Gpu, resident: int) -> float:
    """Bytes between DRAM and L2: what is written, and what is read again because it has left L2 meanwhile.

    The tiles of a wave walk along K together: each of their rows and columns is read once. A part of stream-K walks by
    itself, and reads what no other part needs at that time. An operand that L2 holds is read once all the same.
    """
    m, n, k = shape.m, shape.n, shape.k
    rows, columns = math.ceil(m / config.block_m), math.ceil(n / config.block_n)
    written = 2 * m * n
    if (m + n) * k <= gpu.l2_bytes:
        return (m + n) * k + written
    at_once = gpu.sms * (config.stream_k or resident)
    parts = rows * columns % at_once if config.stream_k else 0
    waves = (rows * columns - parts) / at_once
    high = min(rows, config.group_m)
    wide = min(columns, math.ceil(at_once / high))
    band = high * config.block_m * k
    x = waves * band if band > gpu.l2_bytes else m * k
    w = min(waves * wide * config.block_n * k, math.ceil(rows / high) * n * k)
    if n * k <= gpu.l2_bytes / 2:
        w = n * k
    if m * k > gpu.l2_bytes / 2:
        x += parts * config.block_m * k
    if n * k > gpu.l2_bytes / 2:
        w += parts * config.block_n * k
    return max((m + n) * k, x + w) + written


def _mma_clocks(
    shape: GemmShape, config: TileConfig, resources: Resources, gpu: Gpu, tiles: int, resident: int
) -> float:
    """Clocks of all tiles by `mma.sync`.

    A step of K takes the most of four: products and loads of fragments, which take turns in a warp and are spread over
    four schedulers; what goes through shared memory; what comes from the multiprocessor's share of L2; and the time
    until its copies are there, which is shared by the steps in flight. Added is a part of its latency, which shrinks
    with warps a scheduler, and spills.
    """
    bm, bn, bk, warps = config.block_m, config.block_n, config.block_k, config.num_warps
    steps = math.ceil(shape.k / bk)
    clock = gpu.clock_mhz * 1e6
    product = 2 * 16 * 8 * 32 / (gpu.int8_tops * 1e12 / (gpu.sms * clock) / 4)  # clocks of an m16n8k32 on a scheduler
    warp_m, warp_n = _warp_tile(config)
    fragments = (bm // warp_m) * (bn // warp_n) * (warp_m + warp_n) * bk  # bytes a step
    mma = bm * bn * bk / (16 * 8 * 32) * product + fragments / 512 * FRAGMENT_CLOCKS
    shared = (fragments + (bm + bn) * bk) / SHARED_BYTES_CLOCK
    l2 = (bm + bn) * bk / (L2_REACH * gpu.l2_gb_s * 1e9 / (gpu.sms * clock))
    flying = config.num_stages - (1.2 if config.kernel is Kernel.TRITON else 0.2)
    copies = COPY_CLOCKS * (1 + (bm + bn) * bk / COPY_BYTES) / flying
    spill = 2 * resources.spill_bytes * 32 * warps / SHARED_BYTES_CLOCK
    size = bm * bn / 128**2

    def step(blocks: int) -> float:
        """Clocks of a step of `blocks` tiles on a multiprocessor."""
        if blocks == 0:
            return 0.0
        busy = _most(blocks * mma / min(4, blocks * warps), blocks * shared, blocks * l2, copies)
        return busy + STEP_CLOCKS[config.kernel] / max(blocks * warps / 4, 0.25) + blocks * spill

    if config.stream_k:
        workers = config.stream_k * gpu.sms
        rounds, rest = divmod(config.stream_k, resident)
        share = tiles * steps / workers * (rounds * step(resident) + step(rest))
        sums = STREAM_CLOCKS * size * min(config.stream_k, resident) if tiles % workers else 0.0
        return share + sums + math.ceil(tiles / workers) * BLOCK_CLOCKS * (1 + size) / 2
    rounds, left = divmod(tiles, gpu.sms * resident)
    rest = math.ceil(left / gpu.sms)
    clocks = steps * (rounds * step(resident) + step(rest))
    return clocks + (rounds + (rest > 0)) * BLOCK_CLOCKS * (1 + size) / 2


def _wgmma_clocks(shape: GemmShape, config: TileConfig, gpu: Gpu, tiles: int, resident: int) -> float:
    """Clocks of the busiest multiprocessor's tiles by `wgmma`.

    A step of K takes the most of three: products; operands out of L2; and the time until its copies are there, which is
    shared by the steps in flight. A tile adds a constant, and its epilogue if no other multiplier works meanwhile.
    """
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    steps = math.ceil(shape.k / bk)
    clock = gpu.clock_mhz * 1e6
    size = bm * bn / 128**2
    tensor = TENSOR[config.kernel] * 2 * bm * bn * bk / (gpu.int8_tops * 1e12 / (gpu.sms * clock))
    l2 = (bm + bn) * bk / (L2_REACH * gpu.l2_gb_s * 1e9 / (gpu.sms * clock))
    if config.kernel is Kernel.TRITON:
        copies = WGMMA_COPY_CLOCKS / (config.num_stages - 1)
        rounds, left = divmod(tiles, gpu.sms * resident)
        rest = math.ceil(left / gpu.sms)
        full, last = (max(blocks * max(tensor, l2), copies) for blocks in (resident, rest))
        tile = TILE_CLOCKS[config.kernel] * size
        return rounds * (steps * full + tile) + (steps * last + tile if rest else 0.0)
    copies = WGMMA_COPY_CLOCKS * (1 + (bm + bn) / 400) / (config.num_stages - 0.5)
    tile = EPILOGUE_CLOCKS * size if bm == 256 else TILE_CLOCKS[config.kernel]
    waves, left = divmod(tiles, gpu.sms)
    sums = 0.0
    if config.stream_k:
        mine = tiles / gpu.sms
        sums = SUMS_CLOCKS * size if left else 0.0
    elif bm == 256 and 2 * left <= gpu.sms:
        mine = waves + (0.5 if left else 0.0)  # the last wave's tiles are halved
    else:
        mine = waves + (left > 0)
    return mine * (steps * _most(tensor, l2, copies) + tile) + sums


def _most(*parts: float) -> float:
    """The greatest of `parts`, and more where others come near it."""
    return float(sum(part**SMOOTH for part in parts) ** (1 / SMOOTH))


def _warp_tile(config: TileConfig) -> tuple[int, int]:
    """Rows and columns of the tile that one warp makes: the block's, halved along the longer side for each doubling."""
    m, n, warps = config.block_m, config.block_n, config.num_warps
    if config.kernel is Kernel.MMA_SYNC:
        return m // warp_grid(config)[0], n // warp_grid(config)[1]
    while warps > 1:
        if m >= n:
            m //= 2
        else:
            n //= 2
        warps //= 2
    return max(m, 16), max(n, 8)
