"""What must hold, and the run that tries to break it.

    accumulator   the int32 sums equal int64-exact arithmetic, and `torch._int_mm` where that takes the shape
    output        the dequantized output is bit-equal to `reference.scaled_mm`; NaN equals NaN
    swiglu        so is the output of the SwiGLU epilogue to `reference.scaled_mm_swiglu`
    quantize      q and s are bit-equal to `reference.quantize`
    batch, ...    what `properties` says of any INT8 GEMM beside these, of the kernels here
    entry         the first two for one database entry: at its full size on a card, reduced on a CPU

Operands lie in buffers of poison and outputs in buffers of sentinels (`buffers`). There is no tolerance.

Examples are drawn, shrunk and told by `hold`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from int8kit import reference
from int8kit.database.database import Choice, Database, Key
from int8kit.database.schema import Entry, Stamp, stamp
from int8kit.kernels import gemm, quantize
from int8kit.spec import GemmShape, Kernel, TileConfig, default_config
from int8kit.verify import implementations
from int8kit.verify.compare import difference, operands
from int8kit.verify.examples.guarded_buffers import FAR_ROOM, Canvas, chunk_guard, far, padded, tile_guard
from int8kit.verify.examples.strategies import FLOAT_KINDS, OUT_DTYPES, Draw, Far, Rows, draws, float_matrix, rows
from int8kit.verify.executors import Executor
from int8kit.verify.properties import general, pdl_probe, row_kernels
from int8kit.verify.runner import Result, hold, strict

Stamps = dict[Key, list[Stamp]]
"""What passed, by entry key."""

SMALL_TILES = (  # many tiles, bands and k-steps in a small matrix
    TileConfig(16, 16, 32, num_warps=1, num_stages=2, group_m=1),
    TileConfig(16, 32, 32, num_warps=1, num_stages=3, group_m=2),
    TileConfig(32, 16, 64, num_warps=2, num_stages=2, group_m=3),
)
_DEEP = tuple(  # sums beyond 2**24, where the conversion to float32 rounds, and the largest K
    Draw(GemmShape(m, n, k), SMALL_TILES[2], kind, 1, bias, torch.float32)
    for m, n, k, kind, bias in (
        (17, 24, 2112, "positive", torch.float32), (2, 3, 131071, "least", None),
        (17, 24, 53248, "normal", None), (64, 64, 53248, "positive", torch.bfloat16), (17, 24, 131071, "least", None),
    )
)  # fmt: skip
_FAR: dict[str, tuple[Draw, ...]] = {  # rows beyond 2**31 elements, in one operand at a time
    name: tuple(Draw(GemmShape(3, 6, 40), SMALL_TILES[0], "uniform", 1, None, torch.float16, far=one) for one in which)
    for name, which in dict[str, tuple[Far, ...]](accumulator=("x", "w"), output=("out",), swiglu=("out",)).items()
}
_EVERY = tuple(  # each kind in each dtype, which a draw may leave out
    Rows(3, 300, kind, 0, dtype, 3) for kind in FLOAT_KINDS for dtype in OUT_DTYPES
)
_LONG = tuple(  # rows in one pass and, of each kind, in several
    Rows(3, k, kind, 0, dtype, 3)
    for k, kind in ((12288, "normal"), (53248, "one hot"), (53248, "inf"), *((17000, kind) for kind in FLOAT_KINDS))
    for dtype in (torch.bfloat16, torch.float32)
)  # fmt: skip


MORE = tuple(name for name in general.ALL if name not in ("accumulator", "output"))
MOST_ROWS = 100
SPARED = 10  # one of so many examples is enough of these: they run the kernel several times


@dataclass(frozen=True)
class Budget:
    """How hard to look: examples a property, and the extents that an executor can afford."""

    examples: int
    most: int  # M and N
    ops: int  # 2 M N K
    deep: bool  # the largest K as well
    far: bool  # rows beyond 2**31 elements as well


def budget(executor: Executor, examples: int | None) -> Budget:
    """The interpreter makes some 10^7 operations a second; a card is fast, but compiles for half a second an example.

    examples: None for what takes about a minute.
    """
    if executor.on == "interpreter":
        return Budget(examples or 150, most=150, ops=4_000_000, deep=False, far=True)
    roomy = torch.cuda.mem_get_info()[0] > FAR_ROOM
    return Budget(examples or 60, most=600, ops=2_000_000_000, deep=True, far=roomy)


def _canvas(d: Draw, columns: int, dtype: torch.dtype, device: str) -> Canvas:
    canvas = Canvas(d.shape.m, columns, d.padding, tile_guard(columns), dtype, device)
    if d.far == "out":
        canvas.view = far(d.shape.m, columns, dtype, device)
    return canvas


def check_accumulator(d: Draw, executor: Executor) -> str | None:
    """How the int32 sums differ from int64-exact ones and from `torch._int_mm`, or None."""
    x, w, *_ = operands(d, executor.device)
    canvas = _canvas(d, d.shape.n, torch.int32, executor.device)
    got = gemm.accumulate(x, w, config=d.config, out=canvas.view, arch=executor.arch)
    why = difference(got, reference.accumulate(x, w))
    if why is None and d.shape.m > 16 and d.shape.n % 8 == 0 and d.shape.k % 8 == 0:
        theirs = torch._int_mm(x.contiguous(), w.contiguous().t())
        why = difference(got, theirs)
        why = why and f"against torch._int_mm: {why}"
    return why or canvas.touched()


def check_output(d: Draw, executor: Executor) -> str | None:
    """How the dequantized output differs from the reference, or None."""
    x, w, sx, sw, bias = operands(d, executor.device)
    canvas = _canvas(d, d.shape.n, d.out_dtype, executor.device)
    got = gemm.scaled_mm(x, w, sx, sw, bias, config=d.config, out=canvas.view, arch=executor.arch)
    return difference(got, reference.scaled_mm(x, w, sx, sw, bias, out_dtype=d.out_dtype)) or canvas.touched()


def check_swiglu(d: Draw, executor: Executor) -> str | None:
    """How the output of the SwiGLU epilogue differs from the reference, or None; N is rounded up to a pair."""
    shape = GemmShape(d.shape.m, d.shape.n + d.shape.n % 2, d.shape.k)
    if d.config.kernel is not Kernel.TRITON:
        shape = GemmShape(shape.m, -(-shape.n // 16) * 16, shape.k)
    x, w, sx, sw, bias = operands(replace(d, shape=shape), executor.device)
    canvas = _canvas(d, shape.n // 2, d.out_dtype, executor.device)
    got = gemm.scaled_mm_swiglu(x, w, sx, sw, bias, config=d.config, out=canvas.view, arch=executor.arch)
    return difference(got, reference.scaled_mm_swiglu(x, w, sx, sw, bias, out_dtype=d.out_dtype)) or canvas.touched()


def check_quantize(r: Rows, executor: Executor) -> str | None:
    """How q or s differs from the reference, or None."""
    guard = chunk_guard(r.k)
    x = padded(float_matrix(r.m, r.k, r.kind, r.seed, r.dtype, executor.device), r.padding, guard)
    values = Canvas(r.m, r.k, 2 * r.padding, guard, torch.int8, executor.device)  # another stride than that of x
    column = Canvas(1, r.m, 0, 1, torch.float32, executor.device)
    q, s = quantize.quantize(x, out=(values.view, column.view[0]))
    want_q, want_s = reference.quantize(x)
    why_s = difference(s, want_s) or column.touched()
    why_q = difference(q, want_q) or values.touched()
    return (why_s and f"scales: {why_s}") or (why_q and f"values: {why_q}")


def check_entry(entry: Entry | Choice, executor: Executor) -> str | None:
    """How an entry's configuration differs from the truth on normal and on extreme data, or None.

    On a card at the entry's size, against `torch._int_mm` on every element and int64-exact arithmetic on sampled rows;
    in the interpreter at `reduced` size, where every element is compared exactly.
    """
    shape = reduced(entry.shape, entry.config) if executor.on == "interpreter" else entry.shape
    for kind in ("normal", "extremes"):
        d = Draw(shape, entry.config, kind, 3, torch.bfloat16, torch.bfloat16)
        if executor.on == "interpreter":
            why = check_accumulator(d, executor) or check_output(d, executor)
        else:
            why = _check_full(d, executor)
        if why:
            return f"{d}: {why}"
    return None


def _check_full(d: Draw, executor: Executor) -> str | None:
    x, w, sx, sw, bias = operands(d, executor.device)
    got = gemm.accumulate(x, w, config=d.config, arch=executor.arch)
    picks = torch.linspace(0, d.shape.m - 1, min(d.shape.m, 32), device=x.device).long()
    why = difference(got[picks], reference.accumulate(x[picks], w))
    if why is None and d.shape.m > 16 and d.shape.n % 8 == 0 and d.shape.k % 8 == 0:
        why = difference(got, torch._int_mm(x, w.t()))
    if why:
        return f"accumulator: {why}"
    want = reference.dequantize(got, sx, sw, bias, d.out_dtype)
    out = gemm.scaled_mm(x, w, sx, sw, bias, config=d.config, out_dtype=d.out_dtype, arch=executor.arch)
    why = difference(out, want)
    return why and f"output: {why}"


def runs_on(config: TileConfig, executor: Executor) -> bool:
    """False for what an executor cannot run: Triton's interpreter runs the Triton kernel alone."""
    return executor.on != "interpreter" or config.kernel is Kernel.TRITON


