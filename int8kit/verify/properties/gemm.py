"""Properties of an INT8 GEMM: int8kit's kernels, or another implementation. None of them has a tolerance.

Each takes an example (`strategies.Draw`) and an implementation under test, and returns how the implementation breaks
the property, or None. Properties of the output use the accumulators where an implementation returns nothing more.
Operands lie in buffers of poison. An implementation that writes into a given output gets one in a buffer of sentinels.

Comparing with a tolerance, or looking at the worst element alone, was rejected: such checks let the faults through that
these properties are for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from int8kit import reference
from int8kit.spec import GemmShape, Kernel
from int8kit.verify.compare import bitwise_diff, operands
from int8kit.verify.examples.guarded_buffers import POISON, GuardedOutput, huge_stride_matrix, tile_guard
from int8kit.verify.examples.strategies import Draw, takes_operands
from int8kit.verify.implementations import Implementation
from int8kit.verify.properties import pdl_probe


def accumulators(d: Draw, gemm: Implementation) -> str | None:
    """The int32 accumulators equal int64-exact arithmetic, and `torch._int_mm` where it takes the shape."""
    assert gemm.accumulators is not None
    x, w, *_ = operands(d, gemm.device)
    got, written_outside = _guarded(gemm.accumulators, d, d.shape.n, torch.int32, gemm, x, w)
    why = bitwise_diff(got, reference.accumulate(x, w))
    if why is None and gemm.takes_out and d.shape.m > 16 and d.shape.n % 8 == 0 and d.shape.k % 8 == 0:
        why = bitwise_diff(got, torch._int_mm(x.contiguous(), w.contiguous().t()))
        why = why and f"against torch._int_mm: {why}"
    return why or written_outside()


def output(d: Draw, gemm: Implementation) -> str | None:
    """The dequantized output is bit-equal to `reference.scaled_mm`; NaN equals NaN."""
    x, w, sx, sw, bias = operands(d, gemm.device)
    if gemm.output is None:
        return bitwise_diff(gemm.run(d, x, w, sx, sw, bias), reference.accumulate(x, w))
    got, written_outside = _guarded(gemm.output, d, d.shape.n, d.out_dtype, gemm, x, w, sx, sw, bias)
    want = reference.scaled_mm(x, w, sx, sw, bias, out_dtype=d.out_dtype)
    return bitwise_diff(got, want) or written_outside()


def swiglu(d: Draw, gemm: Implementation) -> str | None:
    """The output of the SwiGLU epilogue is bit-equal to `reference.scaled_mm_swiglu`. N is rounded up to pairs."""
    assert gemm.swiglu is not None
    step = 2 if d.config.kernel is Kernel.TRITON else 16
    shape = GemmShape(d.shape.m, -(-d.shape.n // step) * step, d.shape.k)
    x, w, sx, sw, bias = operands(replace(d, shape=shape), gemm.device)
    got, written_outside = _guarded(gemm.swiglu, d, shape.n // 2, d.out_dtype, gemm, x, w, sx, sw, bias)
    want = reference.scaled_mm_swiglu(x, w, sx, sw, bias, out_dtype=d.out_dtype)
    return bitwise_diff(got, want) or written_outside()


def _guarded(
    call: Callable[..., torch.Tensor], d: Draw, columns: int, dtype: torch.dtype, gemm: Implementation, *tensors: Any
) -> tuple[torch.Tensor, Callable[[], str | None]]:
    """The result of a call, and the check that it wrote nothing outside its output."""
    if not gemm.takes_out:
        return call(d, *tensors), lambda: None
    out = GuardedOutput(d.shape.m, columns, d.padding, tile_guard(columns), dtype, gemm.device)
    if d.huge_stride == "out":
        out.view = huge_stride_matrix(d.shape.m, columns, dtype, gemm.device)
    return call(d, *tensors, out=out.view), out.written_outside


def batch(d: Draw, gemm: Implementation) -> str | None:
    """A row gives the same bits alone, permuted among other rows, and with more rows below it."""
    x, w, sx, sw, bias = operands(d, gemm.device)
    y = gemm.run(d, x, w, sx, sw, bias)
    m = d.shape.m
    order = torch.randperm(m, generator=torch.Generator().manual_seed(d.seed)).to(x.device)
    why = bitwise_diff(gemm.run(d, x[order], w, sx[order], sw, bias), y[order])
    if why:
        return f"permuted rows: {why}"
    more = torch.cat([x, x.flip(0)[: 1 + m // 3]]), torch.cat([sx, sx[: 1 + m // 3]])
    if why := bitwise_diff(gemm.run(d, more[0], w, more[1], sw, bias)[:m], y):
        return f"more rows below: {why}"
    few = gemm.to_supported_domain(replace(d, shape=replace(d.shape, m=1))).shape.m
    if few > m:
        return None
    why = bitwise_diff(gemm.run(d, x[m - few :].clone(), w, sx[m - few :].clone(), sw, bias), y[m - few :])
    return f"the last {few} alone: {why}" if why else None


def linearity(d: Draw, gemm: Implementation) -> str | None:
    """accumulators(a + b) = accumulators(a) + accumulators(b), exactly."""
    assert gemm.accumulators is not None
    x, w, *_ = operands(d, gemm.device)
    a = x // 2  # a and b stay inside int8, and so does their sum
    b = x.flip(0).contiguous() // 2
    return bitwise_diff(gemm.accumulators(d, a + b, w), gemm.accumulators(d, a, w) + gemm.accumulators(d, b, w))


def zero_rows(d: Draw, gemm: Implementation) -> str | None:
    """A row of zeros with scale 0 gives the bias and nothing else."""
    x, w, sx, sw, bias = operands(replace(d, scales="ordinary"), gemm.device)
    x, sx = x.clone(), sx.clone()
    x[::2], sx[::2] = 0, 0
    y = gemm.run(d, x, w, sx, sw, bias)[::2]
    want = torch.zeros_like(y) if bias is None or gemm.output is None else bias.to(y.dtype).expand_as(y)
    return bitwise_diff(y, want.contiguous())


def nan_rows(d: Draw, gemm: Implementation) -> str | None:
    """A row whose scale is NaN is NaN, and changes no other row."""
    x, w, sx, sw, bias = operands(replace(d, scales="ordinary"), gemm.device)
    y = gemm.run(d, x, w, sx, sw, bias)
    broken = torch.arange(d.shape.m, device=x.device) % 3 == 1
    found = gemm.run(d, x, w, torch.where(broken, torch.nan, sx), sw, bias)
    lost = int((~found[broken].isnan()).sum())
    return f"{lost} elements of NaN rows are numbers" if lost else bitwise_diff(found[~broken], y[~broken])


def strided(d: Draw, gemm: Implementation) -> str | None:
    """Operands that are parts of larger matrices give the same bits as copies of them."""
    x, w, sx, sw, bias = operands(replace(d, padding=0), gemm.device)
    part = torch.full((d.shape.m + 2, d.shape.k + 32), POISON, dtype=torch.int8, device=x.device)
    part[1:-1, 16:-16] = x
    return bitwise_diff(gemm.run(d, part[1:-1, 16:-16], w, sx, sw, bias), gemm.run(d, x, w, sx, sw, bias))


def repeats(d: Draw, gemm: Implementation) -> str | None:
    """Three runs give the same bits."""
    x, w, sx, sw, bias = operands(d, gemm.device)
    first = gemm.run(d, x, w, sx, sw, bias).clone()
    again = (bitwise_diff(gemm.run(d, x, w, sx, sw, bias), first) for _ in range(2))
    return next((why for why in again if why), None)


def order(d: Draw, gemm: Implementation) -> str | None:
    """Operands that the kernel ahead writes late are read as it leaves them."""
    x, w, sx, sw, bias = operands(d, gemm.device)
    rows = x.clone(memory_format=torch.contiguous_format)
    want = gemm.run(d, rows, w, sx, sw, bias).clone()  # also compiles, which would outlast the delay
    rows.zero_()
    pdl_probe.delayed_copy(rows, x.contiguous())
    return bitwise_diff(gemm.run(d, rows, w, sx, sw, bias), want)


def configuration(d: Draw, gemm: Implementation) -> str | None:
    """Any two configurations of the kernels give the same bits."""
    x, w, sx, sw, bias = operands(d, gemm.device)
    tiles = [config for config in gemm.tiles if takes_operands(d, config)]
    other = replace(d, config=tiles[d.seed % len(tiles)])
    why = bitwise_diff(gemm.run(other, x, w, sx, sw, bias), gemm.run(d, x, w, sx, sw, bias))
    return f"against {other.config}: {why}" if why else None
