"""Properties in child processes: a kernel that crashes or hangs is a failure with an example, like any other failure.

run_all([PropertyRun("output", executor), ...], VerifyKernels(database), processes=2)  -> [(Result, stamps), ...]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from int8kit.database.database import Choice, Database
from int8kit.spec import TileConfig
from int8kit.verify import process_pool, verify_kernels
from int8kit.verify.examples import regressions
from int8kit.verify.examples.encoding import described
from int8kit.verify.examples.guarded_buffers import HUGE_STRIDE_BYTES
from int8kit.verify.executors import Executor
from int8kit.verify.process_pool import Call, Ending, Report
from int8kit.verify.properties.budget import WHOLE, Share
from int8kit.verify.properties.entries import Stamps
from int8kit.verify.runner import Result

MAX_PROCESSES = 16  # on a GPU: each keeps a context there


@dataclass(frozen=True)
class PropertyRun:
    """One property on one executor, or a share of its examples."""

    name: str
    executor: Executor
    share: Share = WHOLE


Finding = tuple[Result, Stamps]
Verifier = Callable[[PropertyRun, Report], Finding]
"""A child's work, pickled: it reports each example, as `encoding.described` has it, before it tries it."""


@dataclass(frozen=True)
class VerifyKernels:
    """The verifier of int8kit's own kernels: `verify_kernels.run` over a database's configurations and `more`."""

    database: Database
    examples: int | None = None
    random_seed: int = 0
    more: tuple[TileConfig, ...] = ()
    unlisted: tuple[Choice, ...] = ()

    def __call__(self, run: PropertyRun, report: Report) -> Finding:
        """Verify one property. See `Verifier`."""
        finding = verify_kernels.run(
            run.name, run.executor, self.database, examples=self.examples, random_seed=self.random_seed,
            more=self.more, kept=regressions.load(run.name), unlisted=self.unlisted,
            on_example=lambda example: report(described(example)), share=run.share,
        )  # fmt: skip
        torch.cuda.empty_cache()  # several children share one GPU; no effect without one
        return finding


def process_count(executor: Executor) -> int:
    """Number of children to run: one for each core, and on a GPU no more than its memory can serve."""
    cores = min(process_pool.cores(), MAX_PROCESSES)
    if executor.on == "interpreter":
        return cores
    return max(1, min(cores, torch.cuda.mem_get_info()[0] // HUGE_STRIDE_BYTES))


def run_all(
    runs: list[PropertyRun], verifier: Verifier, *, processes: int = 1, on_example: Callable[[], None] = lambda: None
) -> list[Finding]:
    """Verify `runs`, up to `processes` at a time, and return the findings in order, those of shares joined.

    An interrupt ends the children.
    """
    calls = [Call(verifier, run) for run in runs]
    endings = process_pool.run_all(calls, processes=processes, on_report=lambda index, text: on_example())
    joined: dict[tuple[str, Executor], Finding] = {}
    for run, ending in zip(runs, endings, strict=True):
        found, key = _finding(run, ending), (run.name, run.executor)
        joined[key] = _join(joined[key], found) if key in joined else found
    return list(joined.values())


def divided(runs: Iterable[PropertyRun]) -> list[PropertyRun]:
    """The runs of the shares of `runs`. See `verify_kernels.shares`."""
    return [replace(run, share=share) for run in runs for share in verify_kernels.shares(run.name, run.executor)]


def _join(one: Finding, more: Finding) -> Finding:
    """The finding of two shares of one property: the first failure, and the sums of both."""
    (first, stamps), (second, more_stamps) = one, more
    shown = second if second.failure and not first.failure else first
    total = replace(shown, examples=first.examples + second.examples, skipped=first.skipped + second.skipped)
    return total, {**stamps, **more_stamps}


def _finding(run: PropertyRun, ending: Ending) -> Finding:
    if ending.kind == "done":
        return ending.result  # type: ignore[no-any-return]
    last, example = ending.reports[-1] if ending.reports else ("before its first example", None)
    reasons = {"silent": f"no end in {ending.detail}", "raised": ending.detail}
    why = reasons.get(ending.kind, f"the kernel ended its process ({ending.detail})")
    return Result(run.name, str(run.executor), len(ending.reports), f"{last}: {why}", example=example), {}
