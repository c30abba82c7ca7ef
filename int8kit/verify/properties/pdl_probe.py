"""A copy kernel that writes late, to show a GEMM that starts early and does not wait for its operands.

    delayed_copy(target, source)    one size and dtype, on one GPU; `target` holds `source` milliseconds later
    y = gemm(target, ...)           must wait, as a kernel does unless it was launched to start early

From sm_90 on, programmatic dependent launch (PDL) lets a kernel start before the kernel ahead has ended, as soon as
each program of the kernel ahead has called `launch_dependents`. A GEMM that starts early but skips the wait usually
still reads correct operands, because most kernels never call `launch_dependents`. This kernel calls it before it
writes, so the fault shows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, globaltimer

DELAY_NS = 5_000_000  # many launches from a host that other processes share
_BLOCK = 4096


@triton.jit
def _delayed_copy(target_ptr, source_ptr, size, DELAY: tl.constexpr, BLOCK: tl.constexpr):
    gdc_launch_dependents()
    start = globaltimer()
    now = start
    while now - start < DELAY:
        now = globaltimer()
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(target_ptr + i, tl.load(source_ptr + i, mask=i < size, other=0), mask=i < size)


def overlaps(device: str) -> bool:
    """True if a kernel can start on `device` before the kernel ahead of it has ended."""
    return device != "cpu" and torch.cuda.get_device_capability(device) >= (9, 0)


def delayed_copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write `source` into `target` after a delay, on the current stream. Both are contiguous, of any dtype.

    It runs one program: all other multiprocessors are free for a kernel that starts early.
    """
    _delayed_copy[(1,)](target, source, target.numel(), DELAY=DELAY_NS, BLOCK=_BLOCK)
