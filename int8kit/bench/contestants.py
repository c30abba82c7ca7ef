"""Contestants of `bench gemm`: int8kit, and the operations of plain torch for the same linear.

    name          gemm: operands already quantized                   linear: bf16 in, so quantization and GEMM
    int8kit       fused epilogue, configuration of the database      `int8_linear`, as a model calls it
    int8kit-sm86  code of an Ampere GPU, on this GPU                 likewise
    bf16          torch.mm                                           torch.addmm with bias, nothing to quantize
    fp8-row       torch._scaled_mm, scales per row and column        rows quantized by eager torch
    fp8-tensor    torch._scaled_mm, one scale per matrix             -
    int_mm        torch._int_mm: int32 accumulators, no epilogue     -
    int_mm-eager  torch._int_mm, scales and bias by eager torch      rows quantized by eager torch
    inductor      the same through torch.compile, max-autotune       likewise; compiles for minutes, so on request only

A contestant is prepared once for each shape. It gives one launch for each copy of the weight, or the reason why it
cannot take part; an exception counts as the reason too. `tools/bench_peers.py` adds other projects' kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from int8kit import gpus, ops, reference
from int8kit.database import store
from int8kit.database.database import Choice, Database
from int8kit.errors import InputError, UnknownName
from int8kit.gpus import Gpu
from int8kit.kernels import gemm, quantize
from int8kit.spec import Source
from int8kit.timing.captured import Launch, PreparedContestant
from int8kit.timing.operands import Result, TimingOperands
from int8kit.toolchain import require_supported, runnable_archs

Kind = Literal["gemm", "linear"]
FP8_MAX = 448.0


@dataclass(frozen=True)
class Contestant:
    """A way to compute the linear, known by its name and kind."""

    name: str
    kind: Kind
    what: str  # description in one line
    prepare: Callable[[TimingOperands], PreparedContestant | str]  # a string is the reason why it cannot take part
    arithmetic: Literal["int8", "fp8", "bf16"] = "int8"  # only int8 results can equal the reference
    result: Result = "output"
    ours: bool = False  # its result must equal the reference
    entries: int | None = None  # of the database that serves int8kit


def only(contestants: Sequence[Contestant], names: Iterable[str]) -> list[Contestant]:
    """The contestants of `names`, and int8kit, which every ratio compares with; all without names.

    Raises UnknownName.
    """
    wanted = set(names)
    known = {c.name for c in contestants}
    for name in sorted(wanted - known):
        raise UnknownName("contestant", name, known)
    return [c for c in contestants if not wanted or c.ours or c.name in wanted]


def ours(
    present: Gpu, *, gpu: str | None = None, path: Path | None = None, arch: str | None = None
) -> list[Contestant]:
    """int8kit with the own code of the `present` GPU, and with another architecture's code if requested.

    gpu: alias of the GPU whose database serves. path: a database file. arch: "sm86" for the code of that architecture
    beside the own one. The database of an older GPU implies that GPU's code, as in `tune`. Raises InputError for code
    that `present` cannot run.
    """
    require_supported()
    given = None if path is None else store.load(path, gpu)
    target = given.gpu if given else gpus.get(gpu) if gpu else present
    own_arch = f"sm{present.arch}"
    if arch is None and target.arch != present.arch:
        arch = f"sm{target.arch}"
    runnable = [f"sm{code}" for code in runnable_archs(present.arch)]
    if arch not in (None, own_arch, *runnable):
        raise InputError(f"code of {arch!r} does not run on {present.name}: expected one of {', '.join(runnable)}")

    def database(of: Gpu) -> Database:
        if given and given.gpu.arch == of.arch:
            return given
        return store.merged_view(of, gemm.toolchain())[0]

    contestants = int8kit(database(target if target.arch == present.arch else present))
    if arch not in (None, own_arch):
        of_arch = [database(g) for g in gpus.GPUS.values() if f"sm{g.arch}" == arch]
        contestants += int8kit(database(target) if f"sm{target.arch}" == arch else max(of_arch, key=_timed), arch)
    return contestants


def _timed(database: Database) -> int:
    """Number of its entries that were timed and not only modelled."""
    return sum(entry.source is not Source.MODELLED for entry in database.entries)


def standard(inductor: bool = False) -> list[Contestant]:
    """Contestants of plain torch. inductor: add those through torch.compile."""
    found = [
        Contestant("bf16", "gemm", "torch.mm in bf16, no bias", _bf16, "bf16"),
        Contestant("fp8-row", "gemm", "torch._scaled_mm, scales per row and column", _fp8_row, "fp8"),
        Contestant("fp8-tensor", "gemm", "torch._scaled_mm, one scale per matrix", _fp8_tensor, "fp8"),
        Contestant("int_mm", "gemm", "torch._int_mm: int32 accumulators, no epilogue", _int_mm, result="sums"),
        Contestant("int_mm-eager", "gemm", "torch._int_mm, then eager scales and bias", _int_mm_eager),
        Contestant("bf16", "linear", "torch.addmm in bf16", _bf16_linear, "bf16"),
        Contestant("fp8-row", "linear", "eager row quantization, then torch._scaled_mm", _fp8_linear, "fp8"),
        Contestant("int_mm-eager", "linear", "eager quantization, torch._int_mm, eager scales", _int_mm_linear),
    ]
    if inductor:
        found += [
            Contestant("inductor", "gemm", "torch.compile(max-autotune) of int_mm-eager", _inductor),
            Contestant("inductor", "linear", "torch.compile(max-autotune) of int_mm-eager", _inductor_linear),
        ]
    return found


def int8kit(database: Database, arch: str | None = None) -> list[Contestant]:
    """int8kit with the configurations of `database`; arch: code of that architecture instead of the present GPU's."""
    name = f"int8kit-{arch}" if arch else "int8kit"
    code = f"{arch} code" if arch else "this GPU's code"
    entries = len(database.entries)

    def choice(o: TimingOperands) -> Choice:
        return database.resolve(o.shape, gemm.toolchain())

    def product(o: TimingOperands) -> PreparedContestant:
        chosen, out = choice(o), o.output()
        return PreparedContestant(
            [
                partial(gemm.scaled_mm, o.xq, w, o.sx, o.sw, o.bias, config=chosen.config, out=out, arch=arch)
                for w in o.weights
            ],
            f"{chosen.config}, {chosen.level}",
        )

    def linear(o: TimingOperands) -> PreparedContestant:
        chosen, shape = choice(o), o.shape
        if arch is None:
            plan = database.plan(shape.n, shape.k, gemm.toolchain())
            launches: list[Launch] = [partial(ops.int8_linear, o.x, w, o.sw, o.bias, plan=plan) for w in o.weights]
        else:
            out = o.output()
            launches = [partial(_cross_arch_linear, o, w, chosen.config, out, arch) for w in o.weights]
        return PreparedContestant(launches, f"{chosen.config}, {chosen.level}")

    return [
        Contestant(name, "gemm", f"fused epilogue, {code}", product, ours=True, entries=entries),
        Contestant(name, "linear", f"quantization and GEMM, {code}", linear, ours=True, entries=entries),
    ]


