"""Cost model: the estimated time of a configuration from the resources of its compiled kernel.

The model ranks configurations; its estimate is no promise. `estimate` states it, without compiling or timing anything.

Its constants are fits to times on one H200 (132 multiprocessors, 700 W, torch 2.11, Triton 3.6; see
docs/results/2026-11-23-h200-exhaustive.md). No other GPU was measured.

    code                    times that were fit
    mma.sync, sm_86         6167 of an exhaustive run over 3 shapes, and 3211 of tuner runs over 69 shapes
    wgmma, sm_90            1339 of tuner runs over 69 shapes

The fit reaches this on the tuner runs, by how much the choice is slower than the fastest:

    code, shapes            rank correlation    worst first choice    worst best of eight
    sm_90, 48 traced        0.89                7.4 %                 0
    sm_90, 21 of few rows   0.85                12.8 %                0
    sm_86, 48 traced        0.72                8.5 %                 5.6 % (over 2 % on 4 shapes)
    sm_86, 21 of few rows   0.71                27 %                  0.6 %

Constants of the hardware:

    REGISTERS_SM            65536           registers of a multiprocessor
    BLOCKS_SM               16              resident blocks of a multiprocessor, at most
    SHARED_BYTES_CLOCK      128 bytes       that the shared memory of a multiprocessor delivers per clock

Fitted constants. A size of 128 x 128 means that the value is for such a tile, and grows with the tile's area.

    L2_REUSE                3               times `Gpu.l2_gb_s`: several multiprocessors read a tile at once
    SMOOTHNESS              5               p of the p-norm that smooths max()
    LAUNCH_US               10.3 us         a launch, its first copies and its last stores

    mma.sync code
    FRAGMENT_CLOCKS         17.4 clocks     a warp's load of 512 bytes of fragments, which delays its products
    STEP_CLOCKS             290 Triton      latency of a step of K that one warp per scheduler does not hide
                            51 mma_sync
    COPY_CLOCKS             1150 clocks     until a step with few bytes is in shared memory, over the steps in flight
    COPY_BYTES              32768 bytes     size of a step whose copy takes twice as long
    TILE_LATENCY_CLOCKS     320 clocks      a tile's start and end, which nothing hides
    STREAM_K_CLOCKS         41600 clocks    storing and fetching the accumulators of 128 x 128

    wgmma code
    TENSOR_FACTOR           1.54 Triton     times the duration at the tensor cores' peak rate
                            1.07 wgmma
    WGMMA_COPY_CLOCKS       1460 clocks     as COPY_CLOCKS
    WGMMA_TILE_CLOCKS       22500 Triton    a tile beside its steps; Triton: of 128 x 128
                            3270 wgmma
    EPILOGUE_CLOCKS         7030 clocks     epilogue of 128 x 128 of a cooperative tile, which nothing hides
    WGMMA_STREAM_K_CLOCKS   57700 clocks    storing and fetching the accumulators of 128 x 128
    SWIGLU_PINGPONG         1.12            times the clocks of a ping-pong tile, whose other consumer cannot hide the
                                            epilogue with SwiGLU; the median of 11 shapes on an H200
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from int8kit.gpus import Gpu
from int8kit.spec import (
    GemmShape,
    Kernel,
    Operation,
    Schedule,
    TileConfig,
    shared_memory_bound,
    triton_uses_warpgroups,
    warp_grid,
)

REGISTERS_SM = 65536
BLOCKS_SM = 16
SHARED_BYTES_CLOCK = 128
OTHER_REGISTERS = 64  # of a thread, beside its accumulators; compiled kernels have 40 to 100

L2_REUSE = 3.0
SMOOTHNESS = 5.0
LAUNCH_US = 10.3

FRAGMENT_CLOCKS = 17.4
STEP_CLOCKS = {Kernel.TRITON: 290.0, Kernel.MMA_SYNC: 51.0}
COPY_CLOCKS = 1150.0
COPY_BYTES = 32768
TILE_LATENCY_CLOCKS = 320.0
STREAM_K_CLOCKS = 41600.0

TENSOR_FACTOR = {Kernel.TRITON: 1.54, Kernel.WGMMA: 1.07}
WGMMA_COPY_CLOCKS = 1460.0
WGMMA_TILE_CLOCKS = {Kernel.TRITON: 22500.0, Kernel.WGMMA: 3270.0}
EPILOGUE_CLOCKS = 7030.0
WGMMA_STREAM_K_CLOCKS = 57700.0
SWIGLU_PINGPONG = 1.12


class Resources(Protocol):
    """Resources of a compiled kernel, as `database.schema.Resources` has them."""

    @property
    def registers(self) -> int:
        """Registers of a thread."""

    @property
    def spill_bytes(self) -> int:
        """Local memory of a thread."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""