def reduced(shape: GemmShape, config: TileConfig) -> GemmShape:
    """A small shape with the same tails: up to two tiles each way and three steps of K, remainders kept."""

    def cut(size: int, block: int, whole: int) -> int:
        tail = size % block
        return min(size, (whole - 1) * block + tail if tail else whole * block)

    return GemmShape(
        cut(shape.m, config.block_m, 2), cut(shape.n, config.block_n, 2), cut(shape.k, config.block_k, 3)
    )  # fmt: skip


def names(executor: Executor, database: Database, unlisted: Sequence[Choice] = ()) -> list[str]:
    """The checks that apply, in the order in which they are run."""
    found = ["accumulator", "output", "swiglu", *MORE]
    if not pdl_probe.overlaps(executor.device):
        found.remove("order")
    if executor.arch is None:  # the kernels over rows have one source and no configuration
        found += ["quantize", *row_kernels.KERNELS]
    return [*found, "entries"] if database.entries or unlisted else found


def run(
    name: str,
    executor: Executor,
    database: Database,
    *,
    examples: int | None = None,
    random_seed: int = 0,
    more: Iterable[TileConfig] = (),
    kept: Iterable[Draw] = (),
    unlisted: Sequence[Choice] = (),
    on_example: Callable[[object], None] = lambda _: None,
) -> tuple[Result, Stamps]:
    """One check of `names`: its result, and for "entries" the stamps of those that passed.

    Properties are tried over the database's configurations, the default, SMALL_TILES and `more`, and on `kept`: what
    failed in earlier runs. unlisted: what serves shapes that have no entry, checked like entries. on_example is told of
    each example before it is tried.
    """
    served: tuple[Entry | Choice, ...] = (*database.entries, *unlisted)
    tiles = {*SMALL_TILES, *(one.config for one in served), default_config(GemmShape(1024, 1, 1)), *more}
    with strict():
        if name == "entries":
            return _check_entries(executor, database, unlisted, on_example)
        return _property(name, executor, tiles, examples, random_seed, on_example, kept), {}


