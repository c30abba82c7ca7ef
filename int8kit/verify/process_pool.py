"""Function calls in child processes that may crash, hang or fail to import: each call still gets an `Ending`.

    run_all([Call(check, "output"), Call(check, "batch")], processes=2)      -> [Ending, Ending], in the calls' order

    parent -> child    the pickled call; a function travels by the name of its module, which the child imports
    child -> parent    ("report", value) as often as the function reports progress
                       ("done", result), or ("raised", "ValueError: ...") if it raised

An ending without a last message is a crash: the child was ended by a signal or exited. A child that says nothing for
the silence limit hangs, and is killed with the processes that it started. `Place` says where a child runs and which
copy of the package it imports. This module imports nothing but the standard library, so that a child starts where the
rest of a package is broken.

asyncio's subprocesses were rejected: cancelled while it starts one, asyncio can wait for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

COMMAND = (sys.executable, "-P", "-m", "int8kit.verify.process_pool")
SILENCE_S = 120.0  # between two messages of a child; a start of torch and the largest example take a tenth
TICK_S = 1.0  # between two searches for silent children

Report = Callable[[Any], None]


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS and Windows have none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Call:
    """A function and its argument. Both are pickled; the function is also given a way to report its progress."""

    function: Callable[[Any, Report], Any]
    argument: Any


@dataclass(frozen=True)
class Ending:
    """How a call ended, and the progress that it had reported."""

    kind: Literal["done", "raised", "signal", "exited", "silent"]
    result: Any = None  # of a call that is done
    detail: str = ""  # of any other: "ValueError: planted", "SIGABRT", the last line on stderr, "15 s"
    reports: tuple[Any, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a child runs: its command, its working folder, its PYTHONPATH and more environment variables."""

    command: tuple[str, ...] = COMMAND
    folder: Path | None = None
    path: Sequence[str] = field(default_factory=lambda: tuple(sys.path))
    environment: Mapping[str, str] = field(default_factory=dict)


OpenPlace = Callable[[int], AbstractContextManager[Place]]
"""Prepares the place of the call with that index, and clears it away after the call."""


def run_all(
    calls: Sequence[Call],
    *,
    processes: int = 1,
    open_place: OpenPlace | None = None,
    silence: float | None = None,
    on_report: Callable[[int, Any], None] = lambda index, value: None,
    on_ending: Callable[[int, Ending], None] = lambda index, ending: None,
) -> list[Ending]:
    """Run `calls`, up to `processes` at a time, and return how each ended, in order.

    open_place: each call gets a new child in that place; without it, children are used again. silence: seconds,
    SILENCE_S by default. on_report and on_ending are given the index of the call. Whatever they raise, as an interrupt
    does, ends all children and clears their places.
    """
    threads = max(1, cores() // processes)
    waiting, endings = deque(range(len(calls))), dict[int, Ending]()
    children: dict[Connection, _Child] = {}
    try:
        while len(endings) < len(calls):
            idle = [child for child in children.values() if child.index is None]
            while waiting and (idle or len(children) < processes):
                index = waiting.popleft()
                if not idle:
                    child = _Child(open_place(index) if open_place else nullcontext(Place()), threads)
                    idle, children[child.pipe] = [child], child
                idle.pop().take(index, calls[index])
            busy = [pipe for pipe, child in children.items() if child.index is not None]
            ready = wait(busy, timeout=TICK_S)
            limit = SILENCE_S if silence is None else silence
            for child in list(children.values()):
                ending = child.hear(on_report) if child.pipe in ready else child.check_silence(limit)
                if ending is None:
                    continue
                if open_place or ending.kind not in ("done", "raised"):
                    children.pop(child.pipe).end()
                done, child.index = child.index, None
                assert done is not None
                endings[done] = ending
                on_ending(done, ending)
    finally:
        for child in children.values():
            child.end()
    return [endings[index] for index in range(len(calls))]


class _Child:
    """A process, and the index of the call that it runs; None if it is idle."""

    def __init__(self, place: AbstractContextManager[Place], threads: int) -> None:
        self.index: int | None = None
        self.heard = 0.0
        with ExitStack() as stack:
            where = stack.enter_context(place)
            self.log = stack.enter_context(tempfile.TemporaryFile())
            self.pipe, theirs = multiprocessing.Pipe()
            stack.callback(self.pipe.close)
            with theirs:
                self.process = subprocess.Popen(
                    [*where.command, str(theirs.fileno())],
                    cwd=where.folder,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(where.path), "OMP_NUM_THREADS": str(threads),
                         **where.environment},
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=self.log,  # the output of kernels and compilers; messages have a pipe
                    stderr=self.log,
                    start_new_session=True,  # Ctrl-C is for the parent
                )  # fmt: skip
            stack.callback(self._kill)
            self.stack = stack.pop_all()

    def take(self, index: int, call: Call) -> None:
        self.index, self.reports = index, list[Any]()
        self.started = self.heard = time.monotonic()
        with suppress(OSError):  # it has ended already, which `hear` finds
            self.pipe.send_bytes(pickle.dumps((call.function, call.argument)))

    def hear(self, on_report: Callable[[int, Any], None]) -> Ending | None:
        """The ending of its call, by its next message or its end; None after a report."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            return self._crash()
        self.heard = time.monotonic()
        if kind == "report":
            assert self.index is not None
            self.reports.append(value)
            on_report(self.index, value)
            return None
        return self._ending(kind, result=value) if kind == "done" else self._ending(kind, detail=value)

    def check_silence(self, limit: float) -> Ending | None:
        """The ending of a call that has said nothing for more than `limit` seconds."""
        if self.index is None or time.monotonic() - self.heard <= limit:
            return None
        return self._ending("silent", detail=f"{limit:g} s")

    def end(self) -> None:
        """Kill it, also inside a kernel that never ends, and clear its place."""
        self.stack.close()

    def _crash(self) -> Ending:
        code = self.process.wait()
        if code < 0:
            return self._ending("signal", detail=signal.Signals(-code).name)
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines()]
        return self._ending("exited", detail=next((s[:300] for s in reversed(lines) if s), f"exit status {code}"))

    def _ending(self, kind: Any, result: Any = None, detail: str = "") -> Ending:
        return Ending(kind, result, detail, tuple(self.reports), time.monotonic() - self.started)

    def _kill(self) -> None:
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)  # with a compiler that it may have started
            else:
                self.process.kill()
        self.process.wait()


def serve(pipe: Connection) -> None:
    """Run the calls that arrive on `pipe` until the parent closes it: the whole life of a child."""

    def report(value: Any) -> None:
        try:
            pipe.send(("report", value))
        except OSError:  # the parent is gone; a property would take an exception for a failure of the kernel
            os._exit(1)

    while True:
        try:
            text = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, argument = pickle.loads(text)
            message = "done", function(argument, report)
        except Exception as error:
            message = "raised", f"{type(error).__name__}: {error}"
        pipe.send(message)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
