"""`verify --subject`: the same properties of several INT8 GEMMs, side by side, each in processes of its own.

property      int8kit   torch._int_mm   mine:scaled
accumulator   holds     holds           not applicable: it gives no sums
output        holds     n/a             fails: "1x1x1, ...: 1 of 1 differ"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from int8kit.database.database import Database
from int8kit.spec import GemmShape, TileConfig, default_config
from int8kit.verify import implementations, property_runs
from int8kit.verify.examples import regressions
from int8kit.verify.examples.strategies import Draw, draws
from int8kit.verify.executors import Executor
from int8kit.verify.process_pool import Report
from int8kit.verify.properties import checks, general
from int8kit.verify.runner import Result, hold, strict

EXAMPLES = 40
WIDE = tuple(  # an epilogue that rounds otherwise shows in one of 10^5 elements of 16 bits
    Draw(GemmShape(1024, 2048, 512), default_config(GemmShape(1024, 1, 1)), "normal", 1, bias, dtype)
    for bias, dtype in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (None, torch.float16))
)
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
        implementations.find(name, executor, configs)
    columns = []
    for name in listed:
        jobs = [property_runs.PropertyRun(kind, executor) for kind in general.ALL]
        judge = _Judge(name, configs, examples, random_seed)
        done = property_runs.run_all(
            jobs, judge, processes=property_runs.process_count(executor), on_example=on_example
        )
        columns.append(Column(name, tuple(result for result, _ in done)))
    return columns


@dataclass(frozen=True)
class _Judge:
    """Holds one subject to one property after another."""

    name: str
    configs: tuple[TileConfig, ...]
    examples: int | None
    random_seed: int

    def __call__(self, job: property_runs.PropertyRun, report: Report) -> property_runs.Finding:
        subject = implementations.find(self.name, job.executor, self.configs)
        if reason := general.why_not(job.name, subject):
            return Result(job.name, self.name, 0, reason=reason), {}
        check = general.ALL[job.name]

        def fitted(d: Draw, _: Executor) -> str | None:
            return check(subject.fit(d), subject)

        always = regressions.load(job.name, self.name)
        if job.name == "output" and (self.name != OURS or job.executor.on != "interpreter"):
            always += WIDE
        limits = checks.budget(job.executor, self.examples)
        gemms = draws(self.configs, min(limits.most, checks.MOST_ROWS), limits.ops // checks.SPARED)
        with strict():
            result = hold(
                job.name, job.executor, gemms, fitted, examples=self.examples or EXAMPLES,
                random_seed=self.random_seed, always=always,
                on_example=lambda example: report(str(example)),
            )  # fmt: skip
        return result, {}
