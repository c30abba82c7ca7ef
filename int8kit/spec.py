"""Terms that all stages share: the shape of a GEMM, the tile configuration of a kernel, the source of a time.

    out[m, n] = x[m, k] @ w[n, k].T        GemmShape(m, n, k); x and w int8 and row-major, accumulators int32

A `TileConfig` is a plain frozen value that is passed to the launchers. A decorated autotuner, which chooses at the
call, was rejected: it tunes inside the user's first image, and its choice cannot be reviewed in a file. `why_illegal`
is the only place that defines a legal configuration. The tuner's space, the database's reader and the verifier's
strategies call it.

This module imports neither torch nor triton, and of int8kit only the errors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar

from int8kit.errors import ShapeError

NUMERICS_VERSION = 1
"""Version of the arithmetic in `int8kit.reference`. A database of another version is refused."""

_TIMED = (
    "GEMM with epilogue and bias, bf16 out; operands quantized from normal data; weights rotated past twice the L2; "
    "contestants interleaved round by round in {}; CUDA events; medians with p20 and p80"
)
_HOT = ", in samples of 20 ms, so that the GPU's power limit counts as it does in a run of a model"
POLICIES = {
    1: _TIMED.format("turning order"),
    2: _TIMED.format("turning order" + _HOT),
    # a contestant inherits the clock of the previous one; a launch from Python takes longer than a small GEMM
    3: _TIMED.format("an order shuffled anew each time" + _HOT) + "; CUDA graphs of launches",
    # in a model, the input of a GEMM was written a moment ago, and other kernels use the GPU between two GEMMs
    4: _TIMED.format(
        "an order shuffled anew each time, in samples of 20 ms, or from 1024 rows on of 100 ms, in which GEMMs and "
        "quantizations of x take turns, without the quantizations' own time"
    )
    + "; CUDA graphs of launches",
}
"""Measurement policies by version. A database entry names the version; the header of its file has the text."""

POLICY = max(POLICIES)

TIE = 0.01
"""Times that differ by at most this share count as equal: the tuner may choose either."""

NEAR = 4.0
"""Extents that are this many times larger or smaller are near: the tuner tries a configuration there. The lookup takes
it only where the cost model cannot rank."""

K_MAX = 131071
"""Largest K whose int32 sums cannot overflow: 128 * 128 * K < 2**31."""


class Source(StrEnum):
    """Origin of a database entry's time, the strongest first."""

    MEASURED = "measured"  # timed on the database's GPU
    PROXY = "proxy"  # the code of the database's GPU, timed on another GPU
    MODELLED = "modelled"  # compiled for the database's GPU, ranked by the cost model

    @property
    def strength(self) -> int:
        """3 for measured, 2 for proxy, 1 for modelled: a stronger entry is never replaced by a weaker one."""
        return 3 - list(Source).index(self)


class Operation(StrEnum):
    """Operation of a kernel. The values are written into files and exported graphs."""

    GEMM = "gemm"  # scales and bias
    SWIGLU = "swiglu"  # scales and bias, then silu(gate) * up of pairs of columns


