"""The choice: which configurations of a shape are timed next, and which one its entry takes. Decides; runs nothing.

    how(gpu, cards)                  what can be known of that card here: measured, proxy or modelled
    modelled(shape, gpu, found)      the model's choice, where no card can time the code

On a card, a shape goes through rounds (`Trail`), and `session` through the shapes of a round side by side:

    0      `first`: the default, what the database has for near shapes, the model's first ones of the Triton kernel and
           all seeds of the others that the model does not rule out
    1, 2   `ahead`, `worthwhile`: the fastest so far, with their untried neighbours in the space of all legal
           configurations and the fastest of near shapes; a shape is `settled` once a round has found nothing faster
           by more than the noise
    hot    `hot`: the fastest, in samples so long that the card's power limit counts
    final  the best few of these and the default again, in more rounds: `entry`

What spills is left out. Configurations of one round are timed interleaved, so that their times compare; those of
different rounds are not compared. Another than the default needs to win by more than MARGIN. Two runs need not agree
where times are nearly equal: breaking ties by the model's order was given up. It says little among the fastest, and
cost up to a per cent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from int8kit import cost_model
from int8kit.database.database import Database
from int8kit.database.schema import Entry, Resources, RunnerUp
from int8kit.errors import CheckFailed
from int8kit.gpus import Gpu
from int8kit.spec import POLICY, TIE, GemmShape, Kernel, Source, TileConfig, default_config, is_near, kernels_of
from int8kit.timing.interleave import Times
from int8kit.tune import space, workers
from int8kit.tune.tasks import Timed

CONTESTANTS = 4  # of each shape and the Triton kernel, by the model; of 69 shapes on two cards only its default won
RULED_OUT = 1.4  # times the model's best: seeds beyond it are not timed
WORTHWHILE = 1.2  # times the leader, by the model: neighbours beyond it are not timed
FRESH = 24  # neighbours in a round: where reading the weight is all, the model rules out next to none
NEAR = 3  # shapes whose fastest are tried too
ROUNDS_MAX = 3  # with the first
LEADERS = 3  # whose neighbours are tried
NOISE = 0.005  # a round that gains less, or less than its own spread, is the last
HOTTEST = 6  # that are timed hot
BANDED = 2  # of these in bands of every width, which no model tells apart
FINALISTS = 4  # of those, timed again
RUNNERS_UP = 3  # finalists that an entry keeps beside the winner
MARGIN = TIE  # a tie keeps the default
SIFTING_SAMPLES, FINAL_SAMPLES = 3, 9


@dataclass
class Space:
    """What each compiled kernel takes, and why the others do not compile. machine: what the model reckons with."""

    machine: Gpu
    resources: dict[workers.Job, Resources] = field(default_factory=dict)
    failed: dict[workers.Job, str] = field(default_factory=dict)
    banned: set[workers.Job] = field(default_factory=set)  # ended a process that launched them, at whatever shape

    def add(self, job: workers.Job, outcome: workers.Outcome) -> None:
        """Sort one outcome in."""
        if isinstance(outcome, Resources):
            self.resources[job] = outcome
        else:
            self.failed[job] = outcome

    def lacks(self, jobs: Iterable[workers.Job]) -> list[workers.Job]:
        """Those of `jobs` that are yet to be compiled, sorted, each once."""
        return sorted({job for job in jobs if job not in self.resources and job not in self.failed})

    def of(self, config: TileConfig, shape: GemmShape) -> Resources | None:
        """What the kernel that `config` needs for `shape` takes; None if it did not compile."""
        return self.resources.get(workers.job(config, shape))


@dataclass
class Trail:
    """What is known of one shape."""

    shape: GemmShape
    rounds: list[dict[TileConfig, Times]] = field(default_factory=list)
    hot: dict[TileConfig, Times] | None = None
    wrong: dict[TileConfig, str] = field(default_factory=dict)  # out, and why, opening with the class

    @property
    def tried(self) -> set[TileConfig]:
        """Every configuration that was launched."""
        return set(self.wrong).union(*self.rounds, self.hot or ())

    def fastest(self, count: int, before: int = ROUNDS_MAX) -> list[TileConfig]:
        """Of the last round, or of the last of the first `before`; the first first."""
        last = self.rounds[:before][-1] if self.rounds else {}
        return sorted(last, key=lambda config: (last[config].p50, config))[:count]

    @property
    def settled(self) -> bool:
        """True if another round of neighbours is not worth it."""
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


def how(gpu: Gpu, cards: Iterable[Gpu]) -> tuple[Source, Gpu | None]:
    """What can be said of `gpu` where there are `cards`, and which of them times it.

    Measured on itself, proxy on the newer card that is next to it, else modelled.
    """
    cards = list(cards)
    for card in cards:
        if card.alias == gpu.alias:
            return Source.MEASURED, card
    # mma.sync code of sm_80 to sm_89 assembles for and runs on every newer card; wgmma code does not
    newer = [card for card in cards if gpu.arch in (80, 86, 89) and card.arch >= gpu.arch]
    if newer:
        return Source.PROXY, min(newer, key=lambda card: (card.arch, card.alias))
    return Source.MODELLED, None


def hot(trail: Trail) -> list[TileConfig]:
    """What the hot round times: the fastest, and the first of them in bands of every width; equal programs once."""
    bands = [replace(config, group_m=width) for config in trail.fastest(BANDED) for width in space.BANDS]
    programs: dict[TileConfig, TileConfig] = {}
    for config in [*trail.fastest(HOTTEST), *bands]:
        tile_rows = math.ceil(trail.shape.m / config.block_m)  # of which a wider band has no more
        programs.setdefault(replace(config, group_m=min(config.group_m, tile_rows)), config)
    return list(programs.values())


def rank(configs: Iterable[TileConfig], shape: GemmShape, found: Space) -> list[tuple[float, TileConfig, Resources]]:
    """(estimated microseconds, configuration, resources), best first, of those that compile without spills and run."""
    rows = []
    for config in configs:
        resources = found.of(config, shape)
        if resources is not None and resources.spill_bytes == 0 and workers.job(config, shape) not in found.banned:
            rows.append((cost_model.estimate(shape, config, resources, found.machine), config, resources))
    return sorted(rows, key=lambda row: row[:2])


def modelled(shape: GemmShape, gpu: Gpu, found: Space) -> Entry:
    """The model's first choice of the seeds. Raises CheckFailed if none of them compiled.

    Of the seeds alone: over a thousand more, the choice would be the one that the model flatters most.
    """
    import triton

    from int8kit.kernels import gemm

    candidates = space.candidates(shape, gpu)
    ranked = rank(candidates, shape, found)
    if not ranked:
        jobs = [workers.job(config, shape) for config in candidates]
        reason = next((found.failed[job] for job in jobs if job in found.failed), "all spill")
        raise CheckFailed(f"no configuration for {shape} on {gpu.alias}: {reason}")
    us, config, resources = ranked[0]
    return Entry(
        m=shape.m, n=shape.n, k=shape.k, source=Source.MODELLED, config=config, triton=triton.__version__,
        kernel=gemm.kernel_hash(config.kernel), resources=resources, tried=len(ranked), model_us=round(us, 2),
    )  # fmt: skip


def first(shape: GemmShape, gpu: Gpu, found: Space, known: Database) -> list[TileConfig]:
    """What round 0 times. known: entries whose configurations for near shapes are tried too."""
    ranked = rank(space.candidates(shape, gpu), shape, found)
    bound = ranked[0][0] * RULED_OUT if ranked else 0.0
    plain = [config for _, config, _ in ranked if config.kernel is Kernel.TRITON][:CONTESTANTS]
    # the seeds of wgmma code are few
    fitted = [config for us, config, _ in ranked if config.kernel is Kernel.MMA_SYNC and us <= bound]
    others = [*fitted, *(config for _, config, _ in ranked if config.kernel is Kernel.WGMMA)]
    theirs = [config for _, config, _ in rank(of_near(shape, gpu, known), shape, found)]
    return list(dict.fromkeys([default_config(shape), *plain, *others, *theirs]))


def of_near(shape: GemmShape, gpu: Gpu, known: Database) -> list[TileConfig]:
    """What the database has for the nearest shapes."""
    entries = sorted(known.entries, key=lambda entry: (_far(entry.shape, shape), entry.key))[:NEAR]
    near = [entry.config for entry in entries if all(map(is_near, _extents(entry.shape), _extents(shape)))]
    return [config for config in near if space.suits(config, shape) and config.kernel in kernels_of(gpu.arch)]


def ahead(trail: Trail, gpu: Gpu, trails: Iterable[Trail]) -> list[TileConfig]:
    """What is yet to be tried: the neighbours of the fastest, and the fastest of the nearest shapes.

    Of those as they were before this round: a run that goes on where another was ended decides alike.
    """
    if trail.settled or not trail.rounds:
        return []
    near = sorted((t for t in trails if t is not trail and t.rounds), key=lambda t: _far(t.shape, trail.shape))[:NEAR]
    found = {config for t in near for config in t.fastest(2, len(trail.rounds))}
    found |= {other for config in trail.fastest(LEADERS) for other in space.neighbours(config, gpu)}
    return sorted(config for config in found - trail.tried if space.suits(config, trail.shape))


def worthwhile(trail: Trail, configs: Iterable[TileConfig], found: Space) -> list[TileConfig]:
    """What the next round times: of `configs` those that the model does not rule out, with the fastest so far."""
    leaders = trail.fastest(LEADERS)
    bound = min((us for us, *_ in rank(leaders, trail.shape, found)), default=math.inf) * WORTHWHILE
    new = [config for us, config, _ in rank(configs, trail.shape, found) if us <= bound][:FRESH]
    return [*leaders, *new] if new else []


def finalists(trail: Trail) -> list[TileConfig]:
    """The best of the hot round, and the default."""
    hot = trail.hot or {}
    best = sorted(hot, key=lambda config: (hot[config].p50, config))[:FINALISTS]
    return list(dict.fromkeys([*best, default_config(trail.shape)]))


def entry(trail: Trail, timed: Timed, found: Space, source: Source, card: Gpu) -> Entry:
    """The entry of a shape whose finalists were timed. Raises CheckFailed if the default is not exact on the card."""
    import triton

    from int8kit.kernels import gemm

    shape, default, final = trail.shape, default_config(trail.shape), timed.times
    if default not in final:
        reason = timed.wrong.get(default) or trail.wrong.get(default) or "it was not timed"
        raise CheckFailed(f"{shape} on {card.name}: the default is out: {reason}")
    winner = min(final, key=lambda config: (final[config].p50, config))
    if final[default].p50 <= final[winner].p50 * (1 + MARGIN):
        winner = default

    def result(config: TileConfig) -> dict[str, Any]:
        resources = found.of(config, shape)
        assert resources is not None  # else it would not have been timed
        return {
            "config": config,
            "kernel": gemm.kernel_hash(config.kernel),
            "resources": resources,
            "model_us": round(cost_model.estimate(shape, config, resources, found.machine), 2),
            "time_us": round(final[config].p50, 2),
            "p20_us": round(final[config].p20, 2),
            "p80_us": round(final[config].p80, 2),
        }

    others = sorted((config for config in final if config != winner), key=lambda config: final[config].p50)
    return Entry(
        m=shape.m, n=shape.n, k=shape.k, source=source, triton=triton.__version__, tried=len(trail.tried),
        default_us=round(final[default].p50, 2), bf16_us=round(timed.bf16.p50, 2) if timed.bf16 else None,
        measured_on=card.name, gpu_state=timed.state, policy=POLICY,
        runners_up=tuple(RunnerUp(**result(config)) for config in others[:RUNNERS_UP]), **result(winner),
    )  # fmt: skip


def _extents(shape: GemmShape) -> Sequence[int]:
    return shape.m, shape.n, shape.k


def _far(a: GemmShape, b: GemmShape) -> float:
    """How far two shapes are from each other: log distances of m, n and k."""
    return sum(abs(math.log(x / y)) for x, y in zip(_extents(a), _extents(b), strict=True))
