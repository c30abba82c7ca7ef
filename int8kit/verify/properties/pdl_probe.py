"""A kernel that writes late: it lets the next one begin, waits, and only then writes what that one reads.

    late.copy(target, source)    [M, K] int8 of one card; `target` holds `source` a millisecond later
    y = gemm(target, ...)        must wait for it, as a kernel does unless it was launched to begin early

A card from sm_90 on starts a kernel that asks for it ("programmatic dependent launch") before the one ahead of it has
ended, as soon as each of that one's programs has said `launch_dependents`. A GEMM that begins early and forgets to
wait reads right operands all but always, since a kernel that says nothing lets nobody begin before its end: hence this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, globaltimer

DELAY_NS = 1_000_000  # several launches from the host
_BLOCK = 4096


@triton.jit
def _copy(target_ptr, source_ptr, size, DELAY: tl.constexpr, BLOCK: tl.constexpr):
    gdc_launch_dependents()
    start = globaltimer()
    now = start
    while now - start < DELAY:
        now = globaltimer()
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(target_ptr + i, tl.load(source_ptr + i, mask=i < size, other=0), mask=i < size)


def overlaps(device: str) -> bool:
    """True if a kernel can begin on `device` before the one ahead of it has ended."""
    return device != "cpu" and torch.cuda.get_device_capability(device) >= (9, 0)


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Write `source` into `target`, both contiguous and of one size, late, on the present stream; see the module.

    One program: all other multiprocessors are free for a kernel that begins early.
    """
    _copy[(1,)](target, source, target.numel(), DELAY=DELAY_NS, BLOCK=_BLOCK)
