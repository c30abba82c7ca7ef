"""The search: which configurations of a shape are timed next, and which one wins. Decides only; runs nothing.

    source_of(gpu, present)                  how a target GPU can be tuned here: measured, proxy or modelled
    modelled_entry(shape, gpu, compiled)     the cost model's choice, if no present GPU can time the code

On a GPU each shape goes through rounds (`ShapeHistory`). `session` runs a round for all shapes side by side.

    round       function               configurations that are timed
    0           initial_candidates     - the default
                                       - the database's configurations for near shapes
                                       - the model's first configurations of the Triton kernel
                                       - every seed of the other kernels that the model keeps
    1, 2        next_candidates,       - the fastest so far
                prune_by_model         - their untried neighbours among all legal configurations
                                       - the fastest of near shapes
    sustained   sustained_candidates   - the fastest, in samples so long that the GPU's power limit acts
    final       finalists              - the best few of the sustained round and the default, in more samples

`entry` takes the winner of the final round.

Rounds 1 and 2 end early for a shape that is `settled`: its last round found nothing faster by more than the noise.

Kernels that spill are left out. Configurations of one round are timed interleaved, so their times compare; times of
different rounds are not compared. A configuration must beat the default by more than MARGIN.

Two runs may choose differently where times are nearly equal. Rejected: to break such ties by the cost model's order. It
says little among the fastest, and cost up to 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from int8kit import cost_model
from int8kit.database.database import Database
from int8kit.database.schema import Entry, GpuState, Resources, RunnerUp
from int8kit.errors import CheckFailed
from int8kit.gpus import Gpu, same
from int8kit.spec import (
    POLICY,
    TIE,
    GemmShape,
    Kernel,
    Source,
    TileConfig,
    default_config,
    is_near,
    kernels_of,
    operation_of,
)
from int8kit.timing.interleave import Times
from int8kit.toolchain import runnable_archs
from int8kit.tune import space
from int8kit.tune.space import Compilation, KernelVariant, variant_of

TRITON_FIRST = 4
"""Configurations of the Triton kernel in round 0, ranked by the model. On 69 shapes and two GPUs the default won among
the Triton kernel's configurations."""
SEED_BOUND = 1.4  # a seed with more than this many times the model's best estimate is not timed in round 0
NEIGHBOUR_BOUND = 1.2  # likewise for a neighbour, against the estimate of the leaders
NEW_MAX = 24  # neighbours in a round: for memory-bound shapes the model prunes almost nothing
NEAR_SHAPES = 3  # shapes whose fastest configurations are tried too
ROUNDS_MAX = 3  # with round 0
LEADERS = 3  # the fastest configurations, whose neighbours are tried
NOISE = 0.005  # a round that gains less than this, or less than its own spread, is the last
SUSTAINED = 4  # kernels in the sustained round, each by its fastest configuration
SUSTAINED_SWIZZLED = 2  # the fastest of them get every L2 swizzle width, which no model distinguishes
FINALISTS = 4  # configurations of the sustained round that are timed again
RUNNERS_UP = 3  # finalists that an entry keeps beside the winner
MARGIN = TIE  # the default wins a tie
ROUND_SAMPLES, FINAL_SAMPLES = 3, 5


@dataclass
class Compilations:
    """Resources of each compiled kernel, and why the others do not compile."""

    machine: Gpu  # the GPU whose rates the cost model takes
    resources: dict[KernelVariant, Resources] = field(default_factory=dict)
    failed: dict[KernelVariant, str] = field(default_factory=dict)
    banned: set[KernelVariant] = field(default_factory=set)  # ended a process that launched them, at any shape

    def add(self, kernel: KernelVariant, compilation: Compilation) -> None:
        """Store the result of a compilation."""
        if isinstance(compilation, Resources):
            self.resources[kernel] = compilation
        else:
            self.failed[kernel] = compilation

    def missing(self, kernels: Iterable[KernelVariant]) -> list[KernelVariant]:
        """The `kernels` that are not compiled yet, sorted and distinct."""
        return sorted({one for one in kernels if one not in self.resources and one not in self.failed})

    def of(self, config: TileConfig, shape: GemmShape) -> Resources | None:
        """Resources of the kernel that `config` needs for `shape`; None if it did not compile."""
        return self.resources.get(variant_of(config, shape))


@dataclass(frozen=True)
class RoundTimes:
    """Times of one shape's configurations, timed together in interleaved samples."""

    times: dict[TileConfig, Times]
    rejected: dict[TileConfig, str]  # with the reason
    bf16: Times | None = None  # torch's bf16 product, if requested
    state: GpuState | None = None  # of the GPU under load, if `bf16` was requested


