"""A card that is not here: compile for it, read what the kernel takes, and estimate its time.

    compile_for(86, config)  ->  Resources(registers=124, spill_bytes=0, shared_bytes=49152)
    estimate(shape, config, resources, gpu)  ->  microseconds

Triton compiles for any NVIDIA architecture without a driver. Registers and spills come from `cuobjdump -res-usage` on
the cubin, shared memory from the compiler's metadata: both exact. The time is a model, stated in `estimate`; it ranks
configurations and is not a promise. Run through `workers`, since a compiler can abort its process.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from int8kit.gpus import Gpu
from int8kit.schema import Resources
from int8kit.spec import ConfigError, GemmShape, Kernel, TileConfig, warp_grid

REGISTERS_SM = 65536
BLOCKS_SM = 16
LAUNCH_US = 3.0  # an empty kernel, as a stream sees it
LOOSE = {Kernel.POINTER: 0.3, Kernel.AMPERE: 0.15, Kernel.HOPPER: 0.1}  # what a lone warp group's copies do not hide
SHARED_BYTES_CLOCK = 128  # a multiprocessor's shared memory reads this much a clock


def compile_for(arch: int, config: TileConfig, *, even_k: bool = True) -> Resources:
    """What the bf16 GEMM with bias takes on `arch` (86 for sm_86). Raises ConfigError as `assemble` does."""
    compiled = assemble(arch, config, even_k=even_k)
    registers, spill = _usage(compiled.asm["cubin"])
    return Resources(registers=registers, spill_bytes=spill, shared_bytes=int(compiled.metadata.shared))


def assemble(arch: int, config: TileConfig, *, even_k: bool = True, code: str | None = None) -> Any:
    """Triton's compiled kernel for `arch`, with `asm` ("ptx", "cubin", ...) and `metadata`.

    even_k: K is a multiple of block_k. code: an older card's, such as "sm86", to run on `arch`. Raises ConfigError with
    the compiler's words if it does not compile, or under Triton's interpreter, which hides the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from int8kit.kernels import gemm

    if gemm.interpreted():
        raise ConfigError("TRITON_INTERPRET is set: compile in a process without it")
    source, options = gemm.module(config.kernel).source(config, even_k=even_k)
    if code is not None:
        options["arch"] = code
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is this configuration's fault, and recorded as such
        raise ConfigError(f"{config} does not compile for sm_{arch}: {error}") from None


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory bytes of a thread. STACK counts spills; LOCAL is 0 in cubins of the new ABI."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ConfigError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


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

    The busiest multiprocessor makes ceil(tiles / sms) tiles, one after the other as far as its units go, so

        t = launch + max(ceil(tiles / sms) * clocks(tile) / clock, DRAM bytes / DRAM rate)

    A tile's clocks are the most of three, each for all of K: its products on the tensor cores, its operands out of
    the card's share of L2, its fragments out of shared memory. They overlap better the more warps are resident and the
    more stages are in flight: they take 1 + loose / (warps / 4 * sqrt(stages in flight)) as long, with LOOSE by kernel,
    a fit to no card. What cannot overlap is added: filling the pipeline and, shared by the resident blocks, storing the
    tile. A spilled byte costs a load and a store in every step. With stream-K the busiest multiprocessor makes
    tiles / sms of a tile, and writes and reads the sums of two, at a quarter of L2's rate as measured on an H200.
    """
    resident = blocks_per_sm(config, resources, gpu)
    if resident == 0:
        return math.inf
    clock_ghz = gpu.clock_mhz / 1e3
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    tiles = math.ceil(shape.m / bm) * math.ceil(shape.n / bn)
    busiest = float(math.ceil(tiles / gpu.sms))
    resident = min(resident, int(busiest))
    steps = math.ceil(shape.k / bk)

    tensor = 2 * bm * bn * bk / (gpu.int8_tops * 1e3 / (gpu.sms * clock_ghz))
    l2_clock = gpu.l2_gb_s / (gpu.sms * clock_ghz)  # bytes a clock for one multiprocessor
    l2 = (bm + bn) * bk / l2_clock
    warp_m, warp_n = _warp_tile(config)
    shared = (bm // warp_m) * (bn // warp_n) * (warp_m + warp_n) * bk / SHARED_BYTES_CLOCK
    spill = 2 * resources.spill_bytes * 32 * config.num_warps / SHARED_BYTES_CLOCK
    warps = resident * config.num_warps
    flying = config.num_stages - (config.kernel is Kernel.POINTER)
    waits = 1 + LOOSE[config.kernel] / (warps / 4 * math.sqrt(flying))
    per_step = max(tensor, l2, shared) * waits + spill
    fill = 800 + (config.num_stages - 1) * l2  # one trip to DRAM, then the ring
    store = 2 * bm * bn / l2_clock
    hidden = resident
    if config.kernel is Kernel.HOPPER:
        hidden = 4 if config.block_m < 256 else 1  # in turn, the other multiplier covers most of it
    clocks = steps * per_step + (fill + store) / hidden
    sums = 0.0
    if config.stream_k and tiles % (config.stream_k * gpu.sms):
        busiest = tiles / gpu.sms
        sums = 4 * (2 * 2 * bm * bn * 4) / l2_clock / clock_ghz / 1e3

    dram = shape.m * shape.k + shape.n * shape.k + 2 * shape.m * shape.n
    return LAUNCH_US + sums + max(busiest * clocks / clock_ghz / 1e3, dram / gpu.dram_gb_s / 1e3)


def _warp_tile(config: TileConfig) -> tuple[int, int]:
    """Rows and columns of the tile that one warp makes: the block's, halved along the longer side for each doubling."""
    m, n, warps = config.block_m, config.block_n, config.num_warps
    if config.kernel is Kernel.AMPERE:
        return m // warp_grid(config)[0], n // warp_grid(config)[1]
    if config.kernel is Kernel.HOPPER:
        return min(m, 64), n  # what one wgmma reads
    while warps > 1:
        if m >= n:
            m //= 2
        else:
            n //= 2
        warps //= 2
    return max(m, 16), max(n, 8)