@dataclass(frozen=True, order=True)
class GemmShape:
    """One GEMM: `out[m, n] = x[m, k] @ w[n, k].T`. Raises ShapeError outside the kernels' domain."""

    m: int
    n: int
    k: int

    def __post_init__(self) -> None:
        for name, value in (("M", self.m), ("N", self.n), ("K", self.k)):
            if value < 1:
                raise ShapeError(f"{name} = {value}: expected at least 1")
            if value >= 2**31:
                raise ShapeError(
                    f"{name} = {value}: expected less than 2**31, since kernels have 32-bit extents; split it"
                )
        if self.k > K_MAX:
            raise ShapeError(
                f"K = {self.k}: expected 1 to {K_MAX}, since beyond it an int32 sum of int8 products can overflow; "
                "split the layer along K and add the parts in float32"
            )

    @property
    def flops(self) -> int:
        """FLOPs, 2 m n k: multiplications and additions."""
        return 2 * self.m * self.n * self.k

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class SwigluShape(GemmShape):
    """A GEMM with the SwiGLU epilogue: n columns of the product, gate and up in turn, give n / 2 columns of the output.

    It equals no plain GemmShape, and sorts behind the one of its extents. Raises ShapeError for an odd n.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n % 2:
            raise ShapeError(f"N = {self.n} with SwiGLU: expected an even number, gate and up side by side")

    def __str__(self) -> str:
        return f"{super().__str__()}+swiglu"

    def __lt__(self, other: GemmShape) -> bool:
        return _order(self) < _order(other)

    def __gt__(self, other: GemmShape) -> bool:
        return _order(other) < _order(self)


def operation_of(shape: GemmShape) -> Operation:
    """The operation that a shape names: SwiGLU of a SwigluShape, the GEMM of any other."""
    return Operation.SWIGLU if isinstance(shape, SwigluShape) else Operation.GEMM


def plain(shape: GemmShape) -> GemmShape:
    """The extents of a shape, without an epilogue."""
    return GemmShape(shape.m, shape.n, shape.k)


def _order(shape: GemmShape) -> tuple[int, int, int, str]:
    return shape.m, shape.n, shape.k, operation_of(shape).value


class Kernel(StrEnum):
    """The device code of a GEMM. All kernels give the same bits.

    The values are written into files and exported graphs, so a value never changes its meaning.
    """

    TRITON = "triton"  # plain Triton: every GPU, every shape, and the CPU interpreter
    MMA_SYNC = "mma_sync"  # Gluon, mma.sync and cp.async: sm_80 and later; the tuner leaves it out on sm_90
    WGMMA = "wgmma"  # Gluon, wgmma and TMA, warp-specialized and persistent: sm_90


class Schedule(StrEnum):
    """Division of work between the two consumer warpgroups of the wgmma kernel. The values are written into files."""

    PINGPONG = "pingpong"  # the consumers take alternate tiles
    COOPERATIVE = "cooperative"  # each consumer computes half of every tile


def digest(document: Any) -> str:
    """12 hexadecimal digits of a JSON document. The order of keys does not matter."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, order=True)
class TileConfig:
    """Tile configuration of a GEMM: kernel, tile, pipeline. Any legal value gives the same bits at another speed.

    The wgmma kernel has two consumer warpgroups and one producer warp, which num_warps does not count. Its schedule is
    ping-pong where nothing else is given, and cooperative for tiles of 256 rows.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # in files; pydantic itself is not needed here

    block_m: int  # rows of an output tile
    block_n: int  # columns of an output tile
    block_k: int  # int8 elements of K read in one step
    num_warps: int  # warps of 32 threads that multiply; a producer warp does not count
    num_stages: int  # steps of K in flight
    group_m: int = 8  # width of the L2 swizzle: tile rows that are finished before the next ones start
    kernel: Kernel = Kernel.TRITON
    stream_k: int = 0  # programs per multiprocessor that share, along K, the tiles of the partial wave; 0: none
    schedule: Schedule | None = None  # of the wgmma kernel; None for the others

    def __post_init__(self) -> None:
        if self.schedule is None:
            object.__setattr__(self, "schedule", usual_schedule(self))

    @property
    def id(self) -> str:
        """12 hexadecimal digits of the values. A field at its default leaves no trace, so a new field keeps ids."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.schedule is usual_schedule(self):
            values.pop("schedule", None)
        return digest(values)

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages} g{self.group_m}"
        stream = f" k{self.stream_k}" if self.stream_k else ""
        schedule = "" if self.schedule is usual_schedule(self) else f" {self.schedule}"
        return tile + stream if self.kernel is Kernel.TRITON else f"{self.kernel} {tile}{stream}{schedule}"


GROUP_M = TileConfig.group_m
"""Width of the L2 swizzle, unless another width was faster."""


def usual_schedule(config: TileConfig) -> Schedule | None:
    """The schedule of a configuration that names none."""
    if config.kernel is not Kernel.WGMMA:
        return None
    return Schedule.COOPERATIVE if config.block_m == 256 else Schedule.PINGPONG


def consumer_rows(config: TileConfig) -> int:
    """Rows of a tile that one consumer warpgroup of the wgmma kernel computes."""
    return config.block_m // 2 if config.schedule is Schedule.COOPERATIVE else config.block_m


STREAM_K = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class _Domain:
    """The values of each parameter of a kernel's configuration."""

    block_m: tuple[int, ...]
    block_n: tuple[int, ...]
    block_k: tuple[int, ...]
    num_warps: tuple[int, ...]
    num_stages: tuple[int, ...]
    stream_k: tuple[int, ...]


