"""The kernels that `kernels.launch` stores and finds again, as the properties of launches observe them.

A launch that finds no stored kernel gives the right bits all the same: Triton looks the kernel up, which takes longer
than a small GEMM. So the bits alone do not show a key that never matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from int8kit.kernels import launch


@dataclass
class Launched:
    """The launches inside one context of `stored_kernels`."""

    before: frozenset[tuple[Any, ...]]
    added: set[tuple[Any, ...]] = field(default_factory=set)  # keys under which kernels were stored
    looked_up: int = 0  # functions whose kernel Triton looked up
    grids: list[tuple[int, ...]] = field(default_factory=list)  # of the launches of stored kernels

    def differs(self, *, aligned: bool, again: bool) -> str | None:
        """How the launches differ from the ones expected, or None.

        aligned: every address and extent is a multiple of 16, so the kernel is stored. again: a launch like it came
        before, so a stored kernel is found. Triton's interpreter stores nothing.
        """
        if launch.interpreted():
            return None
        if aligned and not (self.added or self.before):
            return "its kernel is not stored, so each launch waits for Triton's look-up"
        if aligned and again and self.looked_up:
            return "the stored kernel is not found, so the launch waits for Triton's look-up"
        if wrong_grid := [grid for grid in self.grids if grid[2] != 1]:
            return f"a grid of {wrong_grid[0]} programs, expected 1 of the third axis"
        device = torch.cuda.current_device()
        if wrong := [key[1] for key in self.added if key[1] != device]:
            return f"its kernel is stored for the device {wrong[0]}, expected {device}"
        return None


@contextmanager
def stored_kernels() -> Iterator[Launched]:
    """A context whose launches are observed; its value has them at the end."""
    found = Launched(frozenset(launch._COMPILED))
    finalize = launch.finalize_cache_keys  # runs once for each function of a look-up, and never for a stored kernel

    def counted(function: Any) -> None:
        found.looked_up += 1
        finalize(function)

    for key, kernel in launch._COMPILED.items():
        launch._COMPILED[key] = _Observed(kernel, found.grids)
    try:
        with mock.patch.object(launch, "finalize_cache_keys", counted):
            yield found
    finally:
        found.added = set(launch._COMPILED) - found.before
        for key, kernel in launch._COMPILED.items():
            launch._COMPILED[key] = kernel.kernel if isinstance(kernel, _Observed) else kernel


class _Observed:
    """A compiled kernel whose grids are recorded."""

    def __init__(self, kernel: Any, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def run(self, *args: Any) -> Any:
        """Launch it."""
        self.grids.append(args[:3])
        return self.kernel.run(*args)
