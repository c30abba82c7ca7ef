"""A run of the tuner over a set of shapes, for one GPU or several: compile, time, choose, write.

    targets = targets_of(["rtx3090"], present, path=None)      [Target(gpu, path, source, timed_on)]
    tune(shapes, targets, pool)                                [TuningResult(entries=[Entry, ...], rejected={...}, ...)]

Each target is a job of `workers`, so that GPUs of several kinds are busy at once, and each has its own file. Only
this process writes. A job goes in rounds over all its shapes (see `search`). In each round the missing kernels are
compiled on every core; then each GPU times one shape at a time.

Every compiled kernel, every shape's round and every entry is in the `journal` before the next step begins: a killed run
is resumed by the same command. At the end shapes share kernels where that costs at most 1 % (`consolidate`).

If a configuration crashes or hangs while being timed, the round of its shape is lost. The tuner then launches that
shape's configurations one at a time in disposable processes, bans the guilty kernels for all shapes, and repeats the
round. A kernel that hangs at one shape hangs at the next, and would cost a minute each time.
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
from int8kit.progress import Progress, no_progress
from int8kit.spec import POLICY, GemmShape, Source, TileConfig, default_config
from int8kit.toolchain import require_supported
from int8kit.tune import consolidate, search, space, tasks, workers
from int8kit.tune.journal import Journal
from int8kit.tune.space import KernelVariant, variant_of
from int8kit.tune.workers import Batch, Job, ProcessEnded, Workers

ROUND_S = 120.0  # limit for one shape's round, which takes seconds; longer if another host has compiled its kernels
LAUNCH_S = 30.0  # limit for one launch, including making and checking the operands

PROCESS_ENDED = ("crash:", "timeout:")
"""Classes of the reasons that `workers.ProcessEnded` gives."""

Candidates = dict[GemmShape, list[TileConfig]]
"""The configurations to time in one round, by shape."""


@dataclass(frozen=True)
class Target:
    """A GPU to tune for, its database file, and the present GPU that times its code, if any."""

    gpu: Gpu
    path: Path
    source: Source
    timed_on: Gpu | None

    @property
    def code_arch(self) -> str | None:
        """Architecture of the older code that is timed, such as "sm86"; None for the present GPU's own code."""
        return f"sm{self.gpu.arch}" if self.source is Source.PROXY else None

    @property
    def machine(self) -> Gpu:
        """GPU whose rates the cost model uses; for a proxy, the timed GPU with the target's architecture."""
        if self.timed_on and self.source is Source.PROXY:
            return replace(self.timed_on, arch=self.gpu.arch)
        return self.gpu

    @property
    def launch_code(self) -> tasks.LaunchCode | None:
        """The code that launches need; None if nothing is launched."""
        return tasks.LaunchCode(self.timed_on.arch, self.code_arch) if self.timed_on else None

    @property
    def run_key(self) -> dict[str, Any]:
        """Everything that makes the results of two runs comparable, as plain JSON."""
        chain = gemm.toolchain()
        return {
            "gpu": self.gpu.alias,
            "source": self.source.value,
            "card": self.timed_on and self.timed_on.name,  # the key of earlier journals, which must resume
            "triton": chain.triton,
            "kernels": {kernel.value: digest for kernel, digest in chain.kernel_hashes.items()},
            "policy": POLICY,
        }


@dataclass
class TuningResult:
    """The result of tuning one target."""

    target: Target
    entries: list[Entry] = field(default_factory=list)  # one for each shape, sorted
    not_replaced: int = 0  # entries that the database did not take, since it had a stronger one
    rejected: dict[str, int] = field(default_factory=dict)  # number of rejected configurations, by class
    failed: dict[GemmShape, str] = field(default_factory=dict)  # shapes without an entry, with the reason
    resumed: int = 0  # shapes that an earlier, killed run had finished
    variant_counts: tuple[int, int] = (0, 0)  # distinct kernels, before and after `consolidate.reduce`


def targets_of(gpus: Iterable[Gpu], present: Sequence[Gpu], path: Path | None = None) -> list[Target]:
    """A target for each of `gpus`, timed on one of the `present` GPUs where that is possible.

    path: the database file, for a single GPU; None: the user's own.
    """
    require_supported()
    targets = []
    for gpu in gpus:
        source, timed_on = search.source_of(gpu, present)
        targets.append(Target(gpu, path or store.user_path(gpu.alias), source, timed_on))
    return targets


def check_journals(targets: Iterable[Target]) -> None:
    """Raises FileError as `tune` does for a target that another tuner writes, or whose journal is damaged."""
    for target in targets:
        Journal(target.path, target.run_key).close()