@dataclass
class ShapeHistory:
    """The timings of one shape so far."""

    shape: GemmShape
    rounds: list[dict[TileConfig, Times]] = field(default_factory=list)
    sustained: dict[TileConfig, Times] | None = None
    rejected: dict[TileConfig, str] = field(default_factory=dict)  # the reason begins with its class

    @property
    def tried(self) -> set[TileConfig]:
        """Every configuration that was launched."""
        return set(self.rejected).union(*self.rounds, self.sustained or ())

    def fastest(self, count: int, before: int = ROUNDS_MAX) -> list[TileConfig]:
        """The `count` fastest of the last round, or of the last among the first `before` rounds; fastest first."""
        last = self.rounds[:before][-1] if self.rounds else {}
        return sorted(last, key=lambda config: (last[config].p50, config))[:count]

    @property
    def settled(self) -> bool:
        """Whether another round of neighbours is not worth its time."""
        if len(self.rounds) < 2:
            return False
        *before, last = self.rounds
        new = [times.p50 for config, times in last.items() if not any(config in one for one in before)]
        old = [times for config, times in last.items() if any(config in one for one in before)]
        if len(self.rounds) >= ROUNDS_MAX or not new or not old:
            return True
        best = min(old, key=lambda times: times.p50)
        noise = max(NOISE, (best.p80 - best.p20) / 2 / best.p50)
        return min(new) > best.p50 * (1 - noise)


def source_of(gpu: Gpu, present: Iterable[Gpu]) -> tuple[Source, Gpu | None]:
    """How the target `gpu` can be tuned with the `present` GPUs, and which of these times it.

    Measured if `gpu` is present. Proxy if a present GPU runs its code: the one with the nearest architecture. Else
    modelled, and no GPU.
    """
    present = list(present)
    for one in present:
        if one.alias == gpu.alias or same(one, gpu):
            return Source.MEASURED, one
    able = [one for one in present if gpu.arch in runnable_archs(one.arch)]
    if able:
        return Source.PROXY, min(able, key=lambda one: (one.arch, one.alias))
    return Source.MODELLED, None


def sustained_candidates(history: ShapeHistory) -> list[TileConfig]:
    """Configurations of the sustained round: the fastest of each of the fastest kernels.

    The first kernels come with every L2 swizzle width. Different kernels matter more than the next places: short
    samples order them otherwise than a running model does. Configurations that launch the same program are listed once.
    """
    kernels: dict[TileConfig, TileConfig] = {}
    for config in history.fastest(len(history.tried)):
        kernels.setdefault(space.without_swizzle(config), config)
    leaders = list(kernels.values())[:SUSTAINED]
    swizzled = [replace(config, group_m=w) for config in leaders[:SUSTAINED_SWIZZLED] for w in space.SWIZZLE_WIDTHS]
    programs: dict[TileConfig, TileConfig] = {}
    for config in [*leaders, *swizzled]:
        tile_rows = math.ceil(history.shape.m / config.block_m)  # a width beyond this has no effect
        programs.setdefault(replace(config, group_m=min(config.group_m, tile_rows)), config)
    return list(programs.values())


def rank(
    configs: Iterable[TileConfig], shape: GemmShape, compiled: Compilations
) -> list[tuple[float, TileConfig, Resources]]:
    """(estimated microseconds, configuration, resources), fastest first.

    Leaves out configurations whose kernel does not compile, spills, or is banned.
    """
    rows = []
    for config in configs:
        resources = compiled.of(config, shape)
        if resources is not None and resources.spill_bytes == 0 and variant_of(config, shape) not in compiled.banned:
            us = cost_model.estimate(shape, config, resources, compiled.machine, operation_of(shape))
            rows.append((us, config, resources))
    return sorted(rows, key=lambda row: row[:2])


def modelled_entry(shape: GemmShape, gpu: Gpu, compiled: Compilations) -> Entry:
    """The entry of the seed that the cost model ranks first. Raises CheckFailed if no seed compiled without spills.

    Only the seeds, about a hundred, are ranked. Among thousands of configurations the minimum is dominated by the
    model's errors.
    """
    import triton

    from int8kit.kernels import gemm

    candidates = space.candidates(shape, gpu)
    ranked = rank(candidates, shape, compiled)
    if not ranked:
        kernels = [variant_of(config, shape) for config in candidates]
        reason = next((compiled.failed[kernel] for kernel in kernels if kernel in compiled.failed), "all spill")
        raise CheckFailed(f"no configuration for {shape} on {gpu.alias}: {reason}")
    us, config, resources = ranked[0]
    return Entry(
        operation=operation_of(shape), m=shape.m, n=shape.n, k=shape.k, source=Source.MODELLED, config=config,
        triton=triton.__version__,
        kernel=gemm.kernel_hash(config.kernel), resources=resources, tried=len(ranked), model_us=round(us, 2),
    )  # fmt: skip


