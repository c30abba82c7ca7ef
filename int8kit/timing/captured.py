"""One contestant's launches as one call that can be repeated: a CUDA graph where that works, else from the host.

A launch from Python takes longer than a small GEMM does, so timed from the host small shapes would compare wrappers. A
graph holds the launches of every copy of the weight and replays them without the host. What cannot be captured is
launched from the host and marked: it is at no disadvantage where the card is slower than the host, and is elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import torch

from int8kit.timing.operands import poison, poisoned

Launch = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Entrant:
    """A contestant prepared for one shape."""

    launches: Sequence[Launch]  # one a copy of the weight, each returns its result
    note: str = ""


TimedBy = Literal["graph", "host"]


class Timed:
    """A call that makes `launches` launches, each on the next copy of the weight; `result` is the last one's."""

    def __init__(self, entrant: Entrant, *, graph: bool, least: int = 16) -> None:
        """least: launches in a graph, rounded up to whole turns of the copies; they share the gap between replays."""
        self.entrant = entrant  # a graph keeps addresses, not tensors: its inputs must live as long
        for launch in entrant.launches:  # whatever compiles or tunes itself does so now
            self.result = launch()
        self.note = entrant.note
        self.by: TimedBy = "host"
        self.launches = 1
        if graph:
            copies = len(entrant.launches)
            count = copies * -(-least // copies)
            stream = torch.cuda.current_stream()
            try:
                self._call, self.launches, self.by = self._capture(entrant, count), count, "graph"
                return
            except Exception as error:  # a library may refuse capture in any way
                torch.cuda.set_stream(stream)  # where ending a failed capture fails too, torch stays on its stream
                _capture_anything()
                reason = one_line(error.__context__ or error)
                self.note = f"{self.note}; from the host: {reason}".removeprefix("; ")
        turn = cycle(entrant.launches)
        self._call = lambda: self._launch(next(turn))
        self()  # an attempt to capture may have left its result poisoned

    def __call__(self) -> None:
        self._call()

    def _launch(self, launch: Launch) -> None:
        self.result = launch()

    def _capture(self, entrant: Entrant, count: int) -> Callable[[], None]:
        """A graph's replay. Raises RuntimeError if a replay does not write the result."""
        graph = torch.cuda.CUDAGraph()
        turn = cycle(entrant.launches)
        with torch.cuda.graph(graph):
            for _ in range(count):
                result = next(turn)()
        poison(result)
        graph.replay()
        torch.cuda.synchronize()
        if poisoned(result):  # launched on a stream of its own: the graph is empty, and very fast
            raise RuntimeError("a captured graph does not write the result")
        self.result = result
        return graph.replay


def _capture_anything() -> None:
    """End what a capture that failed leaves open: the default generator would refuse every draw from now on."""
    with suppress(Exception), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


def one_line(error: BaseException) -> str:
    """Class and words of an error, at most 160 characters, without folders: they would end up in a published file."""
    text = re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:160].removesuffix(": ")