def check_health(pool: Workers, note: Callable[[str], None] = lambda _: None) -> None:
    """Raises CheckFailed if a GPU of the pool is not fit for timing."""
    present = pool.gpus()

    def check(gpu: Gpu) -> Job[None]:
        calls = [(i,) for i in range(present.count(gpu))]  # all workers are free: each takes one call
        results = yield Batch(tasks.health, calls, gpu=gpu.alias)
        for rate, reason in (r if not isinstance(r, ProcessEnded) else (0.0, str(r)) for r in results.values()):
            if reason:
                raise CheckFailed(reason)
            note(f"{gpu.name}: {rate:.0f} bf16 TFLOP/s, healthy")

    pool.drive([check(gpu) for gpu in dict.fromkeys(present)])


def tune(
    shapes: Iterable[GemmShape],
    targets: Iterable[Target],
    pool: Workers,
    *,
    force: bool = False,
    progress: Progress = no_progress,
    note: Callable[[str], None] = lambda _: None,
) -> list[TuningResult]:
    """Tune `shapes` for each target.

    Raises FileError if another tuner writes one of the files. A shape for which no configuration works is listed in
    `TuningResult.failed`.
    """
    wanted = sorted(set(shapes))
    return pool.drive([_tune_target(wanted, target, force, progress, note) for target in targets])


def _tune_target(
    wanted: list[GemmShape], target: Target, force: bool, progress: Progress, note: Callable[[str], None]
) -> Job[TuningResult]:
    with Journal(target.path, target.run_key) as journal:
        result = TuningResult(target, resumed=len(set(wanted) & set(journal.chosen)))
        if journal.compiled or journal.chosen:
            done = f"{len(journal.compiled)} kernels compiled, {result.resumed} of {len(wanted)} shapes chosen"
            note(f"{target.gpu.alias}: resuming an interrupted run: {done}")

        def write(entry: Entry) -> None:
            result.not_replaced += not store.update(target.path, target.gpu, [entry], force=force).contains(entry)
            journal.add_chosen(entry)

        run = _TargetRun(target, journal, _compiled_before(target, journal), progress, result, write)
        pending = [shape for shape in wanted if shape not in journal.chosen]
        if target.timed_on is None:
            yield from run.choose_by_model(pending)
        else:
            yield from run.explore(pending, store.merged_view(target.gpu, gemm.toolchain())[0])
            yield from run.finish(pending, target.timed_on)
        result.entries = [journal.chosen[shape] for shape in wanted if shape in journal.chosen]
        reduced = consolidate.reduce(result.entries)
        result.variant_counts = len(consolidate.variants(result.entries)), len(consolidate.variants(reduced))
        changed = [new for new, old in zip(reduced, result.entries, strict=True) if new != old]
        if changed:
            store.update(target.path, target.gpu, changed, force=force)
        result.entries = reduced
        reasons = (*run.compiled.failed.values(), *journal.rejected.values())
        result.rejected = dict(Counter(reason.partition(":")[0] for reason in reasons))
        journal.finish()
    return result


def _compiled_before(target: Target, journal: Journal) -> search.Compilations:
    """The kernels that an interrupted run compiled, and those that it banned."""
    compiled = search.Compilations(target.machine)
    for kernel, compilation in journal.compiled.items():
        compiled.add(kernel, compilation)
    compiled.banned |= {variant_of(c, s) for (s, c), why in journal.rejected.items() if why.startswith(PROCESS_ENDED)}
    return compiled


