"""The property `launch cache`: a launch never runs the compiled kernel of another launch.

    first launch of A       compiles, and keeps the kernel under A's key
    first launch of B       B differs from A in one thing: it must not take A's kernel unless that serves B too

`launch_cached` looks a kernel up by a key of its own, and skips Triton's look-up. A key that lacks one property gives a
wrong result, or writes outside, in the second launch of a process. So each pair starts from an empty cache, in both
orders. CHANGES has the pairs: one or more for each field of `Operands` and of `TileConfig`. The interpreter keeps no
kernel. There `launch_keys` says which kernel each launch of the Triton kernel would run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import torch

from int8kit.kernels import gemm as kernels_gemm
from int8kit.kernels import launch
from int8kit.spec import DOMAINS, GemmShape, Kernel, Schedule, TileConfig, why_illegal
from int8kit.verify.compare import bitwise_diff, expected
from int8kit.verify.examples.guarded_buffers import GuardedOutput, in_poison, vector_in_poison
from int8kit.verify.examples.strategies import Draw, Variant, int8_matrix, scales
from int8kit.verify.implementations import Implementation
from int8kit.verify.properties.launch_keys import observed_launches
from int8kit.verify.properties.launch_store import stored_kernels

ROOM = 64  # elements before the first one and between rows, where nothing else is asked for
_TRITON, _GLUON = (Kernel.TRITON,), (Kernel.MMA_SYNC, Kernel.WGMMA)


@dataclass(frozen=True)
class Launch:
    """One launch: extents, the steps of addresses and strides past multiples of 16 elements, and the epilogue."""

    m: int = 70
    n: int = 96
    k: int = 256  # a multiple of every block_k
    x_offset: int = 0
    w_offset: int = 0
    out_offset: int = 0
    sx_offset: int = 0
    sw_offset: int = 0
    bias_offset: int = 0
    x_stride: int = 0
    w_stride: int = 0
    out_stride: int = 0
    bias: torch.dtype | None = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    variant: Variant = "output"


@dataclass(frozen=True)
class Change:
    """One way in which a launch differs from `Launch()`: in this `field` of Operands, of these kernels."""

    field: str
    values: tuple[tuple[str, Any], ...]
    kernels: tuple[Kernel, ...] = tuple(Kernel)  # which serve it; for the others the Triton kernel serves instead

    def of(self) -> Launch:
        """The changed launch."""
        return replace(Launch(), **dict(self.values))


def _change(field: str, kernels: tuple[Kernel, ...] = tuple(Kernel), **values: Any) -> Change:
    return Change(field, tuple(values.items()), kernels)


_NOT_WGMMA = (Kernel.TRITON, Kernel.MMA_SYNC)
CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "M": _change("xq", m=71),
        "one row": _change("xq", m=1),
        "K with a partial step": _change("xq", k=272),
        "K that is no multiple of 16": _change("xq", _TRITON, k=264),
        "odd K": _change("xq", _TRITON, k=255),
        "address of x": _change("xq", _TRITON, x_offset=1),
        "stride of x": _change("xq", _TRITON, x_stride=1),
        "another aligned stride of x": _change("xq", x_stride=16),
        "N that is no multiple of 16": _change("wq", n=88),
        "odd N": _change("wq", _NOT_WGMMA, n=91),
        "one column": _change("wq", _NOT_WGMMA, n=1),
        "address of w": _change("wq", _TRITON, w_offset=1),
        "stride of w": _change("wq", _TRITON, w_stride=1),
        "another aligned stride of w": _change("wq", w_stride=16),
        "address of sx": _change("sx", sx_offset=1),
        "int32": _change("sx", variant="int32"),
        "address of sw": _change("sw", sw_offset=1),
        "no bias": _change("bias", bias=None),
        "address of the bias": _change("bias", bias_offset=1),
        "bias in float16": _change("bias", bias=torch.float16),
        "bias in float32": _change("bias", bias=torch.float32),
        "address of out": _change("out", _NOT_WGMMA, out_offset=1),
        "stride of out": _change("out", _NOT_WGMMA, out_stride=1),
        "another aligned stride of out": _change("out", out_stride=16),
        "out in float16": _change("out", out_dtype=torch.float16),
        "out in float32": _change("out", out_dtype=torch.float32),
        "SwiGLU": _change("swiglu", variant="swiglu"),
    }
)
"""The changes of one operand by their names. Each field of `Operands` has one or more: a test checks it."""


@dataclass(frozen=True)
class Pair:
    """One example: two launches that differ in one thing, `change` of CHANGES or the configuration."""

    first: TileConfig
    second: TileConfig
    change: str = ""  # of the second launch; "": the configurations differ
    reverse: bool = False  # the second launch comes first

    def __str__(self) -> str:
        what = self.change or f"against {self.second}"
        return f"{self.first}, {what}{', in reverse' if self.reverse else ''}"


def pairs(tiles: Iterable[TileConfig]) -> Iterator[Pair]:
    """Every pair of launches of each kernel in `tiles`, in both orders."""
    present = {config.kernel for config in tiles}
    for kernel in Kernel:
        if kernel not in present:
            continue
        base = next(_legal(kernel))
        found = [Pair(base, base, name) for name in CHANGES]
        for field in fields(TileConfig):
            found += [Pair(*two) for two in config_pairs(kernel, field.name, present)]
        for pair in found:
            yield pair
            yield replace(pair, reverse=True)


def config_pairs(kernel: Kernel, field: str, present: Iterable[Kernel]) -> Iterator[tuple[TileConfig, TileConfig]]:
    """Two legal configurations of `kernel` that differ in `field` alone; for the field kernel, one pair per other."""
    if field == "kernel":
        for named in Kernel:
            if named in present and named is not kernel:
                one = next(c for c in _legal(kernel) if _why_illegal(replace(c, kernel=named, schedule=None)) is None)
                yield one, replace(one, kernel=named, schedule=None)
        return
    if field == "schedule" and kernel is not Kernel.WGMMA:
        return
    if field == "stream_k" and len(DOMAINS[kernel].stream_k) == 1:
        return
    for one in _legal(kernel):
        for value in _values(kernel, field):
            other = replace(one, **{field: value})
            if value != getattr(one, field) and _why_illegal(other) is None:
                yield one, other
                return


def _values(kernel: Kernel, field: str) -> tuple[Any, ...]:
    given: dict[str, tuple[Any, ...]] = {"group_m": (1, 8), "schedule": tuple(Schedule)}
    return given.get(field) or getattr(DOMAINS[kernel], field)


def _legal(kernel: Kernel) -> Iterator[TileConfig]:
    d = DOMAINS[kernel]
    for m, n, k, warps, stages, stream_k in product(
        d.block_m, d.block_n, d.block_k, d.num_warps, d.num_stages, d.stream_k
    ):
        for schedule in Schedule if kernel is Kernel.WGMMA else (None,):
            config = TileConfig(m, n, k, warps, stages, 8, kernel, stream_k, schedule)
            if _why_illegal(config) is None:
                yield config


def _why_illegal(config: TileConfig) -> str | None:
    """Why no GPU of the kernel's architectures runs `config`: sm_90, or the one with the least shared memory."""
    arch, memory = (90, 232448) if config.kernel is Kernel.WGMMA else (86, 101376)
    return why_illegal(config, arch=arch, shared_memory=memory)