def _cross_arch_linear(o: TimingOperands, w: torch.Tensor, config: Any, out: torch.Tensor, arch: str) -> torch.Tensor:
    xq, sx = quantize.quantize(o.x)
    return gemm.scaled_mm(xq, w, sx, o.sw, o.bias, config=config, out=out, arch=arch)


def _bf16(o: TimingOperands) -> PreparedContestant:
    out = o.output()
    return PreparedContestant([partial(torch.mm, o.x, w.t(), out=out) for w in o.weights16])


def _bf16_linear(o: TimingOperands) -> PreparedContestant:
    out = o.output()
    return PreparedContestant([partial(torch.addmm, o.bias, o.x, w.t(), out=out) for w in o.weights16])


def to_fp8(x: torch.Tensor, *, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> e4m3 [M, K] and the fp32 scale, [M, 1] or a scalar."""
    top = x.abs().amax(1, keepdim=True) if rows else x.abs().amax()
    scale = top.float() / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def _scaled_mm(
    x: torch.Tensor, sx: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return torch._scaled_mm(x, w.t(), scale_a=sx, scale_b=sw, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def _fp8_row(o: TimingOperands) -> PreparedContestant:
    (x, sx), (w, sw) = to_fp8(o.x, rows=True), to_fp8(o.w, rows=True)
    return PreparedContestant([partial(_scaled_mm, x, sx, w, sw.t(), o.bias) for w in o.copied(w)])


def _fp8_tensor(o: TimingOperands) -> PreparedContestant:
    (x, sx), (w, sw) = to_fp8(o.x, rows=False), to_fp8(o.w, rows=False)
    return PreparedContestant([partial(_scaled_mm, x, sx, w, sw, o.bias) for w in o.copied(w)])


def _fp8_linear(o: TimingOperands) -> PreparedContestant:
    w, sw = to_fp8(o.w, rows=True)

    def launch(w: torch.Tensor) -> torch.Tensor:
        return _scaled_mm(*to_fp8(o.x, rows=True), w, sw.t(), o.bias)

    return PreparedContestant([partial(launch, w) for w in o.copied(w)])


def _int_mm(o: TimingOperands) -> PreparedContestant:
    out = o.output(torch.int32)
    return PreparedContestant([partial(torch._int_mm, o.xq, w.t(), out=out) for w in o.weights])


def _product(xq: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return reference.dequantize(torch._int_mm(xq, w.t()), sx, sw, bias, torch.bfloat16)


def _linear(x: torch.Tensor, w: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    sx = x.abs().amax(1).float() / 127
    xq = (x / sx[:, None]).round().clamp(-127, 127).to(torch.int8)
    return _product(xq, w, sx, sw, bias)


def _int_mm_eager(o: TimingOperands) -> PreparedContestant:
    return PreparedContestant([partial(_product, o.xq, w, o.sx, o.sw, o.bias) for w in o.weights])


def _int_mm_linear(o: TimingOperands) -> PreparedContestant:
    return PreparedContestant([partial(_linear, o.x, w, o.sw, o.bias) for w in o.weights])


def compiled(function: Callable[..., torch.Tensor], *first: torch.Tensor) -> Callable[..., torch.Tensor]:
    """`function` through Inductor's max-autotune, compiled for arguments like `first`."""
    import torch._dynamo.config
    import torch._inductor.config

    quick = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
    fuse = torch._inductor.config.patch(force_fuse_int_mm_with_mul=True)
    every_shape = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
    with fuse, every_shape:  # each shape compiles the function again; past its usual limit torch would refuse
        quick(*first)
    return quick


def _inductor(o: TimingOperands) -> PreparedContestant:
    call = compiled(_product, o.xq, o.weights[0], o.sx, o.sw, o.bias)
    return PreparedContestant([partial(call, o.xq, w, o.sx, o.sw, o.bias) for w in o.weights])


def _inductor_linear(o: TimingOperands) -> PreparedContestant:
    call = compiled(_linear, o.x, o.weights[0], o.sw, o.bias)
    return PreparedContestant([partial(call, o.x, w, o.sw, o.bias) for w in o.weights])
