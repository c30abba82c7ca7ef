"""A function of tensors as one CUDA graph: the host then launches a step in microseconds.

    captured = Captured(call, tensors)     after a first call of `call`, which compiles
    out = captured(*others)                of the same shapes and dtypes

At 768 px the host needs longer than an H200 for the launches of a step. The results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Captured:
    """`call(*tensors)` as a graph. It reads copies of the tensors, and its output is overwritten by the next call.

    pool: memory that graphs share which never run at once (`torch.cuda.graph_pool_handle`). Raises RuntimeError if
    `call` waits for the GPU or does anything else that a graph cannot hold.
    """

    def __init__(
        self, call: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], pool: Any | None = None
    ) -> None:
        self._given = [tensor.clone() for tensor in tensors]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._out = call(*self._given)

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The output for other tensors, valid until the next call."""
        for own, tensor in zip(self._given, tensors, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._out
