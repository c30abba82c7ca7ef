"""The checks in a process of their own: a kernel that ends its process is a failure with an example, like any other.

The child runs the jobs in order and reports over a pipe: ("example", text) before each one, ("done", result, stamps)
after each job. If it dies, the parent writes down the example that was being tried and starts another child behind it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from int8kit.db import Database
from int8kit.verify import checks, corpus
from int8kit.verify.checks import Result, Stamps
from int8kit.verify.foreign import Executor


@dataclass(frozen=True)
class Job:
    """One check on one executor."""

    name: str
    executor: Executor


def _child(pipe: Connection, jobs: list[Job], database: Database, examples: int | None, random_seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for job in jobs:
        outcome = checks.run(
            job.name, job.executor, database, examples=examples, random_seed=random_seed,
            kept=corpus.load(job.name), on_example=lambda example: pipe.send(("example", str(example))),
        )  # fmt: skip
        pipe.send(("done", *outcome))


def run_all(
    jobs: list[Job],
    database: Database,
    *,
    examples: int | None = None,
    random_seed: int = 0,
    on_example: Callable[[], None] = lambda: None,
    child: Callable[..., None] = _child,
) -> Iterator[tuple[Result, Stamps]]:
    """Run `jobs` in a child process; yields what each came to. Closing the iterator early ends the child."""
    context = multiprocessing.get_context("spawn")
    todo = list(jobs)
    while todo:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(theirs, todo, database, examples, random_seed), daemon=True)
        process.start()
        theirs.close()
        tried, last = 0, "before its first example"
        try:
            while todo:
                message: tuple[Any, ...] = ours.recv()
                if message[0] == "example":
                    tried, last = tried + 1, message[1]
                    on_example()
                else:
                    todo.pop(0)
                    tried, last = 0, "before its first example"
                    yield message[1], message[2]
        except EOFError:
            process.join()
            job = todo.pop(0)
            why = f"{last}: the kernel ended its process ({_how(process.exitcode)})"
            yield Result(job.name, str(job.executor), tried, why), {}
        finally:
            process.terminate()
            process.join()
            ours.close()


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}"
