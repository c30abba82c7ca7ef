"""What must hold of any INT8 GEMM, ours or somebody else's: properties of a `subjects.Subject`, without a tolerance.

    accumulator    the int32 sums equal int64-exact arithmetic
    output         the dequantized output is bit-equal to `reference.scaled_mm`; NaN equals NaN
    batch          a row gives the same bits alone, permuted among others, and with more rows below it
    linearity      sums(a + b) = sums(a) + sums(b), exactly
    zero rows      a row of zeros with scale 0 gives the bias and nothing else
    nan rows       a row whose scale is NaN is NaN, and changes no other
    strided        operands that are parts of larger matrices give the same bits as copies of them
    repeats        three runs give the same bits
    order          operands that the kernel before writes late are read as it leaves them (a card from sm_90 on)
    configuration  any two configurations give the same bits (of int8kit alone)

Each takes an example (`strategies.Draw`) and says how the subject breaks it, or None. `accumulator` and `linearity`
need a subject that gives sums, the others take its output, or its sums if it gives no more. Comparing with a tolerance
and looking at the worst element was rejected: it is what let the faults through that this module is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from int8kit import reference
from int8kit.verify.compare import difference, operands
from int8kit.verify.examples.guarded_buffers import POISON
from int8kit.verify.examples.strategies import Draw, served
from int8kit.verify.implementations import Subject
from int8kit.verify.properties import pdl_probe

Check = Callable[[Draw, Subject], str | None]


def accumulator(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    assert subject.sums is not None
    x, w, *_ = operands(d, subject.device)
    return difference(subject.sums(d, x, w), reference.accumulate(x, w))


def output(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    x, w, sx, sw, bias = operands(d, subject.device)
    return difference(subject.run(d, x, w, sx, sw, bias), _truth(d, subject, x, w, sx, sw, bias))


def batch(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    x, w, sx, sw, bias = operands(d, subject.device)
    y = subject.run(d, x, w, sx, sw, bias)
    m = d.shape.m
    order = torch.randperm(m, generator=torch.Generator().manual_seed(d.seed)).to(x.device)
    why = difference(subject.run(d, x[order], w, sx[order], sw, bias), y[order])
    if why:
        return f"permuted rows: {why}"
    more = torch.cat([x, x.flip(0)[: 1 + m // 3]]), torch.cat([sx, sx[: 1 + m // 3]])
    if why := difference(subject.run(d, more[0], w, more[1], sw, bias)[:m], y):
        return f"more rows below: {why}"
    few = subject.fit(replace(d, shape=replace(d.shape, m=1))).shape.m
    if few > m:
        return None
    why = difference(subject.run(d, x[m - few :].clone(), w, sx[m - few :].clone(), sw, bias), y[m - few :])
    return f"the last {few} alone: {why}" if why else None


def linearity(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    assert subject.sums is not None
    x, w, *_ = operands(d, subject.device)
    a = x // 2  # a and b stay inside int8, and so does their sum
    b = x.flip(0).contiguous() // 2
    return difference(subject.sums(d, a + b, w), subject.sums(d, a, w) + subject.sums(d, b, w))


def zero_rows(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    x, w, sx, sw, bias = operands(replace(d, scales="ordinary"), subject.device)
    x, sx = x.clone(), sx.clone()
    x[::2], sx[::2] = 0, 0
    y = subject.run(d, x, w, sx, sw, bias)[::2]
    want = torch.zeros_like(y) if bias is None or subject.output is None else bias.to(y.dtype).expand_as(y)
    return difference(y, want.contiguous())


def nan_rows(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    x, w, sx, sw, bias = operands(replace(d, scales="ordinary"), subject.device)
    y = subject.run(d, x, w, sx, sw, bias)
    broken = torch.arange(d.shape.m, device=x.device) % 3 == 1
    found = subject.run(d, x, w, torch.where(broken, torch.nan, sx), sw, bias)
    lost = int((~found[broken].isnan()).sum())
    return f"{lost} elements of NaN rows are numbers" if lost else difference(found[~broken], y[~broken])


def strided(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    x, w, sx, sw, bias = operands(replace(d, padding=0), subject.device)
    part = torch.full((d.shape.m + 2, d.shape.k + 32), POISON, dtype=torch.int8, device=x.device)
    part[1:-1, 16:-16] = x
    return difference(subject.run(d, part[1:-1, 16:-16], w, sx, sw, bias), subject.run(d, x, w, sx, sw, bias))


def repeats(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    x, w, sx, sw, bias = operands(d, subject.device)
    first = subject.run(d, x, w, sx, sw, bias).clone()
    again = (difference(subject.run(d, x, w, sx, sw, bias), first) for _ in range(2))
    return next((why for why in again if why), None)


def order(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    x, w, sx, sw, bias = operands(d, subject.device)
    rows = x.clone(memory_format=torch.contiguous_format)
    want = subject.run(d, rows, w, sx, sw, bias).clone()  # compiles, too: what is late must not be waited for by that
    rows.zero_()
    pdl_probe.copy(rows, x.contiguous())
    return difference(subject.run(d, rows, w, sx, sw, bias), want)


def configuration(d: Draw, subject: Subject) -> str | None:
    """See the module."""
    x, w, sx, sw, bias = operands(d, subject.device)
    tiles = [config for config in subject.tiles if served(d, config)]
    other = replace(d, config=tiles[d.seed % len(tiles)])
    why = difference(subject.run(other, x, w, sx, sw, bias), subject.run(d, x, w, sx, sw, bias))
    return f"against {other.config}: {why}" if why else None


def _truth(
    d: Draw, subject: Subject, x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    if subject.output is None:
        return reference.accumulate(x, w)
    return reference.scaled_mm(x, w, sx, sw, bias, out_dtype=d.out_dtype)


ALL: dict[str, Check] = {
    "accumulator": accumulator, "output": output, "batch": batch, "linearity": linearity, "zero rows": zero_rows,
    "nan rows": nan_rows, "strided": strided, "repeats": repeats, "order": order,
    "configuration": configuration,
}  # fmt: skip
OF_SUMS = ("accumulator", "linearity")
OF_OUTPUT = ("output", "zero rows", "nan rows")


def why_not(name: str, subject: Subject) -> str | None:
    """Why a property does not apply to a subject, or None."""
    if name in OF_SUMS and subject.sums is None:
        return "it gives no sums"
    if name in OF_OUTPUT and subject.output is None:
        return "it gives sums only"
    if name == "configuration" and not subject.tiles:
        return "it has no configurations"
    if name == "order" and not pdl_probe.overlaps(subject.device):
        return "no kernel begins here before the one ahead has ended"
    if name == "strided" and not subject.strides:
        return "it takes contiguous operands"
    return None
