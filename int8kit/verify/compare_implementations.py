"""`verify libraries`: the same properties of several INT8 GEMMs, side by side, in child processes.

property      int8kit   torch._int_mm   mine:scaled
accumulator   holds     holds           not applicable: it returns no accumulators
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
from int8kit.verify.examples.encoding import described
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import OURS
from int8kit.verify.process_pool import Report
from int8kit.verify.properties import registry
from int8kit.verify.properties.budget import budget
from int8kit.verify.property_runs import Finding, PropertyRun
from int8kit.verify.runner import Result, forbid_fallback, run_property
from int8kit.verify.verify_kernels import DEFAULT_TILES

EXAMPLES = 40
LARGE_OUTPUTS = tuple(  # an epilogue with other roundings differs in one of 10^5 elements of 16 bits
    Draw(GemmShape(1024, 2048, 512), default_config(GemmShape(1024, 1, 1)), "normal", 1, bias, dtype)
    for bias, dtype in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (None, torch.float16))
)


@dataclass(frozen=True)
class Column:
    """The results of one implementation."""

    implementation: str
    results: tuple[Result, ...]  # one for each property


def tiles(executor: Executor, database: Database) -> tuple[TileConfig, ...]:
    """The configurations of the examples: int8kit runs them, and they give the other implementations tails."""
    listed = {*DEFAULT_TILES, *(e.config for e in database.entries)}
    return tuple(sorted(config for config in listed if executor.runs(config)))


def run(
    names: Sequence[str],
    executor: Executor,
    configs: tuple[TileConfig, ...],
    *,
    examples: int | None = None,
    random_seed: int = 0,
    on_example: Callable[[], None] = lambda: None,
) -> list[Column]:
    """Check all properties of int8kit and of each of `names`. Raises like `implementations.find` before any check."""
    listed = list(dict.fromkeys((OURS, *names)))
    for name in listed:
        implementations.find(name, executor, configs)
    runs = [PropertyRun(row.name, executor) for row in registry.of_any_gemm()]
    columns = []
    for name in listed:
        verifier = VerifyImplementation(name, configs, examples, random_seed)
        processes = property_runs.process_count(executor)
        findings = property_runs.run_all(runs, verifier, processes=processes, on_example=on_example)
        columns.append(Column(name, tuple(result for result, _ in findings)))
    return columns


@dataclass(frozen=True)
class VerifyImplementation:
    """The verifier of any implementation. See `property_runs.Verifier`."""

    name: str
    configs: tuple[TileConfig, ...]
    examples: int | None
    random_seed: int

    def __call__(self, run: PropertyRun, report: Report) -> Finding:
        """Verify one property."""
        row, executor = registry.PROPERTIES[run.name], run.executor
        implementation = implementations.find(self.name, executor, self.configs)
        if reason := row.why_not(implementation):
            return Result(run.name, self.name, 0, reason=reason), {}
        always = regressions.load(run.name, self.name)
        if run.name == "output" and (self.name != OURS or executor.on != "interpreter"):
            always += LARGE_OUTPUTS
        limits = budget(executor, self.examples).divided(registry.REPEAT_COST)
        with forbid_fallback():
            result = run_property(
                run.name,
                executor,
                row.strategy(self.configs, limits),
                lambda d: row.check(implementation.to_supported_domain(d), implementation),
                examples=self.examples or EXAMPLES,
                random_seed=self.random_seed,
                always=always,
                on_example=lambda example: report(described(example)),
            )
        return result, {}
