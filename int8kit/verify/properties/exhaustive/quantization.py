"""Proofs of the quantization: the scale for every largest magnitude, and the quotient for every pair of 16-bit numbers.

The expected results are plain torch on the same device, and share no code with a kernel or with `reference`. All
divisors are tensors: on CUDA torch multiplies by the reciprocal of a Python number, which rounds differently.
"""

from __future__ import annotations

import torch

from int8kit.kernels import quantize
from int8kit.verify.examples.limits import K_MAX_HELD
from int8kit.verify.executors import Executor
from int8kit.verify.properties.exhaustive import bits, device_kernels
from int8kit.verify.properties.proof import Outcome, Report

HALVES = {torch.bfloat16: 0x7F7F, torch.float16: 0x7BFF}  # by dtype: the bits of the largest finite number
WIDTHS = (K_MAX_HELD, 5 * quantize.LONG_CHUNK)  # K of rows that registers hold, and of longer ones
ROWS = 1 << 24  # of one element


def scale(amax: torch.Tensor) -> torch.Tensor:
    """amax / 127, or NaN for an infinity or a NaN: fp32."""
    return torch.where(amax.isfinite(), amax.div(torch.full_like(amax, 127.0)), torch.nan)


def quotient(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """clamp(rint(x / s), -127, 127) for x [R, K] and s [R, 1] fp32, 0 where s is 0 or NaN: int8. Overwrites x."""
    x.div_(torch.where(s > 0, s, 1.0)).round_().clamp_(-127.0, 127.0)
    return torch.where(s > 0, x, 0.0).to(torch.int8)


def row_scale(executor: Executor, report: Report, domain: range = bits.EVERY_16_BITS) -> Outcome:
    """s for every bf16 and fp16 number, by `row_primitives.row_scale`; on a GPU by `quantize` itself, too."""
    count = 0
    for dtype in HALVES:
        report(f"the scale of every {dtype}")
        x = bits.patterns(domain, dtype, executor.device)
        want = scale(x.float().abs())
        if why := bits.compare(device_kernels.row_scales(x), want, bits.named(x, "amax")):
            return Outcome(count, why)
        if executor.on != "interpreter" and (why := _one_element(x)):
            return Outcome(count, why)
        count += len(domain)
    return Outcome(count)


def row_scale_fp32(executor: Executor, report: Report, domain: range = bits.EVERY_32_BITS) -> Outcome:
    """s and q of a row of one element, for every fp32 number."""
    count = 0
    for part in bits.chunks(domain, ROWS):
        report(f"rows of one fp32 number, from bits {part.start} on")
        if why := _one_element(bits.patterns(part, torch.float32, executor.device)):
            return Outcome(count, why)
        count += len(part)
    return Outcome(count)


def _one_element(x: torch.Tensor) -> str | None:
    """How `quantize` differs for rows of one element."""
    q, s = quantize.quantize(x[:, None])
    rows = x.float()[:, None]  # of fp32, x itself
    want = scale(rows.abs())
    why = bits.compare(s[:, None], want, bits.named(x, "s of a row of one element"))
    return why or bits.compare(q, quotient(rows.clone(), want), bits.named(x, "q of a row of one element"))


def pairs(
    executor: Executor,
    report: Report,
    amaxes: dict[torch.dtype, range] | None = None,
    widths: tuple[int, ...] = WIDTHS,
) -> Outcome:
    """q and s for every pair of an amax and a number of at most its magnitude, by both kernels of `quantize`.

    amaxes: the bits of the largest magnitudes by dtype; all finite ones if absent.
    """
    count = 0
    for dtype, domain in (amaxes or {dtype: range(last + 1) for dtype, last in HALVES.items()}).items():
        for k in widths:
            amax = torch.tensor(domain, device=executor.device)
            lengths = (2 * (amax + 1) + k - 2).div(k - 1, rounding_mode="floor")  # rows of each amax, both signs
            amax = amax.repeat_interleave(lengths)
            first = torch.arange(len(amax), device=executor.device) - (lengths.cumsum(0) - lengths).repeat_interleave(
                lengths
            )
            for rows in bits.chunks(range(len(amax)), max(1, bits.CHUNK // k)):
                part = slice(rows.start, rows.stop)
                report(f"{dtype}, rows of {k}, from the amax with bits {int(amax[rows.start])} on")
                x, used = _rows(amax[part], first[part] * (k - 1), k, dtype)
                if why := _row_difference(x):
                    return Outcome(count, f"K = {k}, {why}")
                count += used
    return Outcome(count)


def _rows(amax: torch.Tensor, first: torch.Tensor, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Rows of an amax and k - 1 of the numbers up to it, and how many these are. All arguments are bits.

    Numbers are counted by magnitude, the positive one before the negative one. A row begins with its `first` number.
    Past the last number a row has zeros.
    """
    number = first.int()[:, None] + torch.arange(-1, k - 1, dtype=torch.int32, device=amax.device)
    number[:, 0] = 2 * amax.int()
    magnitude = number >> 1
    inside = magnitude <= amax.int()[:, None]
    x = torch.where(inside, magnitude | (number & 1) << 15, 0)
    return x.to(torch.int16).view(dtype), int(inside.sum()) - len(amax)


def _row_difference(x: torch.Tensor) -> str | None:
    q, s = quantize.quantize(x)
    wide = x.float()
    want_s = scale(wide[:, :1])
    if why := bits.compare(s[:, None], want_s, bits.named(x[:, 0], "s of amax")):
        return why
    want = quotient(wide, want_s)
    place = bits.first_difference(q, want)
    if place is None:
        return None
    of = bits.named(x[:, 0], "amax")(place), bits.named(x[place[0]], "x")(place[1:])
    return f"{of[0]}, {of[1]}: got {q[place].item()}, expected {want[place].item()}"
