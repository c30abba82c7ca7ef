"""A run of the tuner over a set of shapes, for one card or several: compile, time, choose, and write what is found.

    targets = plan(["rtx3090"], cards, path=None)       [Target(gpu, path, source, card)]
    run(shapes, targets, pool)                          [Outcome(entries=[Entry, ...], kept=2, rejected={...}, ...)]

Each target is a program of `workers`, so that cards of several kinds are busy at once, and each feeds its own file;
this process is the only one that writes. A program goes in rounds over all its shapes, as `search` says: what a round
needs is compiled on every core, then timed, a shape at a time on each card. Every kernel, every shape's round and every
entry is in the journal (`journal`) before the next one begins: a run that is killed goes on by the same command. At the
end shapes share kernels where that costs next to nothing (`portfolio`).

A configuration that ends its process or hangs while it is timed takes its shape's round with it. Then the round halts,
all of that shape's are launched one by one, in processes that may end, and the round goes on, for every shape without
the kernels that did: what hangs at one shape does so at the next, for a minute each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from int8kit.database import store
from int8kit.database.database import Database
from int8kit.database.schema import Entry
from int8kit.errors import CheckFailed
from int8kit.gpus import Gpu
from int8kit.kernels import gemm
from int8kit.spec import POLICY, GemmShape, Source, TileConfig, default_config
from int8kit.timing import interleave
from int8kit.tune import consolidate, measure, search, space, tasks, workers
from int8kit.tune.journal import Journal
from int8kit.tune.workers import Batch, Ended, Program, Workers

ROUND_S = 120.0  # of one shape's round, which takes seconds; longer where another host has compiled its kernels
LAUNCH_S = 30.0  # of one launch, with the operands made and checked

ENDED = ("crash:", "timeout:")  # what `workers.Ended` opens with

Stage = Callable[[str, int], Callable[[], None]]
"""What shows progress: told a description and a total, it gives what is called after each step."""


@dataclass(frozen=True)
class Target:
    """A card to tune for, the file that it feeds, and the card that times it, if any."""

    gpu: Gpu
    path: Path
    source: Source
    card: Gpu | None

    @property
    def arch(self) -> str | None:
        """The older card's code that is timed, if so: "sm86"."""
        return f"sm{self.gpu.arch}" if self.source is Source.PROXY else None

    @property
    def machine(self) -> Gpu:
        """What the model reckons with: what is timed, of a proxy the newer card with the older one's code."""
        return replace(self.card, arch=self.gpu.arch) if self.card and self.source is Source.PROXY else self.gpu

    @property
    def identity(self) -> dict[str, Any]:
        """What makes results of two runs comparable, as plain JSON."""
        chain = gemm.toolchain()
        return {
            "gpu": self.gpu.alias,
            "source": self.source.value,
            "card": self.card and self.card.name,
            "triton": chain.triton,
            "kernels": {kernel.value: digest for kernel, digest in chain.kernels.items()},
            "policy": POLICY,
        }


@dataclass
class Outcome:
    """What a target came to."""

    target: Target
    entries: list[Entry] = field(default_factory=list)  # one a shape, sorted
    kept: int = 0  # of them gave way to a stronger one that the database had
    rejected: dict[str, int] = field(default_factory=dict)  # configurations out, by class
    failed: dict[GemmShape, str] = field(default_factory=dict)  # shapes without an entry, and why
    resumed: int = 0  # shapes that an earlier, killed run had done
    kernels: tuple[int, int] = (0, 0)  # distinct ones, before and after `portfolio.reduce`


def plan(gpus: Iterable[Gpu], cards: Sequence[Gpu], path: Path | None = None) -> list[Target]:
    """A target for each of `gpus`, where there are `cards`. path: the file of one; None: the user's own."""
    targets = []
    for gpu in gpus:
        source, card = search.how(gpu, cards)
        targets.append(Target(gpu, path or store.user_path(gpu.alias), source, card))
    return targets


def check_health(pool: Workers, note: Callable[[str], None] = lambda _: None) -> None:
    """Raises CheckFailed if a card of the pool is in no state to be timed."""
    cards = pool.cards()

    def ask(card: Gpu) -> Program[None]:
        calls = [(i,) for i in range(cards.count(card))]  # all workers are free: each takes one
        results = yield Batch(tasks.health, calls, card=card.alias)
        for rate, reason in (r if not isinstance(r, Ended) else (0.0, str(r)) for r in results.values()):
            if reason:
                raise CheckFailed(reason)
            note(f"{card.name}: {rate:.0f} bf16 TFLOP/s, healthy")

    pool.drive([ask(card) for card in dict.fromkeys(cards)])


