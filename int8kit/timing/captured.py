"""Launches of one contestant as one call that can be repeated: a CUDA graph if capture works, else host launches.

A launch from Python takes longer than a small GEMM, so launches from the host would compare Python wrappers. A graph
holds the launches of all copies of the weight and replays them without the host. A contestant that cannot be captured
is launched from the host and marked so. That costs it nothing where the GPU takes longer than the host.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import torch

from int8kit.timing.operands import poison, poisoned

Launch = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class PreparedContestant:
    """A contestant prepared for one shape."""

    launches: Sequence[Launch]  # one for each copy of the weight; each returns its result
    note: str = ""


TimedBy = Literal["graph", "host"]


def capture(
    launches: Iterable[Callable[[], Any]], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """CUDA graph of `launches`, captured on `stream` (default: a new one), and the result of the last launch.

    Each launch must have run before, so that it compiles nothing now. `torch.cuda.graph` is not used: it empties the
    allocator's cache first, and may collect garbage, which takes longer than a whole round of the tuner.
    """
    graph, result = torch.cuda.CUDAGraph(), None
    torch.cuda.synchronize()
    with torch.cuda.stream(stream or torch.cuda.Stream()):
        graph.capture_begin()
        try:
            for launch in launches:
                result = launch()
        finally:
            graph.capture_end()
    return graph, result


class RepeatableCall:
    """A repeatable call of `launches` launches, each with the next copy of the weight; it stores the last `result`."""

    def __init__(self, prepared: PreparedContestant, *, graph: bool, least: int = 16) -> None:
        """least: launches in a graph, rounded up to a multiple of the copies. They share the gap of a replay."""
        self.prepared = prepared  # a graph keeps addresses and not tensors: its inputs must live as long
        for launch in prepared.launches:  # a library compiles or tunes itself now
            self.result = launch()
        self.note = prepared.note
        self.by: TimedBy = "host"
        self.launches = 1
        if graph:
            copies = len(prepared.launches)
            count = copies * -(-least // copies)
            stream = torch.cuda.current_stream()
            try:
                self._call, self.launches, self.by = self._capture(prepared, count), count, "graph"
                return
            except Exception as error:  # a library may refuse capture in any way
                torch.cuda.set_stream(stream)  # if ending the failed capture fails too, torch stays on its stream
                _reset_after_failed_capture()
                reason = one_line(error.__context__ or error)
                self.note = f"{self.note}; from the host: {reason}".removeprefix("; ")
        turn = cycle(prepared.launches)
        self._call = lambda: self._launch(next(turn))
        self()  # a failed capture may have left the result poisoned

    def __call__(self) -> None:
        self._call()

    def _launch(self, launch: Launch) -> None:
        self.result = launch()

    def _capture(self, prepared: PreparedContestant, count: int) -> Callable[[], None]:
        """Replay of a graph of `count` launches. Raises RuntimeError if a replay does not write the result."""
        gc.collect()  # a graph allocates from a pool of its own: return cached memory first
        torch.cuda.empty_cache()
        graph, result = capture(islice(cycle(prepared.launches), count))
        poison(result)
        graph.replay()
        torch.cuda.synchronize()
        if poisoned(result):  # launched on another stream: the graph is empty, and would look very fast
            raise RuntimeError("a captured graph does not write the result")
        self.result = result
        return graph.replay


def _reset_after_failed_capture() -> None:
    """Capture an unrelated kernel: otherwise the default random generator refuses every later draw."""
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


def one_line(error: BaseException) -> str:
    """Class and message of an error in at most 160 characters, without folders: the text goes into published files."""
    text = without_folders(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:160].removesuffix(": ")


def without_folders(text: str) -> str:
    """`text` with each absolute path reduced to the name of its file: a folder may name a user."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)
