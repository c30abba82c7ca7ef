"""Properties that draw no examples: they try every input of a finite domain, or read the compiled code.

Proof("row scale", "s is right for every amax", "every input", run)
run(executor, configurations, on_example) -> Outcome(inputs tried, the first difference or None)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from int8kit.spec import Kernel, TileConfig
from int8kit.verify.executors import Executor
from int8kit.verify.runner import Evidence

Level = Literal["default", "exhaustive"]
"""`verify` runs the first; `verify --exhaustive` and `--only` run both."""

Report = Callable[[object], None]
"""Is given a description of each step before it begins, so that a crash or a hang has a name."""


@dataclass(frozen=True)
class Outcome:
    """The result of a proof: the number of inputs or kernels that were looked at, and the first difference, if any."""

    count: int
    failure: str | None = None


def _always(executor: Executor) -> str | None:
    return None


@dataclass(frozen=True)
class Proof:
    """One row of the table of proofs."""

    name: str
    statement: str  # true of every correct implementation
    evidence: Evidence
    run: Callable[[Executor, tuple[TileConfig, ...], Report], Outcome]
    why_not: Callable[[Executor], str | None] = _always  # why the executor cannot run it, or None
    level: Level = "default"
    mutants_of: tuple[Kernel, ...] = ()  # `verify mutate` tries it on faults of these kernels