def prove(
    name: str,
    executor: Executor,
    tiles: Iterable[TileConfig],
    *,
    examples: int | None = None,
    random_seed: int = 0,
    on_example: Callable[[object], None] = lambda _: None,
) -> Result:
    """As `run`, of one property over given configurations and without a database."""
    with strict():
        return _property(name, executor, tiles, examples, random_seed, on_example)


def _property(
    name: str,
    executor: Executor,
    tiles: Iterable[TileConfig],
    examples: int | None,
    random_seed: int,
    on_example: Callable[[object], None],
    kept: Iterable[Draw] = (),
) -> Result:
    limits = budget(executor, examples)
    more: dict[str, Any] = {"examples": limits.examples, "random_seed": random_seed, "on_example": on_example}
    if name == "quantize":
        return hold(name, executor, rows(2000), check_quantize, always=(*_EVERY, *_LONG), **more)
    if name in row_kernels.KERNELS:
        more["examples"] = max(1, limits.examples // 5)
        return hold(
            name, executor, row_kernels.examples(name), row_kernels.check, always=row_kernels.always(name), **more
        )
    runnable = sorted({config for config in tiles if runs_on(config, executor)})
    again = tuple(d for d in kept if runs_on(d.config, executor))
    if name in MORE:
        ours = implementations.ours(executor, tuple(runnable))
        more["examples"] = max(1, limits.examples // SPARED)
        gemms = draws(ours.tiles, min(limits.most, MOST_ROWS), limits.ops // SPARED)
        return hold(name, executor, gemms, lambda d, _: general.ALL[name](d, ours), always=again, **more)
    check = CHECKS[name]
    always = (*_many(runnable), *_shared(runnable)) if name != "swiglu" else ()
    if any(config.kernel is Kernel.TRITON for config in runnable):  # whose these are
        always += (*(_DEEP if limits.deep else _DEEP[:2]), *(_FAR[name] if limits.far else ()))
    gemms = draws(tuple(runnable), limits.most, limits.ops)
    return hold(name, executor, gemms, check, always=(*again, *always), **more)


def _many(tiles: Iterable[TileConfig]) -> tuple[Draw, ...]:
    """More than 2**16 rows, and columns: by tall and wide tiles of the plain kernel, and by the largest of the others.

    Of these fewest are needed, which the interpreter makes one after the other.
    """
    tall, wide = (TileConfig(*block, num_warps=4, num_stages=2) for block in ((256, 16, 32), (16, 256, 32)))
    largest = {config.kernel: config for config in sorted(tiles, key=lambda c: c.block_m * c.block_n)}
    shapes = (GemmShape(65600, 16, 64), GemmShape(16, 65600, 64))
    pairs = [(config, config) if kernel is not Kernel.TRITON else (tall, wide) for kernel, config in largest.items()]
    return tuple(
        Draw(s, tile, "uniform", 1, None, torch.float32) for pair in pairs for s, tile in zip(shapes, pair, strict=True)
    )


def _shared(tiles: Iterable[TileConfig]) -> tuple[Draw, ...]:
    """100 tiles of nine steps, the last a partial one, for the smallest and the largest stream-K tile of each kernel.

    No card's workers share those evenly: parts begin and end inside tiles, and many are a worker's second.
    """
    sharing = sorted((c for c in tiles if c.stream_k), key=lambda c: c.block_m * c.block_n)
    of = [[c for c in sharing if c.kernel is kernel] for kernel in Kernel]
    return tuple(
        Draw(
            GemmShape(10 * c.block_m - 3, 10 * c.block_n - 8, 8 * c.block_k + 16), c, "uniform", 1, None, torch.float32
        )
        for c in sorted({c for some in of for c in (*some[:1], *some[-1:])})
    )


CHECKS = {"accumulator": check_accumulator, "output": check_output, "swiglu": check_swiglu}


def _check_entries(
    executor: Executor, database: Database, unlisted: Sequence[Choice], on_example: Callable[[object], None]
) -> tuple[Result, Stamps]:
    import triton

    verdicts: dict[tuple[GemmShape, TileConfig], str | None] = {}
    stamps: Stamps = {}
    failure = None
    # what another Triton compiles is not proven here
    serving: list[Entry | Choice] = [*database.usable_entries(gemm.toolchain()), *unlisted]
    runnable = [one for one in serving if runs_on(one.config, executor)]
    for one in sorted(runnable, key=lambda e: e.shape.ops):
        shape = reduced(one.shape, one.config) if executor.on == "interpreter" else one.shape
        on_example(f"{shape}, {one.config}")
        if (shape, one.config) not in verdicts:
            torch.cuda.empty_cache()  # shapes differ: what one leaves, the next cannot use; nothing without a GPU
            try:
                verdicts[shape, one.config] = check_entry(one, executor)
            except Exception as error:
                verdicts[shape, one.config] = f"{one.shape}, {one.config}: {type(error).__name__}: {error}"
        why = verdicts[shape, one.config]
        if why is None and isinstance(one, Entry):
            stamps[one.key] = [
                stamp(
                    executor.on, device=executor.name, arch=executor.code, entry=one,
                    kernel=gemm.kernel_hash(one.config.kernel), triton=triton.__version__,
                )
            ]  # fmt: skip
        failure = failure or why
    return Result("entries", str(executor), len(runnable), failure, skipped=len(serving) - len(runnable)), stamps
