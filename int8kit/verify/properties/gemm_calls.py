"""The properties `refusals` and `fallback`: the calls of the GEMM that no kernel, or another kernel, must serve.

    refusals   each operand wrong in each way     ShapeError, whatever the configuration
    fallback   operands that the named kernel     the Triton kernel serves them, and a warning says so
               cannot serve

A check that is missing reads or writes outside a tensor, so a result shows nothing. The interpreter runs no Gluon, so
there every configuration of a Gluon kernel falls back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from int8kit import operand_checks, reference
from int8kit.errors import ShapeError
from int8kit.kernels import gemm
from int8kit.spec import GemmShape, Kernel, TileConfig
from int8kit.verify.compare import another_default_dtype, bitwise_diff
from int8kit.verify.examples.limits import K_MAX
from int8kit.verify.examples.strategies import int8_matrix, scales
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation

CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "accumulate": gemm.accumulate, "scaled_mm": gemm.scaled_mm, "scaled_mm_swiglu": gemm.scaled_mm_swiglu,
}  # fmt: skip
LAYER = "int8_weight"
"""The call that checks the tensors of a layer. It has no x, so its weight may have any K."""
M, N, K = 5, 16, 32
STRIDE_MAX = 2**23  # bytes between rows from which the mma.sync kernel does not serve
_CONFIG = TileConfig(16, 16, 32, num_warps=1, num_stages=2)
FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda t: t.to(torch.int16),
    "longer": lambda t: torch.cat((t, t[..., :1]), -1),
    "shorter": lambda t: t[..., :-1],
    "more rows": lambda t: torch.cat((t, t[:1])),
    "axes": lambda t: t[None],
    "axes behind": lambda t: t[..., None],
    "stride": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "device": lambda t: t.to("meta"),
}


@dataclass(frozen=True)
class RefusedCall:
    """A call of CALLS or LAYER whose `operand` has a fault of FAULTS; without operand "odd N" or "largest K"."""

    call: str
    operand: str
    fault: str

    def __str__(self) -> str:
        return f"{self.call} with {self.fault} of {self.operand}" if self.operand else f"{self.call} with {self.fault}"


@dataclass(frozen=True)
class FallbackCall:
    """A GEMM whose configuration names a Gluon kernel that cannot serve it."""

    config: TileConfig
    shape: GemmShape
    call: str
    compiles: bool = True  # False: the operands suit the kernel, and the compiler fails
    far: str = ""  # the operand whose rows are STRIDE_MAX bytes apart

    def __str__(self) -> str:
        more = "" if self.compiles else ", which does not compile"
        more += f", rows of {self.far} {STRIDE_MAX} bytes apart" if self.far else ""
        return f"{self.call}, {self.shape}, {self.config}{more}"


def refused() -> Iterator[RefusedCall]:
    """Every operand of every call in every way; a vector has no rows, and a longer x has another K than w."""
    for call in CALLS:
        for operand in ("xq", "wq", "out") if call == "accumulate" else ("xq", "wq", "sx", "sw", "bias", "out"):
            for fault in FAULTS:
                rows = operand in ("xq", "wq", "out")
                if fault != "more rows" or rows:
                    yield RefusedCall(call, operand, fault)
        yield RefusedCall(call, "", "largest K")
    yield RefusedCall("scaled_mm_swiglu", "", "odd N")
    for operand in ("wq", "sw", "bias"):
        for fault in FAULTS:
            if fault not in (("longer", "shorter") if operand == "wq" else ("more rows",)):
                yield RefusedCall(LAYER, operand, fault)
    yield RefusedCall(LAYER, "", "largest K")


def fallbacks(device: str) -> Iterator[FallbackCall]:
    """Operands that are not aligned, for each Gluon kernel; in the interpreter also operands that are."""
    configs = (
        TileConfig(16, 64, 64, 4, 3, kernel=Kernel.MMA_SYNC),
        TileConfig(64, 64, 128, 8, 3, kernel=Kernel.WGMMA),
        TileConfig(256, 64, 128, 8, 3, kernel=Kernel.WGMMA, stream_k=1),
    )
    shapes = (GemmShape(70, 24, 40), *((GemmShape(3, 64, 128), GemmShape(200, 32, 48)) if device == "cpu" else ()))
    for config in configs:
        for shape in shapes:
            for call in CALLS:
                yield FallbackCall(config, shape, call)
        yield FallbackCall(config, GemmShape(70, 64, 128), "scaled_mm", compiles=False)
    for far in ("xq", "wq"):
        yield FallbackCall(configs[0], GemmShape(3, 6, 128), "scaled_mm", far=far)


def check_refused(c: RefusedCall, on: Executor | Implementation) -> str | None:
    """None if the call raises ShapeError; else the other outcome."""
    n, k = (N - 1 if c.fault == "odd N" else N), (K_MAX + 1 if c.fault == "largest K" else K)
    given = _operands(c.call, GemmShape(M, n, min(k, K_MAX)), on.device)
    if c.fault == "largest K":
        given |= {
            name: torch.zeros(rows, k, dtype=torch.int8, device=on.device) for name, rows in (("xq", M), ("wq", n))
        }
    if c.operand:
        given[c.operand] = FAULTS[c.fault](given[c.operand])
    try:
        if c.call == LAYER:
            operand_checks.int8_weight(given["wq"], given["sw"], given["bias"])
        else:
            CALLS[c.call](**given, config=_CONFIG)
    except ShapeError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}; expected ShapeError"
    return "no error, expected ShapeError"


def check_fallback(c: FallbackCall, on: Executor | Implementation) -> str | None:
    """How the result differs from the reference, or a missing warning; else None."""
    given = _operands(c.call, c.shape, on.device)
    out = given.pop("out")
    if c.far:
        matrix = given[c.far]
        rows = torch.empty(len(matrix) * STRIDE_MAX, dtype=torch.int8, device=on.device)
        given[c.far] = rows.as_strided(matrix.shape, (STRIDE_MAX, 1)).copy_(matrix)
    gemm._notice.cache_clear()
    try:
        with (
            warnings.catch_warnings(record=True) as heard,
            another_default_dtype(),
            nullcontext() if c.compiles else _compiler_fails(c.config.kernel),
        ):
            warnings.simplefilter("always")
            got = CALLS[c.call](**given, out=out, config=c.config)
    finally:
        gemm._notice.cache_clear()
    if not any(issubclass(one.category, gemm.Fallback) for one in heard):
        return f"no warning that another kernel than {c.config.kernel} serves"
    if c.call == "accumulate":
        return bitwise_diff(got, reference.accumulate(**given))
    return bitwise_diff(got, getattr(reference, c.call)(**given, out_dtype=out.dtype))


@contextmanager
def _compiler_fails(kernel: Kernel) -> Iterator[None]:
    """A context in which `kernel` takes all operands, and the compiler fails on it."""
    module, why_not = gemm.module, gemm.why_not

    class Broken:
        @staticmethod
        def launch(*_: Any) -> None:
            raise RuntimeError("PassManager::run failed")

    def of(named: Kernel) -> Any:
        return Broken if named is kernel else module(named)

    with (
        mock.patch.object(gemm, "module", of),
        mock.patch.object(gemm, "why_not", lambda o, named: None if named is kernel else why_not(o, named)),
    ):
        yield


def _operands(call: str, shape: GemmShape, device: str) -> dict[str, Any]:
    """Right operands of a call, by the names of its parameters."""
    m, n, k = shape.m, shape.n, shape.k
    given = {"xq": int8_matrix(m, k, "uniform", 1, device), "wq": int8_matrix(n, k, "uniform", 2, device)}
    if call == "accumulate":
        return {**given, "out": torch.empty(m, n, dtype=torch.int32, device=device)}
    columns = n if call == "scaled_mm" else n // 2
    vectors = {"sx": scales(m, "ordinary", 3, device), "sw": scales(n, "ordinary", 4, device)}
    bias = torch.randn(n, generator=torch.Generator(device).manual_seed(5), device=device)
    return {**given, **vectors, "bias": bias, "out": torch.empty(m, columns, dtype=torch.bfloat16, device=device)}
