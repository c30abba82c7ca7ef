"""The property `order`: a kernel that starts early reads and writes nothing before the kernel ahead has ended.

    delayed_copy(operand)      the kernel ahead: it lets the GEMM start, and writes one operand a few milliseconds later
    y = gemm(...)              must be the reference's result for the operands as they are in the end

Each operand is late in one example, and all others are ready. So each group of warps that reads one must have waited.
The output and the workspace of stream-K are written late with other values: a store that comes too early is lost. The
result of a correct kernel does not depend on the time: it waits, however long the kernel ahead takes.

A launch with stream-K sets its counters to zero by a kernel of its own, which would come between the two and hide the
fault. `Buffers` makes them before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from int8kit.kernels import gemm as kernels
from int8kit.verify.compare import MATRICES, VECTORS, Output, bitwise_diff, expected
from int8kit.verify.examples.guarded_buffers import SENTINEL
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.implementations import Implementation
from int8kit.verify.properties import pdl_probe
from int8kit.verify.properties.gemm import Runs, begin

GARBAGE = 12345  # in counters and sums that are not written yet


class Buffers:
    """The buffers of stream-K, which the launches of a module share: `made` by its first launch, or None."""

    def __init__(self) -> None:
        self.made: Any = None

    @contextmanager
    def shared_by(self, module: Any) -> Iterator[None]:
        """A context in which every launch of `module` gets the buffers of the first one."""
        original = module.stream_k

        def stream_k(*args: Any, **more: Any) -> Any:
            self.made = self.made or original(*args, **more)
            return self.made

        module.stream_k = stream_k
        try:
            yield
        finally:
            module.stream_k = original


def order(d: Draw, gemm: Implementation) -> str | None:
    """How a result differs from the reference's if the kernel ahead writes one operand late, or None."""
    late = d.late or "x"
    if not gemm.takes_out and late not in (*MATRICES[:2], *VECTORS):
        late = "x"
    d, given, run = begin(replace(d, padding=0, offset=0), gemm)  # dense: the copy takes one run of elements
    if d.variant == "int32" and late in VECTORS:
        late = "x"
    if late == "bias" and given[4] is None:
        late = "sx"
    want, buffers = expected(d, *given) if gemm.takes_out else run(d, *given).clone(), Buffers()
    if not d.config.stream_k or not gemm.takes_out:
        return _late(d, late, given, want, run, buffers)
    with buffers.shared_by(kernels.module(d.config.kernel)):
        return _late(d, late, given, want, run, buffers)


def _late(d: Draw, late: str, given: Any, want: torch.Tensor, run: Runs, buffers: Buffers) -> str | None:
    out = Output(d, d.shape.m, run.gemm.device)
    # compiles, which would outlast the delay, and makes the buffers
    if why := bitwise_diff(run(d, *given, out=out), want):
        return f"nothing late: {why}"
    targets = dict(zip(("x", "w", *VECTORS), given, strict=True)) | {"out": out.view}
    if buffers.made is not None:
        buffers.made.arrived.zero_()
        targets |= {"arrived": buffers.made.arrived, "workspace": buffers.made.workspace}
    if late not in targets:
        return None  # no stream-K here
    target = targets[late if targets[late].is_contiguous() else "x"].view(-1)
    source = torch.full_like(target, GARBAGE) if late in ("out", "workspace") else target.clone()
    out.view.fill_(SENTINEL)  # a tile that is not stored again shows
    if late not in ("out", "workspace"):
        target.fill_(torch.nan if target.is_floating_point() else 1 if target.dtype is torch.int8 else GARBAGE)
    pdl_probe.delayed_copy(target, source)
    why = bitwise_diff(run(d, *given, out=out), want)
    return f"{late} late: {why}" if why else run.outside
