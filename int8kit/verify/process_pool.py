"""The checks in processes of their own: a kernel that ends its process is a failure with an example, like any other.

    run_all([Job("output", executor), ...], judge, processes=2)      -> [(Result, stamps), ...], in the jobs' order

A child is sent one job after another, and reports over its pipe: ("example", text) before each one, ("done", result,
stamps) after the job. If it dies, or is silent for SILENCE_S as where a kernel waits for ever, the parent writes down
the example that was being tried, and another child goes on with the jobs that are left. Several children at a time,
since examples wait for the compiler, which uses one core.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from int8kit.database.database import Choice, Database
from int8kit.spec import TileConfig
from int8kit.verify.examples import regressions
from int8kit.verify.examples.guarded_buffers import FAR_ROOM
from int8kit.verify.executors import Executor
from int8kit.verify.properties import checks
from int8kit.verify.properties.checks import Stamps
from int8kit.verify.runner import Result

MOST_PROCESSES = 16  # on a card: each keeps a context there
SILENCE_S = 120.0  # between two reports of a child: a start of torch and the largest example take a tenth
TICK_S = 1.0  # between looks for silent ones


@dataclass(frozen=True)
class Job:
    """One check on one executor."""

    name: str
    executor: Executor


Outcome = tuple[Result, Stamps]
Judge = Callable[[Job, Callable[[object], None]], Outcome]
"""What a child runs, pickled: given a job, and what is told of each example before it is tried."""


@dataclass(frozen=True)
class Proof:
    """The judge of int8kit's own kernels: `checks.run` over a database's configurations and `more`."""

    database: Database
    examples: int | None = None
    random_seed: int = 0
    more: tuple[TileConfig, ...] = ()
    unlisted: tuple[Choice, ...] = ()

    def __call__(self, job: Job, on_example: Callable[[object], None]) -> Outcome:
        """See `Judge`."""
        return checks.run(
            job.name, job.executor, self.database, examples=self.examples, random_seed=self.random_seed,
            more=self.more, kept=regressions.load(job.name), unlisted=self.unlisted, on_example=on_example,
        )  # fmt: skip


@dataclass
class _Child:
    """A process, and the job that it was sent."""

    process: SpawnProcess
    pipe: Connection
    index: int = -1
    tried: int = 0
    last: str = ""
    busy: bool = False
    heard: float = 0.0  # when, by the monotonic clock

    def take(self, index: int, job: Job) -> None:
        self.index, self.tried, self.last = index, 0, "before its first example"
        self.busy, self.heard = True, time.monotonic()
        self.pipe.send(job)

    def hear(self) -> tuple[Any, ...]:
        """Its next message. Raises EOFError or OSError if it has ended."""
        message: tuple[Any, ...] = self.pipe.recv()
        self.heard = time.monotonic()
        if message[0] == "example":
            self.tried, self.last = self.tried + 1, message[1]
        else:
            self.busy = False
        return message

    def end(self) -> None:
        self.process.kill()  # also where it is inside a kernel that waits for ever
        self.process.join()
        self.pipe.close()


@dataclass
class _Children:
    """Those that are alive, by their pipes."""

    judge: Judge
    most: int
    threads: int  # of torch, in each
    alive: dict[Connection, _Child] = field(default_factory=dict)

    def free(self, wanted: int) -> list[_Child]:
        """Up to `wanted` that have nothing to do, started where there are fewer than `most`."""
        idle = [child for child in self.alive.values() if not child.busy]
        while len(idle) < wanted and len(self.alive) < self.most:
            idle.append(self._start())
        return idle[:wanted]

    def silent(self) -> list[_Child]:
        """Those that have said nothing for too long."""
        now = time.monotonic()
        return [child for child in self.alive.values() if child.busy and now - child.heard > SILENCE_S]

    def lose(self, child: _Child, job: Job, why: str) -> Outcome:
        """The failure of a job whose child has ended or is to end."""
        del self.alive[child.pipe]
        child.end()
        return Result(job.name, str(job.executor), child.tried, f"{child.last}: {why}"), {}

    def end(self) -> None:
        for child in self.alive.values():
            child.end()

    def _start(self) -> _Child:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.judge, self.threads), daemon=True)
        process.start()
        theirs.close()
        return self.alive.setdefault(ours, _Child(process, ours))


def processes(executor: Executor) -> int:
    """How many children to run: one a core, and on a card no more than it can hold far matrices."""
    cores = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    if executor.on == "interpreter":
        return cores
    return max(1, min(cores, torch.cuda.mem_get_info()[0] // FAR_ROOM))


def run_all(
    jobs: list[Job], judge: Judge, *, processes: int = 1, on_example: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Judge `jobs`, up to `processes` at a time -> what each came to, in order. Interrupted, it ends its children."""
    found: dict[int, Outcome] = {}
    todo = list(enumerate(jobs))[::-1]
    children = _Children(judge, min(processes, len(jobs)), max(1, len(os.sched_getaffinity(0)) // processes))
    try:
        for child in children.free(len(todo)):
            child.take(*todo.pop())
        while len(found) < len(jobs):
            for pipe in wait(list(children.alive), timeout=TICK_S):
                assert isinstance(pipe, Connection)
                child = children.alive[pipe]
                try:
                    message = child.hear()
                except (EOFError, OSError):
                    child.process.join()
                    how = f"the kernel ended its process ({_how(child.process.exitcode)})"
                    found[child.index] = children.lose(child, jobs[child.index], how)
                    continue
                if message[0] == "example":
                    on_example()
                else:
                    found[child.index] = message[1:]
            for child in children.silent():
                found[child.index] = children.lose(child, jobs[child.index], f"no end in {SILENCE_S:g} s")
            for child in children.free(len(todo)):
                child.take(*todo.pop())
    finally:
        children.end()
    return [found[index] for index in range(len(jobs))]


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}"


def _serve(pipe: Connection, judge: Judge, threads: int) -> None:
    """What a child does, until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    while True:
        job: Job = pipe.recv()
        pipe.send(("done", *judge(job, lambda example: pipe.send(("example", str(example))))))
        torch.cuda.empty_cache()  # the other children's too is what the card has; nothing without a card
