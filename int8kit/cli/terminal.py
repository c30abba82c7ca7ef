"""What the verbs share: results on stdout, progress and notes on stderr, and options that several have."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that int8kit did not write.")]

_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress(description: str) -> Iterator[tuple[Progress, Any]]:
    """A bar on stderr, silent where stderr is no terminal. The task has no total until somebody sets one."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as bar:
        yield bar, bar.add_task(description, total=None)


@contextmanager
def stages() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Bars on stderr, one below the other: told a description and a total, it gives what is called after each step."""
    with progress("") as (bar, task):
        bar.remove_task(task)

        def stage(description: str, total: int) -> Callable[[], None]:
            one = bar.add_task(description, total=total)
            left = iter(range(total, 0, -1))

            def step() -> None:
                bar.advance(one)
                if next(left, 1) == 1:
                    bar.remove_task(one)

            return step

        yield stage


def quiet_libraries() -> None:
    """Keep notes of the libraries that load models off stderr."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()


def show(document: dict[str, Any], table: str, as_json: bool) -> None:
    print(json.dumps(document, indent=1, default=str) if as_json else table)


def note(text: str) -> None:
    """One line on stderr."""
    _stderr.print(f"int8kit: {text}")
