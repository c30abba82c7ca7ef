"""Output of the verbs: the result goes to stdout, progress and notes go to stderr.

Progress is a bar where stderr is a terminal. The bar leaves nothing behind. Elsewhere it is a line at most every 30 s,
so that a log shows that the verb is alive.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit import files, interrupt

RESULT_FORMAT = "int8kit.result/1"
EVERY_S = 30.0  # between two lines of progress
STDOUT = Path("-")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that int8kit did not write.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Also write the JSON document to this file; `-`: to stdout, without a table."),
]


@dataclass
class _Task:
    """One thing that is under way."""

    description: str
    total: float | None
    since: float
    completed: float = 0


class LineProgress:
    """Progress as lines: at most one every 30 s, "tuning 12 of 48, 3 min". It has the methods of a rich.Progress."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """write: takes a line; clock: seconds."""
        self._write, self._clock = write, clock
        self._tasks: dict[int, _Task] = {}
        self._last = clock()
        self._lock = threading.Lock()

    def add_task(self, description: str, total: float | None = None) -> int:
        """Begin a task and return its number."""
        with self._lock:
            number = max(self._tasks, default=-1) + 1
            self._tasks[number] = _Task(description, total, self._clock())
        return number

    def update(self, number: int, *, total: float | None = None, completed: float | None = None) -> None:
        """Set a task's total or its finished steps."""
        task = self._tasks[number]
        task.total = task.total if total is None else total
        task.completed = task.completed if completed is None else completed
        self.look()

    def advance(self, number: int, advance: float = 1) -> None:
        """Add finished steps to a task."""
        self._tasks[number].completed += advance
        self.look()

    def remove_task(self, number: int) -> None:
        """End a task."""
        with self._lock:
            del self._tasks[number]

    def look(self) -> None:
        """Write a line if 30 s have passed since the last one."""
        now = self._clock()
        with self._lock:
            if now - self._last < EVERY_S or not self._tasks:
                return
            self._last = now
            line = "; ".join(_line(task, now) for task in self._tasks.values())
        self._write(line)


def _line(task: _Task, now: float) -> str:
    count = ""
    if task.total is None and task.completed:
        count = f" {task.completed:g}"
    elif task.total is not None and task.total > 1:
        count = f" {task.completed:g} of {task.total:g}"
    return f"{task.description}{count}, {duration(now - task.since)}"


def duration(seconds: float) -> str:
    """45 s, 3 min 30 s, 12 min, 1 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 10 and rest:
        return f"{minutes} min {rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _lines() -> Iterator[LineProgress]:
    """Lines of progress; a thread looks at the clock while a single step takes long."""
    lines, ended = LineProgress(note), threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            lines.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _progress() -> Iterator[Any]:
    with interrupt.working(), _lines() if not _is_terminal() else _bars() as shown:
        yield shown


@contextmanager
def _bars() -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=_console(), transient=True) as bars:
        yield bars


@contextmanager
def progress(description: str) -> Iterator[tuple[Any, Any]]:
    """Progress of one task on stderr. The task has no total until somebody sets one."""
    with _progress() as bars:
        yield bars, bars.add_task(description, total=None)


@contextmanager
def stages() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Progress of several tasks on stderr: called with a description and a total, it returns the step's callback."""
    with _progress() as bars:

        def stage(description: str, total: int) -> Callable[[], None]:
            task = bars.add_task(description, total=total)
            left = total

            def step() -> None:
                nonlocal left
                left -= 1
                bars.advance(task)
                if left == 0:
                    bars.remove_task(task)

            return step

        yield stage


_CONSOLES: list[Any] = []


def _console() -> Any:
    """The console on stderr; rich is imported where a terminal is there to draw on."""
    if not _CONSOLES:
        from rich.console import Console

        _CONSOLES.append(Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False))
    return _CONSOLES[0]


def note(text: str) -> None:
    """One line on stderr. A stderr that is closed or full ends no work."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError):
        if _is_terminal():
            _console().print(f"int8kit: {text}")  # above the bar
        else:
            print(f"int8kit: {text}", file=sys.stderr, flush=True)


def check_output(output: Path | None, force: bool = False, *earlier: str) -> None:
    """Raise FileError unless a verb's JSON document can be written to `output`.

    earlier: formats of its documents in earlier versions, which it may replace too.
    """
    if output is not None and output != STDOUT:
        files.check_target(output, ours=lambda path: files.is_ours(path, RESULT_FORMAT, *earlier), force=force)


def show(document: dict[str, Any], table: str, as_json: bool, output: Path | None = None) -> None:
    """Print a verb's result, as a table or as a JSON document, and write the document to `output`."""
    text = json.dumps({"format": RESULT_FORMAT, **document}, indent=1, default=str)
    if output is not None and output != STDOUT:
        files.write_text(output, text + "\n")
        note(f"wrote {output}")
    print(text if as_json or output == STDOUT else table)


def quiet() -> None:
    """Keep the warnings of other libraries off stderr, in this process and in its children.

    A warning of int8kit's own becomes a note.
    """

    def showwarning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("int8kit"):
            note(str(message))

    warnings.showwarning = showwarning
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of children; a filter in their code still holds
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.lastResort = logging.NullHandler()
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)


def quiet_libraries() -> None:
    """Import the libraries that load models, and keep their notes and bars off stderr."""
    with interrupt.at_once(), contextlib.redirect_stderr(io.StringIO()):
        import diffusers
        import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