class Needs(NamedTuple):
    """Resources of a kernel as plain numbers."""

    registers: int
    spill_bytes: int
    shared_bytes: int


class Machine(NamedTuple):
    """The figures of a GPU that the model reads. The fields are those of `Gpu`."""

    arch: int
    sms: int
    shared_memory: int
    shared_memory_sm: int
    threads_sm: int
    l2_bytes: int
    dram_gb_s: float
    l2_gb_s: float
    clock_mhz: float
    int8_tops: float


def machine_of(gpu: Gpu) -> Machine:
    """The figures of `gpu`."""
    return Machine(*(getattr(gpu, name) for name in Machine._fields))


def assumed_needs(config: TileConfig, arch: int) -> Needs:
    """Resources of a kernel that nobody has compiled: its accumulators, OTHER_REGISTERS, and the bound of its ring."""
    warps = 4 if config.kernel is Kernel.WGMMA else config.num_warps
    accumulators = config.block_m * config.block_n // (32 * warps)
    return Needs(min(accumulators + OTHER_REGISTERS, 255), 0, shared_memory_bound(config, arch=arch))


def blocks_per_sm(config: TileConfig, resources: Resources, gpu: Gpu | Machine) -> int:
    """Blocks resident on one multiprocessor; 0 if not even one fits.

    Registers are allocated in steps of 8 per thread. Each block takes 1 KiB of shared memory more than it asks for.
    """
    threads = 32 * config.num_warps
    registers = math.ceil(resources.registers / 8) * 8
    return min(
        REGISTERS_SM // (registers * threads),
        gpu.shared_memory_sm // (resources.shared_bytes + 1024),
        gpu.threads_sm // threads,
        BLOCKS_SM,
    )


def estimate(
    shape: GemmShape,
    config: TileConfig,
    resources: Resources,
    gpu: Gpu | Machine,
    operation: Operation = Operation.GEMM,
) -> float:
    """Estimated time of one GEMM in microseconds; infinity if no block fits.

    operation: SwiGLU writes half as much, and a ping-pong tile cannot hide its epilogue.

    Each round computes one tile per resident block and multiprocessor; the last round has the remaining tiles. So

        t = launch + maximum(sum over rounds of clocks(resident blocks of the round) / clock, DRAM bytes / DRAM rate)

    Stream-K distributes all tiles evenly, at the cost of storing and fetching accumulators. `_mma_clocks` and
    `_wgmma_clocks` give the clocks of a round, `_dram_bytes` the traffic between DRAM and L2.
    """
    resident = blocks_per_sm(config, resources, gpu)
    if resident == 0:
        return math.inf
    tiles = math.ceil(shape.m / config.block_m) * math.ceil(shape.n / config.block_n)
    written = 2 * shape.m * shape.n // (2 if operation is Operation.SWIGLU else 1)
    dram_us = (_dram_bytes(shape, config, gpu, resident) + written) / gpu.dram_gb_s / 1e3
    if _uses_wgmma(config, gpu.arch):
        clocks = _wgmma_clocks(shape, config, gpu, tiles, resident)
        if operation is Operation.SWIGLU and config.schedule is Schedule.PINGPONG:
            clocks *= SWIGLU_PINGPONG
    else:
        clocks = _mma_clocks(shape, config, resources, gpu, tiles, resident)
    return LAUNCH_US + _smooth_maximum(clocks / gpu.clock_mhz, dram_us)