DOMAINS = {
    Kernel.TRITON: _Domain(
        (16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (32, 64, 128, 256), (1, 2, 4, 8), (2, 3, 4, 5, 6), (0,)
    ),
    # at least 16 columns per warp: half of the columns that its 16-byte stores need
    Kernel.MMA_SYNC: _Domain((16, 32, 64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (2, 3, 4, 5, 6), STREAM_K),
    # TMA swizzles rows of 128 bytes; Triton asserts on an int8 wgmma of 256 columns
    Kernel.WGMMA: _Domain((64, 128, 256), (64, 128), (128,), (8,), (2, 3, 4, 5, 6, 7, 8, 9, 10), (0, 1)),
}
"""Parameters of every kernel. `why_illegal` adds the rules that depend on several parameters or on the GPU."""


def shared_memory_bound(config: TileConfig, *, arch: int, out_bytes: int = 2) -> int:
    """Upper bound in bytes of the shared memory of `config` on `arch` (86 for sm_86).

    Triton kernel: on Ampere, Ada and consumer Blackwell (cp.async) the load ring holds one step less than `num_stages`,
    and the epilogue reuses it for the output tile. Hopper (wgmma) keeps all steps.
    mma_sync kernel: the ring and, for stream-K, a counter.
    wgmma kernel: the ring, four staging buffers of 64 bytes per row, scales and bias of two tiles, and the barriers.

    The bound is never below the compiler's own figure (tests/test_cross_compile.py compares). `tune` records that
    figure.
    """
    step = (config.block_m + config.block_n) * config.block_k
    if config.kernel is Kernel.WGMMA:
        rows = consumer_rows(config)
        return config.num_stages * step + 4 * rows * 64 + 16 * config.block_n + 1024
    if config.kernel is Kernel.MMA_SYNC:
        return config.num_stages * step + 16 * (config.stream_k > 0)
    steps = config.num_stages if triton_uses_warpgroups(config, arch) else config.num_stages - 1
    return max(steps * step, config.block_m * config.block_n * out_bytes)


def triton_uses_warpgroups(config: TileConfig, arch: int) -> bool:
    """Whether Triton compiles its kernel to products of warpgroups (wgmma) on `arch`; elsewhere it takes mma.sync."""
    return arch in (90, 100) and config.num_warps >= 4 and config.block_m >= 64


def warp_grid(config: TileConfig) -> tuple[int, int]:
    """Warps along M and N of the mma_sync kernel. The warp tile nearest to a square reads the least.

    A warp has at least 16 rows and 16 columns.
    """
    splits = [(m, config.num_warps // m) for m in (1, 2, 4, 8) if m <= config.num_warps]
    legal = [(m, n) for m, n in splits if config.block_m // m >= 16 and config.block_n // n >= 16]
    return min(legal or splits, key=lambda grid: (config.block_m / grid[0] + config.block_n / grid[1], grid))


def why_illegal(config: TileConfig, *, arch: int, shared_memory: int) -> str | None:
    """The reason why `config` cannot run on a GPU, or None if it can.

    arch: compute capability as in sm_86; shared_memory: bytes that one block may use.
    """
    domain = DOMAINS[config.kernel]
    for name in ("block_m", "block_n", "block_k", "num_warps", "num_stages", "stream_k"):
        value, expected = getattr(config, name), getattr(domain, name)
        if value not in expected:
            return f"{name} = {value}: expected {', '.join(map(str, expected))} for the {config.kernel} kernel"
    if not 1 <= config.group_m <= 64:
        return f"group_m = {config.group_m}: expected 1 to 64"
    if config.kernel is Kernel.WGMMA and arch != 90:
        return f"the wgmma kernel runs on sm_90 only, not on sm_{arch}; use the mma_sync or the Triton kernel"
    if config.schedule is not None and config.kernel is not Kernel.WGMMA:
        return f"schedule = {config.schedule}: expected none for the {config.kernel} kernel"
    if config.schedule is Schedule.COOPERATIVE and config.block_m != 256:
        return f"schedule = cooperative with block_m = {config.block_m}: expected block_m = 256, 128 rows per consumer"
    warps = 4 if config.kernel is Kernel.WGMMA else config.num_warps  # that hold one tile's accumulators
    rows = consumer_rows(config)
    accumulators = rows * config.block_n // (32 * warps)
    if accumulators > 128:
        return f"{accumulators} accumulators a thread: at most 128 leave registers for the operands; use more warps"
    if accumulators < 4:
        return f"{accumulators} accumulators a thread: a warp's mma tile of 16x8 needs 4; use fewer warps"
    if config.kernel is Kernel.MMA_SYNC:
        warps_m, warps_n = warp_grid(config)
        if config.block_m < 16 * warps_m or config.block_n < 16 * warps_n:
            return f"{config.num_warps} warps: a warp needs 16 rows and 16 columns of the tile; use fewer warps"
    needed = shared_memory_bound(config, arch=arch)
    if needed > shared_memory:
        return f"{needed} bytes of shared memory: a block has {shared_memory}; use fewer stages or a smaller tile"
    return None


def kernels_of(arch: int) -> tuple[Kernel, ...]:
    """The kernels that the tuner tries on an architecture.

    The mma_sync kernel runs on sm_90 too, as code of that or of an older architecture. It is far slower than wgmma.
    """
    return Kernel.TRITON, Kernel.WGMMA if arch == 90 else Kernel.MMA_SYNC


@lru_cache
def legal_configs(arch: int, shared_memory: int) -> tuple[TileConfig, ...]:
    """Every legal configuration of `kernels_of` an architecture, sorted, with group_m = GROUP_M and the usual schedule.

    group_m is an argument of a compiled kernel, so its values share one. Arguments as for `why_illegal`.
    """
    found = []
    for kernel in kernels_of(arch):
        d = DOMAINS[kernel]
        for m, n, k, warps, stages, stream_k in product(
            d.block_m, d.block_n, d.block_k, d.num_warps, d.num_stages, d.stream_k
        ):
            found.append(TileConfig(m, n, k, warps, stages, GROUP_M, kernel, stream_k))
    return tuple(sorted(c for c in found if why_illegal(c, arch=arch, shared_memory=shared_memory) is None))


def config_from(row: dict[str, Any]) -> TileConfig:
    """The TileConfig of a JSON object with its fields. Raises TypeError or ValueError for any other object."""
    schedule = row.get("schedule")
    return TileConfig(**{**row, "kernel": Kernel(row["kernel"]), "schedule": schedule and Schedule(schedule)})


def default_config(shape: GemmShape) -> TileConfig:
    """The configuration of a shape that no database knows; legal on every supported GPU.

    Few rows get a low tile, so that small batches still use all multiprocessors.
    """
    if shape.m <= 16:
        return TileConfig(16, 64, 128, num_warps=4, num_stages=4)
    if shape.m <= 64:
        return TileConfig(64, 64, 128, num_warps=4, num_stages=4)
    return TileConfig(128, 128, 64, num_warps=8, num_stages=4)


def supports(kernel: Kernel, shape: GemmShape, operation: Operation = Operation.GEMM) -> bool:
    """Whether `kernel` can serve a shape whose output has two bytes an element. For others the Triton kernel serves.

    The Gluon kernels copy 16 bytes of K at once. TMA, by which the wgmma kernel stores, writes 16 bytes at once.
    """
    columns = shape.n // 2 if operation is Operation.SWIGLU else shape.n
    return kernel is Kernel.TRITON or (shape.k % 16 == 0 and (kernel is Kernel.MMA_SYNC or columns % 8 == 0))


_FAST_DEFAULTS = {  # the largest M that each serves
    Kernel.MMA_SYNC: (
        (16, TileConfig(16, 64, 128, 4, 6, kernel=Kernel.MMA_SYNC)),
        (64, TileConfig(64, 64, 128, 4, 5, kernel=Kernel.MMA_SYNC)),
        (2**31, TileConfig(128, 128, 128, 4, 3, kernel=Kernel.MMA_SYNC)),
    ),
    Kernel.WGMMA: (
        (64, TileConfig(64, 64, 128, 8, 10, kernel=Kernel.WGMMA)),
        (2**31, TileConfig(128, 128, 128, 8, 6, kernel=Kernel.WGMMA)),
    ),
}
_FASTEST_KERNEL = {90: Kernel.WGMMA} | dict.fromkeys((80, 86, 87, 88, 89, 120, 121), Kernel.MMA_SYNC)
"""The fastest kernel by architecture. On sm_100 and its kin nobody has timed mma.sync, so the Triton kernel serves."""


def architecture_default(
    shape: GemmShape, arch: int, shared_memory: int, operation: Operation = Operation.GEMM
) -> TileConfig:
    """The configuration, by the fastest kernel of an architecture, of a shape that no database knows.

    `default_config` where that kernel does not support the shape, or has no room. Arguments as for `why_illegal`.
    """
    kernel = _FASTEST_KERNEL.get(arch)
    if kernel is not None and supports(kernel, shape, operation):
        config = next(config for most, config in _FAST_DEFAULTS[kernel] if shape.m <= most)
        if why_illegal(config, arch=arch, shared_memory=shared_memory) is None:
            return config
    return default_config(shape)


def is_near(a: int, b: int) -> bool:
    """Whether neither of two extents is more than NEAR times the other."""
    return max(a, b) <= NEAR * min(a, b)
