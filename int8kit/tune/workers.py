"""Processes that compile: a compiler abort costs one configuration, not the run.

`compile_all` hands each job to a pool of fresh processes (spawned, without Triton's interpreter) and yields
results as they come. When a process dies, the configurations in flight are tried once more, each alone; the one that
kills its process again is reported as a crash.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from int8kit.schema import Resources
from int8kit.spec import ConfigError, TileConfig

Job = tuple[TileConfig, bool]
"""A configuration, and whether K is a multiple of its block_k: the two kernels differ."""

Outcome = Resources | str
"""What a job's kernel takes, or why there is none, opening with the class: "compile: ..." or "crash: ..."."""


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _compile(arch: int, config: TileConfig, even_k: bool) -> Outcome:
    from int8kit.tune import offline

    try:
        return offline.compile_for(arch, config, even_k=even_k)
    except ConfigError as error:
        return f"compile: {error}"


@contextlib.contextmanager
def _no_interpreter() -> Iterator[None]:
    """Children inherit the environment; the interpreter, if this process runs it, must not be theirs."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def compile_all(arch: int, jobs: Iterable[Job], *, processes: int | None = None) -> Iterator[tuple[Job, Outcome]]:
    """Compile each job for `arch` in parallel; yields (job, outcome) as they are done.

    processes: how many; None for one a core. Closing the iterator early drops what has not started.
    """
    with _no_interpreter():
        survivors: list[Job] = []
        yield from _pool(arch, list(jobs), processes or os.cpu_count() or 1, survivors)
        for job in survivors:
            alone: list[Job] = []
            yield from _pool(arch, [job], 1, alone)
            if alone:
                yield job, "crash: the compiler ended its process"


def _pool(arch: int, jobs: list[Job], processes: int, unfinished: list[Job]) -> Iterator[tuple[Job, Outcome]]:
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    finished = False
    pool = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context, initializer=_start)
    try:
        running: dict[Future[Outcome], Job] = {}
        for job in jobs:
            try:
                running[pool.submit(_compile, arch, *job)] = job
            except BrokenProcessPool:
                unfinished.append(job)
        for future in as_completed(running):
            try:
                outcome = future.result()
            except BrokenProcessPool:
                unfinished.append(running[future])
            else:
                yield running[future], outcome
        finished = True
    finally:
        pool.shutdown(wait=finished, cancel_futures=True)
        if not finished:  # interrupted: a compilation under way is not waited for
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