def run(
    shapes: Iterable[GemmShape],
    targets: Iterable[Target],
    pool: Workers,
    *,
    force: bool = False,
    stage: Stage = lambda *_: lambda: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Tune `shapes` for each target.

    Raises FileError if another tuner writes one of the files. A shape for which nothing works is in `Outcome.failed`.
    """
    wanted = sorted(set(shapes))
    return pool.drive([_tune(wanted, target, force, stage, note) for target in targets])


def _tune(
    wanted: list[GemmShape], target: Target, force: bool, stage: Stage, note: Callable[[str], None]
) -> Program[Outcome]:
    with Journal(target.path, target.identity) as journal:
        outcome = Outcome(target, resumed=len(set(wanted) & set(journal.chosen)))
        if journal.compiled or journal.chosen:
            before = f"{len(journal.compiled)} kernels compiled, {outcome.resumed} of {len(wanted)} shapes chosen"
            note(f"{target.gpu.alias}: going on where a run was ended: {before}")
        found = search.Space(target.machine)
        for job, result in journal.compiled.items():
            found.add(job, result)
        found.banned |= {workers.job(c, s) for (s, c), why in journal.wrong.items() if why.startswith(ENDED)}
        left = [shape for shape in wanted if shape not in journal.chosen]
        one = _Run(target, journal, found, stage)

        def keep(entry: Entry) -> None:
            outcome.kept += not store.update(target.path, target.gpu, [entry], force=force).holds(entry)
            journal.add_chosen(entry)

        if target.card is None:
            yield from one.compile(workers.job(c, s) for s in left for c in space.candidates(s, target.gpu))
            for shape in left:
                one.attempt(shape, partial(_modelled, shape, target.gpu, found, keep), outcome)
        else:
            yield from one.explore(left, store.gather(target.gpu, gemm.toolchain())[0])
            yield from one.finish(left, keep, outcome)
        outcome.entries = [journal.chosen[shape] for shape in wanted if shape in journal.chosen]
        reduced = consolidate.reduce(outcome.entries)
        outcome.kernels = len(consolidate.kernels(outcome.entries)), len(consolidate.kernels(reduced))
        changed = [new for new, old in zip(reduced, outcome.entries, strict=True) if new != old]
        store.update(target.path, target.gpu, changed, force=force)
        outcome.entries = reduced
        outcome.rejected = dict(Counter(w.partition(":")[0] for w in (*found.failed.values(), *journal.wrong.values())))
        journal.finish()
    return outcome


def _modelled(shape: GemmShape, gpu: Gpu, found: search.Space, keep: Callable[[Entry], None]) -> None:
    keep(search.modelled(shape, gpu, found))


@dataclass
class _Run:
    """One target's rounds."""

    target: Target
    journal: Journal
    found: search.Space
    stage: Stage

    def compile(self, jobs: Iterable[workers.Job]) -> Program[None]:
        """What is not compiled yet."""
        todo = self.found.lacks(jobs)
        if not todo:
            return
        target = self.target
        step = self.stage(f"{target.gpu.alias}: compiling for sm_{target.gpu.arch}", len(todo))
        code = tasks.Code(target.card.arch, target.arch) if target.card else None

        def keep(call: tuple[Any, ...], result: Any) -> None:
            job, outcome = call[1:3], workers.outcome(result)
            self.found.add(job, outcome)
            self.journal.add_compiled(job, outcome)
            step()

        yield Batch(tasks.compile_kernel, [(target.gpu.arch, *job, code) for job in todo], keep)

    def explore(self, left: list[GemmShape], known: Database) -> Program[None]:
        """All rounds but the final one, for the shapes that are left."""
        gpu, found = self.target.gpu, self.found
        trails = {shape: self.journal.trail(shape) for shape in left}
        near = {shape: search.of_near(shape, gpu, known) for shape in left}
        yield from self.compile(workers.job(c, s) for s in left for c in (*space.candidates(s, gpu), *near[s]))
        todo = [t for t in trails.values() if not t.rounds]
        yield from self.time("first", {t.shape: search.first(t.shape, gpu, found, known) for t in todo}, 0)
        for number in range(1, search.ROUNDS_MAX):
            todo = [t for t in trails.values() if len(t.rounds) == number and t.hot is None]
            wanted = {t.shape: search.ahead(t, gpu, trails.values()) for t in todo}
            yield from self.compile(workers.job(c, s) for s, configs in wanted.items() for c in configs)
            plans = {s: search.worthwhile(trails[s], configs, found) for s, configs in wanted.items()}
            yield from self.time(f"round {number}", plans, number)
        hot = {t.shape: search.hot(t) for t in trails.values() if t.hot is None}
        yield from self.time("hot", hot, None)

    def time(self, name: str, plans: dict[GemmShape, list[TileConfig]], number: int | None) -> Program[None]:
        """One round; number: None for the hot one."""
        todo = {shape: configs for shape, configs in plans.items() if configs}
        sample_us = measure.HOT_US if number is None else interleave.SAMPLE_US

        def keep(shape: GemmShape, timed: tasks.Timed) -> None:
            self.journal.add_timed(shape, number, timed.times)

        yield from self._timed(name, todo, search.SIFTING_SAMPLES, sample_us, False, keep)

    def finish(self, left: list[GemmShape], keep: Callable[[Entry], None], outcome: Outcome) -> Program[None]:
        """The final round, and each shape's entry."""
        target, card = self.target, self.target.card
        assert card is not None
        plans = {shape: search.finalists(self.journal.trail(shape)) for shape in left}

        def choose(shape: GemmShape, timed: tasks.Timed) -> None:
            trail = self.journal.trail(shape)
            self.attempt(shape, lambda: keep(search.entry(trail, timed, self.found, target.source, card)), outcome)

        yield from self._timed("choosing", plans, search.FINAL_SAMPLES, measure.HOT_US, True, choose)
        for shape in set(left) - set(self.journal.chosen) - set(outcome.failed):
            why = self.journal.trail(shape).wrong.get(default_config(shape))
            outcome.failed[shape] = why or "its round ended its process again, with every configuration proven alone"

    def _timed(
        self, name: str, plans: dict[GemmShape, list[TileConfig]], samples: int, sample_us: int, bf16: bool,
        on_timed: Callable[[GemmShape, tasks.Timed], None],
    ) -> Program[None]:  # fmt: skip
        """Time every plan; where a shape's round ends its process, again without the kernels that do."""
        assert self.target.card is not None
        card, arch = self.target.card.alias, self.target.arch
        step = self.stage(f"{self.target.gpu.alias}: {name}", len(plans)) if plans else lambda: None
        todo, lost, twice = dict(plans), set[GemmShape](), set[GemmShape]()

        def keep(call: tuple[Any, ...], result: Any) -> None:
            shape = call[0]
            if isinstance(result, Ended):
                (twice if shape in lost else lost).add(shape)
                return
            del todo[shape]
            for config, reason in result.wrong.items():
                self.journal.add_wrong(shape, config, reason)
            on_timed(shape, result)
            step()

        def blame(call: tuple[Any, ...], result: Any) -> None:
            shape, _, config = call
            if isinstance(result, Ended):
                self.found.banned.add(workers.job(config, shape))
                result = str(result)
            if result is not None:
                self.journal.add_wrong(shape, config, result)

        while todo:
            suspects = lost.copy()
            calls = [(shape, arch, tuple(configs), samples, sample_us, bf16) for shape, configs in todo.items()]
            yield Batch(tasks.time_configs, calls, keep, card, ROUND_S, once=True, halt=True)
            alone = {(s, workers.job(c, s)): (s, arch, c) for s in lost - suspects for c in todo[s]}  # each kernel once
            yield Batch(tasks.launch, list(alone.values()), blame, card, LAUNCH_S, once=True)
            todo = {shape: self._runnable(shape, configs) for shape, configs in todo.items() if shape not in twice}
            todo = {shape: configs for shape, configs in todo.items() if configs}

    def _runnable(self, shape: GemmShape, configs: list[TileConfig]) -> list[TileConfig]:
        """Those of `configs` not known to be out; the default, which no shape can do without, is tried at each."""
        wrong, banned, default = self.journal.trail(shape).wrong, self.found.banned, default_config(shape)
        return [c for c in configs if c not in wrong and (c == default or workers.job(c, shape) not in banned)]

    def attempt(self, shape: GemmShape, choose: Callable[[], None], outcome: Outcome) -> None:
        """`choose`, or why the shape has no entry."""
        try:
            choose()
        except CheckFailed as error:
            outcome.failed[shape] = str(error)
