"""A function of tensors as one CUDA graph: the host then launches a step in microseconds.

    captured = Captured(call, tensors)     after a first call of `call`, which compiles
    outs = captured(*others)               of the same shapes and dtypes

At 768 px the host needs longer than an H200 for the launches of a step. The results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Captured:
    """`call(*tensors)` as a graph. It reads copies of the tensors, and the next call overwrites its outputs.

    `call` must not wait for the GPU: torch's random numbers are unusable in a process after a capture that failed.
    """

    def __init__(self, call: Callable[..., tuple[torch.Tensor, ...]], tensors: Sequence[torch.Tensor]) -> None:
        self._given = [tensor.clone() for tensor in tensors]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outs = call(*self._given)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs for other tensors, valid until the next call."""
        for own, tensor in zip(self._given, tensors, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._outs
