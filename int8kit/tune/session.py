"""One run of the tuner over a set of shapes: compile, choose, and write each entry as it is found.

    Outcome(entries=[Entry, ...], kept=2, space=Space(...), rejected={"compile": 3, "crash": 1}, resumed=17)

Every step is in the journal before the next one begins (`journal`), and every entry in the database as soon as it is
known: a run that is killed goes on by the same command. At the end shapes share kernels where that costs next to
nothing (`portfolio`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8kit import db
from int8kit.gpus import Gpu, present
from int8kit.schema import Entry
from int8kit.spec import POLICY, CheckFailed, GemmShape, Source
from int8kit.tune import portfolio, search, workers
from int8kit.tune.journal import Journal

Stage = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""What shows progress: told a description and a total, it gives what is called after each step."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    entries: list[Entry]  # one a shape, sorted
    kept: int  # of them gave way to a stronger one that the database had
    space: search.Space
    rejected: dict[str, int]  # configurations that did not compile, run or agree, by class
    resumed: int  # shapes that an earlier, killed run had done
    kernels: tuple[int, int]  # distinct ones, before and after `portfolio.reduce`


def identity(gpu: Gpu, source: Source) -> dict[str, Any]:
    """What makes results of two runs comparable, as plain JSON."""
    from int8kit.kernels import gemm

    card = present()
    chain = gemm.toolchain()
    return {
        "gpu": gpu.alias,
        "source": source.value,
        "card": None if card is None or source is Source.MODELLED else card.name,
        "triton": chain.triton,
        "kernels": {kernel.value: digest for kernel, digest in chain.kernels.items()},
        "policy": POLICY,
    }


def run(
    shapes: Iterable[GemmShape],
    gpu: Gpu,
    path: Path,
    source: Source,
    *,
    force: bool = False,
    scheduler: str | None = None,
    stage: Stage = lambda *_: nullcontext(lambda: None),
    note: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Tune `shapes` for `gpu` into the database `path`.

    scheduler: the address of a dask cluster whose workers compile; None: a process a core of this machine.
    After an interrupt while compiling, what is compiled is ranked, and `Outcome.space.complete` is False. Raises
    FileError if another tuner writes `path`, CheckFailed if a shape has no configuration, KeyboardInterrupt if none of
    the kernels of a shape was compiled before the interrupt.
    """
    wanted = sorted(set(shapes))
    with Journal(path, identity(gpu, source)) as journal:
        resumed = len(set(wanted) & set(journal.chosen))
        if journal.compiled or journal.chosen:
            before = f"{len(journal.compiled)} kernels compiled, {resumed} of {len(wanted)} shapes chosen"
            note(f"going on where a run was ended: {before}")
        with workers.Workers(scheduler) as pool:
            space = _compile(wanted, gpu, pool, journal, stage)
        entries, kept = [], 0
        with stage("choosing", len(wanted)) as step:
            for shape in wanted:
                entry = journal.chosen.get(shape) or _choose(shape, gpu, space, source, journal)
                kept += not db.update(path, gpu, [entry], force=force).holds(entry)
                if space.complete and shape not in journal.chosen:
                    journal.add_chosen(entry)
                entries.append(entry)
                step()
        reduced = portfolio.reduce(entries)
        counts = len(portfolio.kernels(entries)), len(portfolio.kernels(reduced))
        db.update(path, gpu, [new for new, old in zip(reduced, entries, strict=True) if new != old], force=force)
        classes = Counter(reason.partition(":")[0] for reason in (*space.failed.values(), *journal.wrong.values()))
        if space.complete:
            journal.finish()
    return Outcome(reduced, kept, space, dict(classes), resumed, counts)


def _compile(wanted: list[GemmShape], gpu: Gpu, pool: workers.Workers, journal: Journal, stage: Stage) -> search.Space:
    left = [job for job in search.jobs(wanted, gpu) if job not in journal.compiled]
    with stage(f"compiling for sm_{gpu.arch}", len(left)) as step:

        def on_outcome(job: workers.Job, result: workers.Outcome) -> None:
            journal.add_compiled(job, result)
            step()

        return search.compile_space(wanted, gpu, pool, known=dict(journal.compiled), on_outcome=on_outcome)


def _choose(shape: GemmShape, gpu: Gpu, space: search.Space, source: Source, journal: Journal) -> Entry:
    try:
        return search.choose(shape, gpu, space, source, journal.add_wrong)
    except CheckFailed:
        if not space.complete:
            raise KeyboardInterrupt from None  # nothing compiled yet that this shape could use
        raise
