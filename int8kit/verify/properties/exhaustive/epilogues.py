"""Proofs of the epilogue: its conversions for every number, and silu for every gate.

The compiled epilogue of a GEMM kernel gets every fp32 number y as a row's scale, with an accumulator of 1 and column
scales of 1: y = (fp32(1) * sx) * 1. Such a launch has 2**22 rows. One tile stands for all tiles of a kernel, since the
conversion is an instruction that does not depend on the tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from int8kit import reference
from int8kit.kernels import gemm
from int8kit.kernels.operands import OUT_DTYPES
from int8kit.spec import Kernel, TileConfig
from int8kit.verify.executors import Executor
from int8kit.verify.properties.exhaustive import bits, device_kernels
from int8kit.verify.properties.proof import Outcome, Report

TILES = {
    Kernel.TRITON: TileConfig(128, 64, 64, num_warps=4, num_stages=3),
    Kernel.MMA_SYNC: TileConfig(128, 64, 64, num_warps=4, num_stages=3, kernel=Kernel.MMA_SYNC),
    Kernel.WGMMA: TileConfig(128, 64, 128, num_warps=8, num_stages=4, kernel=Kernel.WGMMA),
}
WIDE = TileConfig(16, 256, 32, num_warps=4, num_stages=2)  # for one row, in few programs
ROWS = 1 << 22
COLUMNS = 8  # of fp32 or 16-bit numbers: rows start at multiples of 16 bytes, as TMA needs
K = 16
HALVES = (torch.bfloat16, torch.float16)
ULPS = 4  # the bound of silu's error that `activations` states, in units in the last place


def kernels_of(executor: Executor, tiles: tuple[TileConfig, ...]) -> tuple[Kernel, ...]:
    """The kernels of `tiles` that the executor runs."""
    found = {config.kernel for config in tiles if executor.runs(config)}
    if executor.arch is not None or executor.code != 90:
        found.discard(Kernel.WGMMA)
    return tuple(kernel for kernel in TILES if kernel in found)


def conversion(
    executor: Executor, kernels: tuple[Kernel, ...], report: Report, domain: range = bits.EVERY_32_BITS,
    rows: int = ROWS,
) -> Outcome:  # fmt: skip
    """Every fp32 result, converted to each output dtype by the epilogue of each kernel."""
    device, count = executor.device, 0
    x, w = (torch.zeros(n, K, dtype=torch.int8, device=device) for n in (rows, COLUMNS))
    x[:, 0] = w[:, 0] = 1
    sw = torch.ones(COLUMNS, device=device)
    for part in bits.chunks(domain, rows):
        y = bits.patterns(part, torch.float32, device)
        for dtype in OUT_DTYPES:
            want = y.to(dtype)[:, None]
            for kernel in kernels:
                report(f"{kernel}, {dtype}, from bits {part.start} on")
                got = gemm.scaled_mm(
                    x[: len(y)], w, y, sw, config=TILES[kernel], out_dtype=dtype, arch=executor.arch
                )  # fmt: skip
                if why := bits.compare(got, want, bits.named(y, f"{kernel}, {dtype}: y")):
                    return Outcome(count, why)
        count += len(part)
    return Outcome(count)


def swiglu(
    executor: Executor, kernels: tuple[Kernel, ...], report: Report, domain: range = bits.EVERY_32_BITS,
    rows: int = ROWS,
) -> Outcome:  # fmt: skip
    """Every fp32 gate through the SwiGLU epilogue of each kernel, with ups of 1, to fp32."""
    device, count = executor.device, 0
    x, w = (torch.zeros(n, K, dtype=torch.int8, device=device) for n in (rows, 2 * COLUMNS))
    x[:, 0] = w[::2, 0] = 1  # the ups' accumulators are 0, and their bias is 1
    sw = torch.ones(2 * COLUMNS, device=device)
    bias = torch.arange(2 * COLUMNS, device=device).remainder(2).float()
    for part in bits.chunks(domain, rows):
        sx = bits.patterns(part, torch.float32, device)
        zero = torch.zeros_like(sx)
        want = (reference.silu(sx + zero) * (zero * sx + torch.ones_like(sx)))[:, None]
        for kernel in kernels:
            report(f"{kernel}, gates from bits {part.start} on")
            got = gemm.scaled_mm_swiglu(
                x[: len(sx)], w, sx, sw, bias, config=TILES[kernel], out_dtype=torch.float32, arch=executor.arch
            )
            if why := bits.compare(got, want, bits.named(sx, f"{kernel}: gate")):
                return Outcome(count, why)
        count += len(part)
    return Outcome(count)


def bias(
    executor: Executor, kernels: tuple[Kernel, ...], report: Report, domain: range = bits.EVERY_16_BITS
) -> Outcome:
    """Every bf16 and fp16 bias, each in a column of one row of zeros, to fp32.

    Without subnormal bf16 numbers in the interpreter, which converts them wrongly.
    """
    device, count = executor.device, 0
    for dtype in HALVES:
        values = bits.patterns(domain, dtype, device)
        if executor.on == "interpreter" and dtype is torch.bfloat16:
            values = values[(values.float().abs() >= torch.finfo(dtype).tiny) | (values == 0) | values.isnan()]
        x, w = (torch.zeros(n, K, dtype=torch.int8, device=device) for n in (1, len(values)))
        ones = torch.ones(len(values), device=device)
        want = values.float() + torch.zeros_like(ones)  # a zero of either sign gives +0
        for kernel in kernels:
            report(f"{kernel}, every bias of {dtype}")
            config = TILES[kernel] if kernel is not Kernel.TRITON else WIDE
            got = gemm.scaled_mm(
                x, w, ones[:1], ones, values, config=config, out_dtype=torch.float32, arch=executor.arch
            )
            if why := bits.compare(got[0], want, bits.named(values, f"{kernel}: bias")):
                return Outcome(count, why)
        count += len(values)
    return Outcome(count)


def accumulator(executor: Executor, report: Report, domain: range = bits.EVERY_32_BITS) -> Outcome:
    """fp32 of every int32 accumulator, by `epilogue.dequantize` with scales of 1."""

    def differs(acc: torch.Tensor) -> str | None:
        got = device_kernels.dequantized(acc, executor.arch)
        # float64 holds any int32, and rounds once to float32
        return bits.compare(got, acc.double().float(), bits.named(acc, "accumulator"))

    return _each_chunk(differs, domain, torch.int32, executor, report)


def silu_halves(executor: Executor, report: Report) -> Outcome:
    """`activations.silu` of every bf16 and fp16 gate."""
    report("silu of every bf16 and fp16 gate")
    g = torch.cat([bits.patterns(bits.EVERY_16_BITS, dtype, executor.device).float() for dtype in HALVES])
    return Outcome(len(g), _silu_differs(g, executor.arch))


def silu_fp32(executor: Executor, report: Report, domain: range = bits.EVERY_32_BITS) -> Outcome:
    """`activations.silu` of every fp32 gate."""
    return _each_chunk(lambda g: _silu_differs(g, executor.arch), domain, torch.float32, executor, report)


def _each_chunk(
    differs: Callable[[torch.Tensor], str | None], domain: range, dtype: torch.dtype, executor: Executor, report: Report
) -> Outcome:
    count = 0
    for part in bits.chunks(domain):
        report(f"{dtype}, from bits {part.start} on")
        if why := differs(bits.patterns(part, dtype, executor.device)):
            return Outcome(count, why)
        count += len(part)
    return Outcome(count)


def _silu_differs(g: torch.Tensor, arch: str | None) -> str | None:
    """How silu of g differs from the reference, or how far the reference is from the true value."""
    want = reference.silu(g)
    if why := bits.compare(device_kernels.silus(g, arch), want, bits.named(g, "gate")):
        return why
    limit = torch.full_like(g, -86.0)
    exact = g.double().clamp(min=-86.0)
    exact = exact / (torch.exp(-exact) + torch.ones_like(exact))
    exponent = torch.frexp(exact)[1].long().clamp(min=-125) - 24
    unit = (exponent + 1023 << 52).view(torch.float64)  # 2**exponent
    far = (want.double() - exact).abs() > ULPS * unit
    far |= (g < limit) & (want != reference.silu(limit))
    far = torch.where(g.isfinite(), far, ~((want == g) | (g == -torch.inf) | (g.isnan() & want.isnan())))
    if not bool(far.any()):
        return None
    place = int(far.nonzero()[0])
    why = f"the reference gives {want[place].item()!r}, expected {exact[place].item()!r} within {ULPS} ulp"
    return f"{bits.named(g, 'gate')((place,))}: {why}"
