"""The type of a progress display, which the command line passes to long work.

step = progress("compiling", 48)    # begins a display of 48 steps
step()                              # a step is done
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int], Callable[[], None]]
"""Begins a display: takes a description and a number of steps, returns the function to call after each step."""


def no_progress(_description: str, _steps: int) -> Callable[[], None]:
    """A display that shows nothing."""
    return lambda: None
