"""A child's work on a generated mutant: properties on the copy that the child imports, cheap examples first.

    attempt({"executor": {...}, "properties": ["output", ...], "tiles": [{...}], "seed": 0}, report)

    {"package": "/tmp/.../int8kit"}                         reported first, before a kernel is imported
    {"property": "output", "example": "1x1x33, ..."}        before each example
    {"tried": {"output": 167}, "failure": "1x1x33, ...: 1 of 1 differ", "by": "output", "raised": None}     at the end

Three rounds: FEW drawn examples of each property; the examples that every run tries, and the proofs; then as many
drawn examples as `int8kit verify` takes. The first failure ends the work, and it is not made smaller: that would take
most of the time, and the fault is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import int8kit
from int8kit.spec import config_from
from int8kit.verify.process_pool import Report

FEW = 12


class _Failed(Exception):
    """The property does not hold for an example."""


class Attempt:
    """The properties of one copy, and the first failure."""

    def __init__(self, request: dict[str, Any], report: Report) -> None:
        from int8kit.verify import implementations
        from int8kit.verify.executors import Executor

        self.report, self.seed = report, int(request["seed"])
        self.executor = Executor(**request["executor"])
        tiles = {config_from(row) for row in request["tiles"]}
        self.tiles = tuple(sorted(tile for tile in tiles if self.executor.runs(tile)))
        self.kernels = implementations.int8kit(self.executor, self.tiles)
        self.tried = Counter[str]()
        self.failure: str | None = None
        self.by: str | None = None
        self.raised: str | None = None

    def draw(self, name: str, most: int | None) -> None:
        """Drawn examples of a property: up to `most`, or the number of its budget."""
        from hypothesis import HealthCheck, Phase, given, seed, settings

        from int8kit.verify.properties.budget import budget
        from int8kit.verify.properties.registry import PROPERTIES

        row = PROPERTIES[name]
        limits = budget(self.executor, None).divided(row.cost)

        @seed(self.seed)
        @settings(
            max_examples=min(most or limits.examples, limits.examples), database=None, deadline=None,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate,), report_multiple_bugs=False,
        )  # fmt: skip
        @given(row.strategy(self.tiles, limits))
        def search(example: Any) -> None:
            self.check(name, example, lambda: row.check(example, self.kernels))

        self.guarded(name, search)

    def always(self, name: str) -> None:
        """The examples of a property that every run tries."""
        from int8kit.verify.properties.budget import budget
        from int8kit.verify.properties.registry import PROPERTIES

        row = PROPERTIES[name]

        def run() -> None:
            for example in row.always(self.tiles, budget(self.executor, None).divided(row.cost)):
                self.check(name, example, lambda example=example: row.check(example, self.kernels))  # type: ignore[misc]

        self.guarded(name, run)

    def prove(self, name: str) -> None:
        """A property without examples."""
        from int8kit.verify.properties.registry import PROOFS
        from int8kit.verify.verify_kernels import run_proof

        def report(step: object) -> None:
            self.report({"property": name, "example": str(step)})

        result = run_proof(PROOFS[name], self.executor, self.tiles, report)
        self.tried[name] += result.examples
        if result.failure:
            self.by, self.failure, self.raised = name, result.failure, result.raised

    def check(self, name: str, example: object, run: Callable[[], str | None]) -> None:
        """One example. After a failure nothing is run, because hypothesis tries the example again."""
        from int8kit.verify.gpu_memory import with_memory

        if self.failure:
            raise _Failed
        self.report({"property": name, "example": str(example)})
        self.tried[name] += 1
        try:
            why = with_memory(run)
        except Exception as error:
            lines = str(error).splitlines() or [repr(error)]
            why, self.raised = f"{type(error).__name__}: {lines[0]}", type(error).__name__
        if why:
            self.by, self.failure = name, f"{example}: {why}"
            raise _Failed

    def guarded(self, name: str, run: Callable[[], None]) -> None:
        """Run, and take an exception outside an example for a failure too."""
        try:
            run()
        except Exception as error:
            if not self.failure:
                self.by, self.failure, self.raised = name, f"{type(error).__name__}: {error}", type(error).__name__


def attempt(request: dict[str, Any], report: Report) -> None:
    """Try the properties of `request` on this copy up to the first failure, and report it."""
    report({"package": str(Path(int8kit.__file__).parent)})
    from int8kit.verify.properties.registry import PROOFS, PROPERTIES
    from int8kit.verify.runner import forbid_fallback

    work = Attempt(request, report)
    drawn = [n for n in request["properties"] if n in PROPERTIES and PROPERTIES[n].why_not(work.kernels) is None]
    proofs = [n for n in request["properties"] if n in PROOFS and PROOFS[n].why_not(work.executor) is None]
    steps: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(work.draw, (name, FEW)) for name in drawn]
    steps += [(work.always, (name,)) for name in drawn]
    steps += [(work.prove, (name,)) for name in proofs]
    steps += [(work.draw, (name, None)) for name in drawn]
    with forbid_fallback():
        for function, arguments in steps:
            function(*arguments)
            if work.failure:
                break
    report({"tried": dict(work.tried), "failure": work.failure, "by": work.by, "raised": work.raised})