def _uses_wgmma(config: TileConfig, arch: int) -> bool:
    """Whether the kernel of `config` computes with wgmma on `arch`; for the Triton kernel the compiler decides."""
    if config.kernel is Kernel.TRITON:
        return triton_uses_warpgroups(config, arch)
    return config.kernel is Kernel.WGMMA


def _dram_bytes(shape: GemmShape, config: TileConfig, gpu: Gpu | Machine, resident: int) -> float:
    """Bytes from DRAM to L2: the operands, and operands read again after they have left the L2.

    The tiles of a wave advance along K together, so each of their rows and columns is read once. A segment of stream-K
    advances alone, and reads bytes that no other segment needs at that time. An operand that stays in L2 is read once.
    """
    m, n, k = shape.m, shape.n, shape.k
    rows, columns = math.ceil(m / config.block_m), math.ceil(n / config.block_n)
    if (m + n) * k <= gpu.l2_bytes:
        return (m + n) * k
    at_once = gpu.sms * (config.stream_k or resident)
    segments = rows * columns % at_once if config.stream_k else 0
    waves = (rows * columns - segments) / at_once
    high = min(rows, config.group_m)
    wide = min(columns, math.ceil(at_once / high))
    swizzled_rows = high * config.block_m * k  # bytes of x that one group of the L2 swizzle reads
    x = waves * swizzled_rows if swizzled_rows > gpu.l2_bytes else m * k
    w = min(waves * wide * config.block_n * k, math.ceil(rows / high) * n * k)
    if n * k <= gpu.l2_bytes / 2:
        w = n * k
    if m * k > gpu.l2_bytes / 2:
        x += segments * config.block_m * k
    if n * k > gpu.l2_bytes / 2:
        w += segments * config.block_n * k
    return max((m + n) * k, x + w)