def check(pair: Pair, gemm: Implementation) -> str | None:
    """How one of two launches differs from the reference, or runs the other one's kernel; or None."""
    return keys(pair, gemm) if gemm.device == "cpu" else executed(pair, gemm)


def _launches(pair: Pair) -> list[tuple[str, Launch, TileConfig]]:
    """Both launches of a pair, in its order."""
    changed = CHANGES[pair.change].of() if pair.change else Launch()
    both = [("the first", Launch(), pair.first), ("the second", changed, pair.second)]
    return both[::-1] if pair.reverse else both


def executed(pair: Pair, gemm: Implementation) -> str | None:
    """How one of two launches differs from the reference, or None."""
    base = Launch()
    served = not pair.change or pair.second.kernel in CHANGES[pair.change].kernels
    with empty_cache(), nullcontext() if served else _fallback():
        for name, one, config in _launches(pair):
            with stored_kernels() as launched:
                if why := _launch(one, config, gemm):
                    return f"{name}: {why}"
            if why := launched.differs(aligned=one == base, again=False):
                return f"{name}: {why}"
        with stored_kernels() as launched:
            why = _launch(base, pair.first, gemm)
        if why := why or launched.differs(aligned=True, again=True):
            return f"the first again: {why}"
    return None


def keys(pair: Pair, gemm: Implementation) -> str | None:
    """How a launch would run the kernel of another one, or would not find its own again; or None.

    Nothing is executed. The launchers of the Gluon kernels ask the GPU for its properties, so only pairs of the Triton
    kernel are tried.
    """
    if {pair.first.kernel, pair.second.kernel} != {Kernel.TRITON}:
        return None
    with observed_launches() as seen:
        for name, one, config in (*_launches(pair), ("the first again", Launch(), pair.first)):
            before = seen.launches
            _launch(one, config, gemm)  # nothing is executed, so its result says nothing
            if seen.launches != before + 1:
                return f"{name}: {seen.launches - before} launches, expected 1"
            if seen.problems:
                return f"{name}: {seen.problems[0]}"
            compiled = seen.compiled
            _launch(one, config, gemm)
            if one == Launch() and seen.compiled > compiled:
                return f"{name}: the stored kernel is not found, so the launch waits for Triton's look-up"
    return None


