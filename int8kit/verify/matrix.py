"""`verify --subject`: the same properties of several INT8 GEMMs, side by side, each subject in a process of its own.

property      int8kit   torch._int_mm   mine:scaled
accumulator   holds     holds           not applicable: it gives no sums
output        holds     n/a             fails: "1x1x1, ...: 1 of 1 differ"
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from int8kit import gpus
from int8kit.db import Database
from int8kit.spec import GemmShape, TileConfig, default_config
from int8kit.verify import checks, corpus, isolate, properties, subjects
from int8kit.verify.checks import Result
from int8kit.verify.foreign import Executor
from int8kit.verify.strategies import Draw, draws

EXAMPLES = 40
OURS = "int8kit"


@dataclass(frozen=True)
class Column:
    """What became of one subject."""

    subject: str
    results: tuple[Result, ...]  # one a property


def tiles(executor: Executor, database: Database) -> tuple[TileConfig, ...]:
    """What examples are drawn with: int8kit's own configurations, and tails of them for the others."""
    listed = {*checks.SMALL_TILES, default_config(GemmShape(1024, 1, 1)), *(e.config for e in database.entries)}
    return tuple(sorted(config for config in listed if checks.runs_on(config, executor)))


def run(
    names: Sequence[str],
    executor: Executor,
    configs: tuple[TileConfig, ...],
    *,
    examples: int | None = None,
    random_seed: int = 0,
    on_example: Callable[[], None] = lambda: None,
) -> list[Column]:
    """Judge int8kit and each of `names` by all properties. Raises as `subjects.find` before anything is judged."""
    listed = list(dict.fromkeys((OURS, *names)))
    for name in listed:
        subjects.find(name, executor, configs)
    columns = []
    for name in listed:
        jobs = [isolate.Job(kind, executor) for kind in properties.ALL]
        done = isolate.run_all(
            jobs, Database(gpus.get("rtx3090")), examples=examples, random_seed=random_seed, on_example=on_example,
            child=partial(_child, name, configs),
        )  # fmt: skip
        columns.append(Column(name, tuple(result for result, _ in done)))
    return columns


def _child(
    name: str, configs: tuple[TileConfig, ...], pipe: Connection, jobs: list[isolate.Job], _: Any,
    examples: int | None, random_seed: int,
) -> None:  # fmt: skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    executor = jobs[0].executor
    subject = subjects.find(name, executor, configs)
    limits = checks.budget(executor, examples)
    for job in jobs:
        reason = properties.why_not(job.name, subject)
        if reason:
            pipe.send(("done", Result(job.name, name, 0, reason=reason), {}))
            continue
        check, kept = properties.ALL[job.name], corpus.load(job.name, name)

        def fitted(d: Draw, _: Executor, check: properties.Check = check) -> str | None:
            return check(subject.fit(d), subject)

        gemms = draws(configs, min(limits.most, checks.MOST_ROWS), limits.ops // checks.SPARED)
        with checks.strict():
            result = checks.hold(
                job.name, executor, gemms, fitted, examples=examples or EXAMPLES, random_seed=random_seed, always=kept,
                on_example=lambda example: pipe.send(("example", str(example))),
            )  # fmt: skip
        pipe.send(("done", result, {}))
