"""Properties of an INT8 GEMM: int8kit's kernels, or another implementation. None of them has a tolerance.

Each takes an example (`strategies.Draw`) and an implementation under test, and returns how the implementation breaks
the property, or None. Properties of any result look at the variant that the example names: output, accumulators or
SwiGLU. They use the accumulators where an implementation returns nothing more. Operands lie in buffers of poison. An
implementation that writes into a given output gets one in a buffer of sentinels.

Comparing with a tolerance, or looking at the worst element alone, was rejected: such checks let the faults through that
these properties are for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from int8kit import reference
from int8kit.verify.compare import Operands, Output, Unchanged, bitwise_diff, expected, operands, place
from int8kit.verify.examples.strategies import Draw, admitted
from int8kit.verify.implementations import Implementation


class Runs:
    """Calls of an implementation, and the elements that they wrote outside their outputs, also in operands."""

    def __init__(self, gemm: Implementation) -> None:
        self.gemm = gemm
        self.outside: str | None = None

    def __call__(self, d: Draw, *given: Any, out: Output | None = None) -> torch.Tensor:
        """The result of the variant of `d` for the operands `given`, in a new output unless `out` is one."""
        x = given[0]
        call = {"int32": self.gemm.accumulators, "swiglu": self.gemm.swiglu}.get(d.variant, self.gemm.output)
        if call is None:
            return self.gemm.run(d, *given)
        tensors = given[:2] if d.variant == "int32" else given
        kept = Unchanged(zip(("x", "w", "sx", "sw", "bias"), tensors, strict=False))
        if not self.gemm.takes_out:
            return call(d, *tensors)
        out = out or Output(d, len(x), self.gemm.device)
        call(d, *tensors, out=out.view)
        self.outside = self.outside or out.written_outside() or kept.written()
        return out.view


def _fitted(d: Draw, gemm: Implementation) -> Draw:
    """The example nearest to `d` of which `gemm` has a result, with operands at places that it takes."""
    if not gemm.takes_out:  # another library documents its results, and rarely the alignment that it needs
        d = replace(d, offset=0, shift=0, padding=d.padding if gemm.strides else 0)
        has = {"int32": gemm.accumulators, "swiglu": gemm.swiglu, "output": gemm.output}
        d = d if has[d.variant] else replace(d, variant="output" if gemm.output else "int32")
    return admitted(d)


def begin(d: Draw, gemm: Implementation, **changes: Any) -> tuple[Draw, Operands, Runs]:
    """The example with `changes` that fits `gemm`, its operands, and the means to run it."""
    fitted = _fitted(replace(d, **changes), gemm)
    return fitted, operands(fitted, gemm.device), Runs(gemm)


def accumulators(d: Draw, gemm: Implementation) -> str | None:
    """The int32 accumulators equal int64-exact arithmetic, and `torch._int_mm` where it takes the shape."""
    d, given, run = begin(d, gemm, variant="int32")
    x, w = given[:2]
    got = run(d, *given)
    why = bitwise_diff(got, reference.accumulate(x, w))
    if why is None and gemm.takes_out and d.shape.m > 16 and d.shape.n % 8 == 0 and d.shape.k % 8 == 0:
        why = bitwise_diff(got, torch._int_mm(x.clone(), w.clone().t()))  # it needs aligned addresses
        why = why and f"against torch._int_mm: {why}"
    return why or run.outside


def output(d: Draw, gemm: Implementation) -> str | None:
    """The dequantized output is bit-equal to `reference.scaled_mm`; NaN equals NaN."""
    d, given, run = begin(d, gemm, variant="output")
    return bitwise_diff(run(d, *given), expected(d, *given)) or run.outside


def swiglu(d: Draw, gemm: Implementation) -> str | None:
    """The output of the SwiGLU epilogue is bit-equal to `reference.scaled_mm_swiglu`. N is rounded up to pairs."""
    d, given, run = begin(d, gemm, variant="swiglu")
    return bitwise_diff(run(d, *given), expected(d, *given)) or run.outside


def batch(d: Draw, gemm: Implementation) -> str | None:
    """A row gives the same bits alone, permuted among other rows, and with more rows below it."""
    d, (x, w, sx, sw, bias), run = begin(d, gemm)
    y = run(d, x, w, sx, sw, bias)

    def of(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return run(d, place(d, "x", rows), w, place(d, "sx", scales), sw, bias)

    m = d.shape.m
    order = torch.randperm(m, generator=torch.Generator().manual_seed(d.seed)).to(x.device)
    if why := bitwise_diff(of(x[order], sx[order]), y[order]):
        return f"permuted rows: {why}"
    more = torch.cat([x, x.flip(0)[: 1 + m // 3]]), torch.cat([sx, sx[: 1 + m // 3]])
    if why := bitwise_diff(of(*more)[:m], y):
        return f"more rows below: {why}"
    few = gemm.to_supported_domain(replace(d, shape=replace(d.shape, m=1))).shape.m
    if few > m:
        return run.outside
    why = bitwise_diff(of(x[m - few :], sx[m - few :]), y[m - few :])
    return f"the last {few} alone: {why}" if why else run.outside


def linearity(d: Draw, gemm: Implementation) -> str | None:
    """accumulators(a + b) = accumulators(a) + accumulators(b), exactly."""
    d, (x, w, *rest), run = begin(d, gemm, variant="int32")

    def sums(rows: torch.Tensor) -> torch.Tensor:
        return run(d, place(d, "x", rows), w, *rest)

    a = x // 2  # a and b stay inside int8, and so does their sum
    b = x.flip(0) // 2
    return bitwise_diff(sums(a + b), sums(a) + sums(b)) or run.outside


def zero_rows(d: Draw, gemm: Implementation) -> str | None:
    """A row of zeros with scale 0 gives the bias and nothing else."""
    d, (x, w, sx, sw, bias), run = begin(d, gemm, scales="signed" if gemm.takes_out else "ordinary")
    x[::2], sx[::2] = 0, 0
    y = run(d, x, w, sx, sw, bias)[::2]
    want = torch.zeros_like(y)
    if bias is not None and d.variant != "int32":
        b = bias.float().expand(len(y), -1)
        want = (reference.silu(b[:, 0::2]) * b[:, 1::2] if d.variant == "swiglu" else b).to(y.dtype)
    elif d.variant != "int32" and gemm.takes_out:  # 0 * sw: the zero has the sign of sw
        z = (0.0 * sw).expand(len(y), -1)
        want = (reference.silu(z[:, 0::2]) * z[:, 1::2] if d.variant == "swiglu" else z).to(y.dtype)
    return bitwise_diff(y, want.contiguous()) or run.outside


def nan_rows(d: Draw, gemm: Implementation) -> str | None:
    """A row whose scale is NaN is NaN, and changes no other row."""
    changes = {} if gemm.takes_out else {"scales": "ordinary"}
    d, (x, w, sx, sw, bias), run = begin(d, gemm, variant="output" if d.variant == "int32" else d.variant, **changes)
    y = run(d, x, w, sx, sw, bias)
    broken = torch.arange(d.shape.m, device=x.device) % 3 == 1
    found = run(d, x, w, place(d, "sx", torch.where(broken, torch.nan, sx)), sw, bias)
    lost = int((~found[broken].isnan()).sum())
    if lost:
        return f"{lost} elements of NaN rows are numbers"
    return bitwise_diff(found[~broken], y[~broken]) or run.outside


def strided(d: Draw, gemm: Implementation) -> str | None:
    """Operands that are parts of larger matrices give the same bits as copies of them."""
    d, given, run = begin(d, gemm, padding=d.padding or 16, offset=d.offset or 16)
    dense, copies, _ = begin(d, gemm, padding=0, offset=0, shift=0)
    return bitwise_diff(run(d, *given), run(dense, *copies)) or run.outside


def repeats(d: Draw, gemm: Implementation) -> str | None:
    """Three runs give the same bits."""
    d, given, run = begin(d, gemm)
    first = run(d, *given).clone()
    again = (bitwise_diff(run(d, *given), first) for _ in range(2))
    return next((why for why in again if why), run.outside)


def configuration(d: Draw, gemm: Implementation) -> str | None:
    """Any two configurations of the kernels give the same bits."""
    d, given, run = begin(d, gemm)
    return bitwise_diff(run(replace(d, config=d.other or d.config), *given), run(d, *given)) or run.outside
