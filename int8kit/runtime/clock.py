"""The times of the parts of a generation, from the start of the process on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from int8kit.progress import Progress, no_progress

if TYPE_CHECKING:
    import torch


class Clock:
    """The times of the parts of a request, from the start of the process on."""

    def __init__(self, progress: Progress = no_progress) -> None:
        self._progress = progress
        self._last = time.perf_counter()
        self._parts = {"start_s": _process_age()}
        self._steps: list[float] = []

    @contextmanager
    def part(self, name: str, text: str) -> Iterator[None]:
        """A context for a part of the work, which the progress shows as `text`."""
        step = self._progress(text, 1)
        yield
        step()
        self.lap(name)

    def lap(self, part: str, device: torch.device | None = None) -> None:
        """End a part of the work."""
        _synchronize(device)
        now = time.perf_counter()
        self._parts[part], self._last = now - self._last, now

    def step(self, device: torch.device) -> None:
        """End a denoising step."""
        _synchronize(device)
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._last = now

    def times(self) -> dict[str, float]:
        """The times under the names of `GeneratedImages`."""
        first, rest = self._steps[0], self._steps[1:] or self._steps
        step_ms = 1e3 * statistics.median(rest)
        return {**self._parts, "first_step_s": first, "denoise_s": sum(self._steps), "step_ms": step_ms}


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _process_age() -> float:
    """Seconds since this process started; 0 where psutil cannot say."""
    import psutil

    try:
        return time.time() - float(psutil.Process().create_time())
    except psutil.Error:
        return 0.0