@contextmanager
def empty_cache() -> Iterator[None]:
    """A context in which no kernel is kept at first. The kept kernels come back behind it."""
    kept = dict(launch._COMPILED)
    launch._COMPILED.clear()
    try:
        yield
    finally:
        launch._COMPILED.clear()
        launch._COMPILED.update(kept)


@contextmanager
def _fallback() -> Iterator[None]:
    """A context in which the Triton kernel may serve instead of the named one. Later fallbacks are noticed again."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", kernels_gemm.Fallback)
            yield
    finally:
        kernels_gemm._notice.cache_clear()


def _launch(one: Launch, config: TileConfig, gemm: Implementation) -> str | None:
    """How the result of a launch differs from the reference, or None."""
    assert gemm.output is not None
    assert gemm.accumulators is not None
    assert gemm.swiglu is not None
    d = Draw(GemmShape(one.m, one.n, one.k), config, "uniform", 1, one.bias, one.out_dtype, variant=one.variant)
    on = gemm.device
    x = _matrix(int8_matrix(one.m, one.k, "uniform", 1, on), one.x_stride, one.x_offset)
    w = _matrix(int8_matrix(one.n, one.k, "uniform", 2, on), one.w_stride, one.w_offset)
    sx = vector_in_poison(scales(one.m, "signed", 1, on), ROOM + one.sx_offset)
    sw = vector_in_poison(scales(one.n, "signed", 2, on), ROOM + one.sw_offset)
    bias = None
    if one.bias is not None:
        g = torch.Generator(on).manual_seed(1)
        bias = vector_in_poison(torch.randn(one.n, generator=g, device=on).to(one.bias), ROOM + one.bias_offset)
    want = expected(d, x, w, sx, sw, bias)
    columns = want.shape[1]
    out = GuardedOutput(
        one.m, columns, _room(columns) + one.out_stride, 2 * config.block_m, want.dtype, on, ROOM + one.out_offset
    )
    if one.variant == "int32":
        gemm.accumulators(d, x, w, out=out.view)
    else:
        (gemm.swiglu if one.variant == "swiglu" else gemm.output)(d, x, w, sx, sw, bias, out=out.view)
    return bitwise_diff(out.view, want) or out.written_outside()


def _room(width: int) -> int:
    """The number of elements that make a row a multiple of 16, ROOM or more."""
    return ROOM + -width % 16


def _matrix(matrix: torch.Tensor, stride: int, offset: int) -> torch.Tensor:
    return in_poison(matrix, _room(matrix.shape[1]) + stride, 256, ROOM + offset)