def initial_candidates(shape: GemmShape, gpu: Gpu, compiled: Compilations, known: Database) -> list[TileConfig]:
    """Configurations of round 0. known: entries whose configurations for near shapes are tried too."""
    ranked = rank(space.candidates(shape, gpu), shape, compiled)
    bound = ranked[0][0] * SEED_BOUND if ranked else 0.0
    triton_first = [config for _, config, _ in ranked if config.kernel is Kernel.TRITON][:TRITON_FIRST]
    mma_sync = [config for us, config, _ in ranked if config.kernel is Kernel.MMA_SYNC and us <= bound]
    wgmma = [config for _, config, _ in ranked if config.kernel is Kernel.WGMMA]  # so few that none is pruned
    near = [config for _, config, _ in rank(configs_of_near_shapes(shape, gpu, known), shape, compiled)]
    return list(dict.fromkeys([default_config(shape), *triton_first, *mma_sync, *wgmma, *near]))


def configs_of_near_shapes(shape: GemmShape, gpu: Gpu, known: Database) -> list[TileConfig]:
    """Configurations that the database `known` has for the nearest shapes."""
    entries = sorted(known.entries, key=lambda entry: (_distance(entry.shape, shape), entry.key))[:NEAR_SHAPES]
    near = [entry.config for entry in entries if all(map(is_near, _extents(entry.shape), _extents(shape)))]
    return [config for config in near if space.suits(config, shape) and config.kernel in kernels_of(gpu.arch)]


def next_candidates(history: ShapeHistory, gpu: Gpu, histories: Iterable[ShapeHistory]) -> list[TileConfig]:
    """Untried configurations for the next round: the neighbours of the fastest, and the fastest of the nearest shapes.

    Of the other shapes only the rounds before this one count, so a resumed run decides as an uninterrupted one.
    """
    if history.settled or not history.rounds:
        return []
    others = (one for one in histories if one is not history and one.rounds)
    near = sorted(others, key=lambda one: _distance(one.shape, history.shape))[:NEAR_SHAPES]
    candidates = {config for one in near for config in one.fastest(2, len(history.rounds))}
    candidates |= {other for config in history.fastest(LEADERS) for other in space.neighbours(config, gpu)}
    return sorted(config for config in candidates - history.tried if space.suits(config, history.shape))


def prune_by_model(history: ShapeHistory, configs: Iterable[TileConfig], compiled: Compilations) -> list[TileConfig]:
    """Configurations of the next round: the fastest so far, and the `configs` that the cost model keeps.

    Empty if the model keeps none.
    """
    leaders = history.fastest(LEADERS)
    bound = min((us for us, *_ in rank(leaders, history.shape, compiled)), default=math.inf) * NEIGHBOUR_BOUND
    new = [config for us, config, _ in rank(configs, history.shape, compiled) if us <= bound][:NEW_MAX]
    return [*leaders, *new] if new else []


def finalists(history: ShapeHistory) -> list[TileConfig]:
    """The best configurations of the sustained round, and the default."""
    sustained = history.sustained or {}
    best = sorted(sustained, key=lambda config: (sustained[config].p50, config))[:FINALISTS]
    return list(dict.fromkeys([*best, default_config(history.shape)]))


def entry(history: ShapeHistory, final: RoundTimes, compiled: Compilations, source: Source, timed_on: Gpu) -> Entry:
    """The entry of a shape whose finalists were timed. Raises CheckFailed if the default was not timed."""
    import triton

    from int8kit.kernels import gemm

    shape, default, times = history.shape, default_config(history.shape), final.times
    if default not in times:
        reason = final.rejected.get(default) or history.rejected.get(default) or "it was not timed"
        raise CheckFailed(f"{shape} on {timed_on.name}: the default configuration failed: {reason}")
    winner = min(times, key=lambda config: (times[config].p50, config))
    if times[default].p50 <= times[winner].p50 * (1 + MARGIN):
        winner = default

    def result(config: TileConfig) -> dict[str, Any]:
        resources = compiled.of(config, shape)
        assert resources is not None  # a configuration is timed only if it compiled
        return {
            "config": config,
            "kernel": gemm.kernel_hash(config.kernel),
            "resources": resources,
            "model_us": round(cost_model.estimate(shape, config, resources, compiled.machine, operation_of(shape)), 2),
            "time_us": round(times[config].p50, 2),
            "p20_us": round(times[config].p20, 2),
            "p80_us": round(times[config].p80, 2),
        }

    others = sorted((config for config in times if config != winner), key=lambda config: times[config].p50)
    return Entry(
        operation=operation_of(shape), m=shape.m, n=shape.n, k=shape.k, source=source, triton=triton.__version__,
        tried=len(history.tried),
        default_us=round(times[default].p50, 2), bf16_us=round(final.bf16.p50, 2) if final.bf16 else None,
        measured_on=timed_on.name, gpu_state=final.state, policy=POLICY,
        runners_up=tuple(RunnerUp(**result(config)) for config in others[:RUNNERS_UP]), **result(winner),
    )  # fmt: skip


def _extents(shape: GemmShape) -> Sequence[int]:
    return shape.m, shape.n, shape.k


def _distance(a: GemmShape, b: GemmShape) -> float:
    """Distance of two shapes: the sum of the log ratios of M, N and K."""
    return sum(abs(math.log(x / y)) for x, y in zip(_extents(a), _extents(b), strict=True))