@dataclass
class _TargetRun:
    """The steps of one target's run. Each is a job, or a part of one."""

    target: Target
    journal: Journal
    compiled: search.Compilations
    progress: Progress
    result: TuningResult
    write: Callable[[Entry], None]  # writes an entry to the database and to the journal

    def compile(self, kernels: Iterable[KernelVariant]) -> Job[None]:
        """Compile the `kernels` that are missing."""
        missing = self.compiled.missing(kernels)
        if not missing:
            return
        target = self.target
        step = self.progress(f"{target.gpu.alias}: compiling for sm_{target.gpu.arch}", len(missing))

        def store_result(call: tuple[Any, ...], result: Any) -> None:
            _, kernel, _ = call
            compilation = workers.compilation(result)
            self.compiled.add(kernel, compilation)
            self.journal.add_compiled(kernel, compilation)
            step()

        calls = [(target.gpu.arch, kernel, target.launch_code) for kernel in missing]
        yield Batch(tasks.compile_kernel, calls, store_result)

    def choose_by_model(self, pending: list[GemmShape]) -> Job[None]:
        """The cost model's choice for each shape, where no present GPU runs the target's code."""
        gpu = self.target.gpu
        yield from self.compile(variant_of(c, s) for s in pending for c in space.candidates(s, gpu))
        for shape in pending:
            self._choose(shape, partial(search.modelled_entry, shape, gpu, self.compiled))

    def explore(self, pending: list[GemmShape], known: Database) -> Job[None]:
        """All rounds but the final one, for the shapes without an entry. known: the database so far."""
        gpu, compiled = self.target.gpu, self.compiled
        histories = {shape: self.journal.history(shape) for shape in pending}
        near = {shape: search.configs_of_near_shapes(shape, gpu, known) for shape in pending}
        yield from self.compile(variant_of(c, s) for s in pending for c in (*space.candidates(s, gpu), *near[s]))
        todo = [h for h in histories.values() if not h.rounds]
        candidates = {h.shape: search.initial_candidates(h.shape, gpu, compiled, known) for h in todo}
        yield from self._round("first", candidates, 0)
        for number in range(1, search.ROUNDS_MAX):
            todo = [h for h in histories.values() if len(h.rounds) == number and h.sustained is None]
            wanted = {h.shape: search.next_candidates(h, gpu, histories.values()) for h in todo}
            yield from self.compile(variant_of(c, s) for s, configs in wanted.items() for c in configs)
            candidates = {s: search.prune_by_model(histories[s], configs, compiled) for s, configs in wanted.items()}
            yield from self._round(f"round {number}", candidates, number)
        todo = [h for h in histories.values() if h.sustained is None]
        yield from self._round("sustained", {h.shape: search.sustained_candidates(h) for h in todo}, None)

    def finish(self, pending: list[GemmShape], timed_on: Gpu) -> Job[None]:
        """The final round, and each shape's entry."""
        candidates = {shape: search.finalists(self.journal.history(shape)) for shape in pending}

        def choose(shape: GemmShape, timed: search.RoundTimes) -> None:
            history, source = self.journal.history(shape), self.target.source
            self._choose(shape, lambda: search.entry(history, timed, self.compiled, source, timed_on))

        yield from self._time("choosing", candidates, search.FINAL_SAMPLES, True, True, choose)
        for shape in set(pending) - set(self.journal.chosen) - set(self.result.failed):
            why = self.journal.history(shape).rejected.get(default_config(shape))
            self.result.failed[shape] = (
                why or "its round ended its process twice, though every configuration had passed alone"
            )

    def _choose(self, shape: GemmShape, choice: Callable[[], Entry]) -> None:
        """Write the entry that `choice` gives, or store the reason why the shape has none."""
        try:
            self.write(choice())
        except CheckFailed as error:
            self.result.failed[shape] = str(error)

    def _round(self, name: str, candidates: Candidates, number: int | None) -> Job[None]:
        """Time one round and write it to the journal; number: None for the sustained round."""
        todo = {shape: configs for shape, configs in candidates.items() if configs}

        def store_result(shape: GemmShape, timed: search.RoundTimes) -> None:
            self.journal.add_timed(shape, number, timed.times)

        yield from self._time(name, todo, search.ROUND_SAMPLES, number is None, False, store_result)

    def _time(
        self, name: str, candidates: Candidates, samples: int, sustained: bool, bf16: bool,
        on_timed: Callable[[GemmShape, search.RoundTimes], None],
    ) -> Job[None]:  # fmt: skip
        """Time the candidates of every shape. A shape whose process ends is timed again without the guilty kernels."""
        assert self.target.timed_on is not None
        gpu, code_arch = self.target.timed_on.alias, self.target.code_arch
        step = self.progress(f"{self.target.gpu.alias}: {name}", len(candidates)) if candidates else lambda: None
        todo, ended_once, ended_twice = dict(candidates), set[GemmShape](), set[GemmShape]()

        def store_result(call: tuple[Any, ...], result: Any) -> None:
            shape = call[0]
            if isinstance(result, ProcessEnded):
                (ended_twice if shape in ended_once else ended_once).add(shape)
                return
            del todo[shape]
            for config, reason in result.rejected.items():
                self.journal.add_rejected(shape, config, reason)
            on_timed(shape, result)
            step()

        def store_suspect(call: tuple[Any, ...], result: Any) -> None:
            shape, _, config = call
            if isinstance(result, ProcessEnded):
                self.compiled.banned.add(variant_of(config, shape))
                result = str(result)
            if result is not None:
                self.journal.add_rejected(shape, config, result)

        while todo:
            before = ended_once.copy()
            calls = [(shape, code_arch, tuple(configs), samples, sustained, bf16) for shape, configs in todo.items()]
            yield Batch(tasks.time_configs, calls, store_result, gpu, ROUND_S, once=True, halt=True)
            # each kernel once, by one of the configurations that share it
            suspects = {(s, variant_of(c, s)): (s, code_arch, c) for s in ended_once - before for c in todo[s]}
            yield Batch(tasks.try_alone, list(suspects.values()), store_suspect, gpu, LAUNCH_S, once=True)
            runnable = {s: self._runnable(s, configs) for s, configs in todo.items() if s not in ended_twice}
            todo = {shape: configs for shape, configs in runnable.items() if configs}

    def _runnable(self, shape: GemmShape, configs: list[TileConfig]) -> list[TileConfig]:
        """The `configs` that are not rejected. The default, which every shape needs, is tried even if banned."""
        rejected, banned, default = self.journal.history(shape).rejected, self.compiled.banned, default_config(shape)
        return [c for c in configs if c not in rejected and (c == default or variant_of(c, shape) not in banned)]