def _mma_clocks(
    shape: GemmShape, config: TileConfig, resources: Resources, gpu: Gpu | Machine, tiles: int, resident: int
) -> float:
    """Clocks of all tiles by `mma.sync`.

    A step of K takes the maximum of four times:

        products and loads of fragments, which alternate in a warp and are spread over four schedulers
        the traffic of shared memory
        the traffic from L2, at the multiprocessor's share of its rate
        the latency of a step's copies, divided by the steps in flight

    A part of the latency is added, which shrinks with the warps per scheduler, and the traffic of spills.
    """
    bm, bn, bk, warps = config.block_m, config.block_n, config.block_k, config.num_warps
    steps = math.ceil(shape.k / bk)
    clock = gpu.clock_mhz * 1e6
    product = 2 * 16 * 8 * 32 / (gpu.int8_tops * 1e12 / (gpu.sms * clock) / 4)  # clocks of an m16n8k32 per scheduler
    warp_m, warp_n = _warp_tile(config)
    fragments = (bm // warp_m) * (bn // warp_n) * (warp_m + warp_n) * bk  # bytes per step
    mma = bm * bn * bk / (16 * 8 * 32) * product + fragments / 512 * FRAGMENT_CLOCKS
    shared = (fragments + (bm + bn) * bk) / SHARED_BYTES_CLOCK
    l2 = (bm + bn) * bk / (L2_REUSE * gpu.l2_gb_s * 1e9 / (gpu.sms * clock))
    in_flight = config.num_stages - (1.2 if config.kernel is Kernel.TRITON else 0.2)
    copies = COPY_CLOCKS * (1 + (bm + bn) * bk / COPY_BYTES) / in_flight
    spill = 2 * resources.spill_bytes * 32 * warps / SHARED_BYTES_CLOCK
    size = bm * bn / 128**2

    def step(blocks: int) -> float:
        """Clocks of one step of K in `blocks` tiles on a multiprocessor."""
        if blocks == 0:
            return 0.0
        busy = _smooth_maximum(blocks * mma / min(4, blocks * warps), blocks * shared, blocks * l2, copies)
        return busy + STEP_CLOCKS[config.kernel] / max(blocks * warps / 4, 0.25) + blocks * spill

    if config.stream_k:
        programs = config.stream_k * gpu.sms
        rounds, rest = divmod(config.stream_k, resident)
        products = tiles * steps / programs * (rounds * step(resident) + step(rest))
        fixup = STREAM_K_CLOCKS * size * min(config.stream_k, resident) if tiles % programs else 0.0
        return products + fixup + math.ceil(tiles / programs) * TILE_LATENCY_CLOCKS * (1 + size) / 2
    rounds, remaining = divmod(tiles, gpu.sms * resident)
    rest = math.ceil(remaining / gpu.sms)
    clocks = steps * (rounds * step(resident) + step(rest))
    return clocks + (rounds + (rest > 0)) * TILE_LATENCY_CLOCKS * (1 + size) / 2


def _wgmma_clocks(shape: GemmShape, config: TileConfig, gpu: Gpu | Machine, tiles: int, resident: int) -> float:
    """Clocks of the busiest multiprocessor's tiles by `wgmma`.

    A step of K takes the maximum of three times:

        the products
        the traffic from L2
        the latency of a step's copies, divided by the steps in flight

    A ping-pong tile adds a constant. A cooperative tile adds its epilogue, because both consumers are busy with it.
    """
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    steps = math.ceil(shape.k / bk)
    clock = gpu.clock_mhz * 1e6
    size = bm * bn / 128**2
    tensor = TENSOR_FACTOR[config.kernel] * 2 * bm * bn * bk / (gpu.int8_tops * 1e12 / (gpu.sms * clock))
    l2 = (bm + bn) * bk / (L2_REUSE * gpu.l2_gb_s * 1e9 / (gpu.sms * clock))
    if config.kernel is Kernel.TRITON:
        copies = WGMMA_COPY_CLOCKS / (config.num_stages - 1)
        rounds, remaining = divmod(tiles, gpu.sms * resident)
        rest = math.ceil(remaining / gpu.sms)
        full, last = (max(blocks * max(tensor, l2), copies) for blocks in (resident, rest))
        tile = WGMMA_TILE_CLOCKS[config.kernel] * size
        return rounds * (steps * full + tile) + (steps * last + tile if rest else 0.0)
    copies = WGMMA_COPY_CLOCKS * (1 + (bm + bn) / 400) / (config.num_stages - 0.5)
    cooperative = config.schedule is Schedule.COOPERATIVE
    tile = EPILOGUE_CLOCKS * size if cooperative else WGMMA_TILE_CLOCKS[config.kernel]
    waves, remaining = divmod(tiles, gpu.sms)
    fixup = 0.0
    if config.stream_k:
        own_tiles = tiles / gpu.sms
        fixup = WGMMA_STREAM_K_CLOCKS * size if remaining else 0.0
    elif cooperative and 2 * remaining <= gpu.sms:
        own_tiles = waves + (0.5 if remaining else 0.0)  # the kernel halves the last wave's tiles
    else:
        own_tiles = waves + (remaining > 0)
    return own_tiles * (steps * _smooth_maximum(tensor, l2, copies) + tile) + fixup


def _smooth_maximum(*times: float) -> float:
    """The p-norm of `times`: their maximum, and more where others come near it."""
    return float(sum(time**SMOOTHNESS for time in times) ** (1 / SMOOTHNESS))


def _warp_tile(config: TileConfig) -> tuple[int, int]:
    """Rows and columns of the tile of one warp.

    In the Triton kernel it is the block's tile, halved along its longer side for each doubling of the warps.
    """
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
