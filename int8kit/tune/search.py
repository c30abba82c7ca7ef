"""The choice: rank every legal configuration by the model, and on a card time the best of them.

    how(gpu)           what can be known of that card here: measured, proxy or modelled
    found = compile_space(...)              (config, even K) -> registers, spills, shared memory
    choose(shape, gpu, resources, source)   -> one database entry

Configurations that spill are left out. On a card the default is always a contestant; it, the model's first ones of the
pointer kernel and all of the others are checked bit-exact and timed, then the leaders with other widths of a band, and
the best few again in more rounds; samples are long from the leaders on. Another than the default needs to win by more
than MARGIN. Two runs need not agree where times are nearly equal: breaking ties by the model's order was given up. It
says little among the fastest, and cost up to a per cent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from int8kit.gpus import Gpu, present
from int8kit.schema import Entry, Resources, RunnerUp
from int8kit.spec import POLICY, CheckFailed, GemmShape, Kernel, Source, TileConfig, default_config
from int8kit.tune import offline, space, workers

CONTESTANTS = 4  # of each shape and the pointer kernel, by the model; of 69 shapes on two cards only its default won
FINALISTS = 4  # of those, timed again in ROUNDS longer ones
ROUNDS = 9
SIFTING_ROUNDS = 3
LEADERS = 3  # of those, tried with other widths of a band
RUNNERS_UP = 3  # finalists that an entry keeps beside the winner
MARGIN = 0.01  # a tie within 1 % keeps the default


@dataclass
class Space:
    """What each compiled kernel takes, and why the others do not compile."""

    resources: dict[workers.Job, Resources] = field(default_factory=dict)
    failed: dict[workers.Job, str] = field(default_factory=dict)
    total: int = 0

    def add(self, job: workers.Job, outcome: workers.Outcome) -> None:
        """Sort one outcome in."""
        if isinstance(outcome, Resources):
            self.resources[job] = outcome
        else:
            self.failed[job] = outcome

    @property
    def complete(self) -> bool:
        """False after an interrupt."""
        return len(self.resources) + len(self.failed) == self.total


def how(gpu: Gpu) -> Source:
    """What can be said of `gpu` on this machine: measured on itself, proxy on a newer card, else modelled."""
    card = present()
    if card is None:
        return Source.MODELLED
    if card.alias == gpu.alias:
        return Source.MEASURED
    # mma.sync code of sm_80 to sm_89 assembles for and runs on every newer card; wgmma code does not
    return Source.PROXY if gpu.arch in (80, 86, 89) and card.arch >= gpu.arch else Source.MODELLED


def jobs(shapes: Iterable[GemmShape], gpu: Gpu) -> list[workers.Job]:
    """Every kernel that a run over `shapes` has to compile, each once."""
    return sorted({(c, s.k % c.block_k == 0) for s in shapes for c in space.candidates(s, gpu)})


def compile_space(
    shapes: Iterable[GemmShape],
    gpu: Gpu,
    pool: workers.Workers,
    *,
    known: Mapping[workers.Job, workers.Outcome] = MappingProxyType({}),
    on_outcome: Callable[[workers.Job, workers.Outcome], None] = lambda *_: None,
) -> Space:
    """Compile the kernels of `shapes` for `gpu`. An interrupt returns what is done: see `Space.complete`.

    known: outcomes of an earlier run; on_outcome: told each of the others as it comes.
    """
    todo = jobs(shapes, gpu)
    found = Space(total=len(todo))
    for job in todo:
        if job in known:
            found.add(job, known[job])
    results = pool.compile_all(gpu.arch, [job for job in todo if job not in known])
    try:
        for job, outcome in results:
            found.add(job, outcome)
            on_outcome(job, outcome)
    except KeyboardInterrupt:
        results.close()  # type: ignore[attr-defined]
    return found


def rank(shape: GemmShape, gpu: Gpu, found: Space) -> list[tuple[float, TileConfig, Resources]]:
    """(estimated microseconds, configuration, resources) of each candidate without spills, best first."""
    rows = []
    for config in space.candidates(shape, gpu):
        resources = found.resources.get((config, shape.k % config.block_k == 0))
        if resources is not None and resources.spill_bytes == 0:
            rows.append((offline.estimate(shape, config, resources, gpu), config, resources))
    return sorted(rows, key=lambda row: row[:2])


def choose(
    shape: GemmShape,
    gpu: Gpu,
    found: Space,
    source: Source,
    on_wrong: Callable[[GemmShape, TileConfig, str], None] = lambda *_: None,
) -> Entry:
    """The entry of one shape. Raises CheckFailed if nothing compiled, or if no configuration is exact on the card.

    on_wrong: told each configuration that was launched and is out, and why, opening with the class.
    """
    import triton

    from int8kit.kernels import gemm

    ranked = rank(shape, gpu, found)
    if not ranked:
        reason = next(iter(found.failed.values()), "all spill")
        raise CheckFailed(f"no configuration for {shape} on {gpu.alias}: {reason}")
    modelled = Entry(
        m=shape.m,
        n=shape.n,
        k=shape.k,
        source=Source.MODELLED,
        config=ranked[0][1],
        triton=triton.__version__,
        kernel=gemm.kernel_hash(ranked[0][1].kernel),
        resources=ranked[0][2],
        tried=len(ranked),
        model_us=round(ranked[0][0], 2),
    )
    if source is Source.MODELLED:
        return modelled
    return _measured(modelled, gpu, ranked, source, on_wrong)


def _measured(
    modelled: Entry,
    gpu: Gpu,
    ranked: list[tuple[float, TileConfig, Resources]],
    source: Source,
    on_wrong: Callable[[GemmShape, TileConfig, str], None],
) -> Entry:
    from int8kit.kernels import gemm
    from int8kit.tune import measure

    shape, card = modelled.shape, present()
    assert card is not None  # `how` found one
    bench = measure.Bench(shape, card, arch=f"sm{gpu.arch}" if source is Source.PROXY else None)
    default = default_config(shape)
    plain = [config for _, config, _ in ranked if config.kernel is Kernel.POINTER][:CONTESTANTS]
    # the other kernels' few are all tried: the model has put the best of them below its first twelve
    entrants = dict.fromkeys([*(c for _, c, _ in ranked if c.kernel is not Kernel.POINTER), *plain, default])
    wrong = {config: reason for config in entrants if (reason := bench.why_not(config))}
    for config, reason in wrong.items():
        on_wrong(shape, config, reason)
    exact = [config for config in entrants if config not in wrong]
    if default in wrong or not exact:
        raise CheckFailed(f"{shape} on {card.name}: {wrong.get(default, 'no configuration is exact')}")

    def fastest(configs: list[TileConfig], sample_us: int) -> list[TileConfig]:
        times = dict(zip(configs, bench.times(configs, SIFTING_ROUNDS, sample_us), strict=True))
        return sorted(configs, key=lambda config: times[config].p50)[:FINALISTS]

    leaders = fastest(exact, measure.SAMPLE_US)
    wider = [c for leader in leaders[:LEADERS] for c in space.bands(leader) if bench.why_not(c) is None]
    finalists = list(dict.fromkeys([*fastest([*leaders, *wider], measure.HOT_US), default]))
    *times, bf16 = bench.times(finalists, ROUNDS, measure.HOT_US, bf16=True)
    final = dict(zip(finalists, times, strict=True))

    winner = min(finalists, key=lambda config: final[config].p50)
    if final[default].p50 <= final[winner].p50 * (1 + MARGIN):
        winner = default
    estimates = {replace(config, group_m=space.GROUP_M): (us, resources) for us, config, resources in ranked}

    def result(config: TileConfig) -> dict[str, Any]:
        us, resources = estimates.get(replace(config, group_m=space.GROUP_M), (None, modelled.resources))
        return {
            "config": config,
            "kernel": gemm.kernel_hash(config.kernel),
            "resources": resources,
            "model_us": None if us is None else round(us, 2),
            "time_us": round(final[config].p50, 2),
            "p20_us": round(final[config].p20, 2),
            "p80_us": round(final[config].p80, 2),
        }

    others = sorted((config for config in finalists if config != winner), key=lambda config: final[config].p50)
    return modelled.model_copy(
        update=result(winner)
        | {
            "source": source,
            "tried": len(entrants) + len(wider),
            "default_us": round(final[default].p50, 2),
            "bf16_us": round(bf16.p50, 2),
            "measured_on": card.name,
            "policy": POLICY,
            "runners_up": tuple(RunnerUp(**result(config)) for config in others[:RUNNERS_UP]),
        }
    )
