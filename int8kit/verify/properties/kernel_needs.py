"""Part of the property `fallback`: a Gluon kernel serves operands that it can read, and refuses all others.

Operands that lack one need alone, by the least that a weaker check would take, such as rows that start at odd multiples
of 8 bytes. Only the decision is asked for, which needs no GPU: `why_not` of the kernel's module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from int8kit.kernels import gemm
from int8kit.kernels.operands import Operands
from int8kit.spec import Kernel
from int8kit.verify.examples.strategies import OUT_DTYPES
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation
from int8kit.verify.properties.gemm_calls import STRIDE_MAX, FallbackCall, check_fallback

NEEDS: dict[Kernel, tuple[str, ...]] = {
    Kernel.TRITON: (),
    Kernel.MMA_SYNC: (
        "columns apart", "k", "address of x", "address of w", "stride of x", "stride of w", "far x", "far w",
    ),
    Kernel.WGMMA: (
        "columns apart", "k", "address of x", "address of w", "address of out", "stride of x", "stride of w",
        "stride of out", "end of out", "sm_86", "sm_100", "sm_120",
    ),
}  # fmt: skip
"""The needs of each kernel. Columns are apart where there is one: K = N = 1, and its stride is 2."""

FREE: dict[Kernel, tuple[str, ...]] = {
    Kernel.TRITON: (*NEEDS[Kernel.WGMMA], "far x", "far w"),
    Kernel.MMA_SYNC: ("address of out", "stride of out", "end of out", "sm_86", "sm_100", "sm_120"),
    Kernel.WGMMA: ("far x", "far w"),
}
"""Needs that a kernel does not have."""

M, N, K, ALIGNED = 3, 32, 48, 16


@dataclass(frozen=True)
class NeedCall:
    """Operands that lack one need, or none."""

    kernel: Kernel
    lacks: str  # of NEEDS or FREE, or ""
    bytes: int = 8  # by how many an address, a row or an end is off; a multiple of the itemsize
    out: torch.dtype = torch.bfloat16
    int32: bool = False  # out is the accumulators

    def __str__(self) -> str:
        out = "int32 accumulators" if self.int32 else str(self.out).removeprefix("torch.")
        return f"{self.kernel} kernel, {out}, {f'{self.lacks} off by {self.bytes} bytes' if self.lacks else 'aligned'}"


def calls() -> Iterator[NeedCall]:
    """Each need of each kernel, with each dtype of the output; and operands 16 bytes further on, which have all."""
    for kernel in Kernel:
        for out in OUT_DTYPES:
            yield NeedCall(kernel, "", out=out)
            for lacks in (*NEEDS[kernel], *FREE[kernel]):
                yield NeedCall(kernel, lacks, out=out)
        for lacks in (*NEEDS[kernel], *FREE[kernel]):
            yield NeedCall(kernel, lacks, int32=True)
            if any(lacks.startswith(name) for name in ("k", "address", "stride", "end")):
                yield NeedCall(kernel, lacks, 16)
                yield from (NeedCall(kernel, lacks, off) for off in (1, 2, 4) if off >= (2 if "out" in lacks else 1))


def check(c: FallbackCall | NeedCall, on: Executor | Implementation) -> str | None:
    """The check of either class of the property `fallback`."""
    return check_fallback(c, on) if isinstance(c, FallbackCall) else check_need(c, on)


def check_need(c: NeedCall, on: Executor | Implementation) -> str | None:
    """Whether the kernel takes operands that it cannot read, or refuses others; None if neither."""
    arch = int(c.lacks.removeprefix("sm_")) if c.lacks.startswith("sm_") else 90
    with _capability(c.kernel, divmod(arch, 10)):
        reason = gemm.module(c.kernel).why_not(_operands(c, on.device))
    refused = c.lacks in NEEDS[c.kernel] and c.bytes % ALIGNED != 0
    if refused is (reason is not None):
        return None
    return f"refused: {reason}; expected that the kernel serves" if reason else "served, expected a reason why not"


def _operands(c: NeedCall, device: str) -> Operands:
    """The operands of a call, in memory of their own. Nothing reads them."""
    if c.lacks == "columns apart":
        return _apart(c, device)
    k = K + (c.bytes if c.lacks == "k" else 0)
    dtype = torch.int32 if c.int32 else c.out
    columns = N + (c.bytes // dtype.itemsize if c.lacks == "end of out" else 0)
    x, w = (_matrix(c, name, rows, k, torch.int8, device) for name, rows in (("x", M), ("w", N)))
    if c.lacks == "end of out":
        w = torch.empty(columns, k, dtype=torch.int8, device=device)
    out = _matrix(c, "out", M, columns, dtype, device)
    if c.int32:
        return Operands(x, w, None, None, None, out)
    return Operands(x, w, torch.ones(M, device=device), torch.ones(columns, device=device), None, out)


def _apart(c: NeedCall, device: str) -> Operands:
    """Operands of one column each, and vectors of one element, whose strides of 2 say nothing."""
    x, w, out = (
        torch.empty(rows, 4, dtype=dtype, device=device)[:, ::2][:, :1]
        for rows, dtype in ((M, torch.int8), (1, torch.int8), (M, torch.int32 if c.int32 else c.out))
    )
    if c.int32:
        return Operands(x, w, None, None, None, out)
    sw, bias = (torch.ones(2, dtype=dtype, device=device)[::2] for dtype in (torch.float32, torch.bfloat16))
    return Operands(x, w, torch.ones(M, device=device), sw, bias, out)


def _matrix(c: NeedCall, name: str, rows: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """An empty matrix whose address, rows and distance of rows are multiples of 16 bytes, except for the need."""
    size = dtype.itemsize
    stride = -(-width * size // ALIGNED) * ALIGNED + (c.bytes if c.lacks == f"stride of {name}" else 0)
    stride = STRIDE_MAX if c.lacks == f"far {name}" else stride
    first = c.bytes if c.lacks == f"address of {name}" else 0
    memory = torch.empty(rows * stride + 2 * ALIGNED, dtype=torch.uint8, device=device)
    first += -memory.data_ptr() % ALIGNED
    size_in = (rows * stride) // size * size
    return memory[first : first + size_in].view(dtype).as_strided((rows, width), (stride // size, 1))


@contextmanager
def _capability(kernel: Kernel, capability: tuple[int, int]) -> Iterator[None]:
    """A context in which torch's GPU has this compute capability. The module keeps the answer of each device."""
    clear = getattr(getattr(gemm.module(kernel), "_why_not_sm90", None), "cache_clear", lambda: None)
    clear()
    try:
        with (
            mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
            mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU"),
        ):
            yield
    finally:
        clear()
