"""Proofs that try every input of a finite domain, on the code that is compiled for an architecture.

    scheduler       integer arithmetic: tiles, stream-K, and the launches of the Gluon kernels
    barriers        the waits of the wgmma kernel, in every order of its groups of warps
    quantization    scales and quotients of `quantize`
    epilogues       conversions and silu of the GEMM kernels
    bits            every bit pattern of a number format

    device_python, launches     kernels' functions and launches in Python
    device_kernels              kernels that apply one device function to many values

A proof with 2**32 inputs needs a GPU. Its function takes a smaller domain, with which tests run it on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

from int8kit.spec import Kernel, TileConfig
from int8kit.verify.executors import Executor
from int8kit.verify.properties.exhaustive import barriers, epilogues, quantization, scheduler
from int8kit.verify.properties.proof import Outcome, Proof, Report

Run = Callable[[Executor, tuple[TileConfig, ...], Report], Outcome]
_NO_GPU = "the interpreter would take hours; it needs a GPU"


def _native(executor: Executor) -> str | None:
    return None if executor.arch is None else "the row kernels have one source: the native executor runs it"


def _gpu(executor: Executor) -> str | None:
    return _NO_GPU if executor.on == "interpreter" else None


def _native_gpu(executor: Executor) -> str | None:
    return _gpu(executor) or _native(executor)


def _without_tiles(run: Callable[[Executor, Report], Outcome]) -> Run:
    """A proof that does not depend on the configurations."""
    return lambda executor, tiles, report: run(executor, report)


def _of_kernels(run: Callable[[Executor, tuple[Kernel, ...], Report], Outcome]) -> Run:
    """A proof about the kernels that the configurations name; without one, it tries nothing."""

    def prove(executor: Executor, tiles: tuple[TileConfig, ...], report: Report) -> Outcome:
        kernels = epilogues.kernels_of(executor, tiles)
        return run(executor, kernels, report) if kernels else Outcome(0)

    return prove


PROOFS: tuple[Proof, ...] = (
    Proof(
        "tile scheduler", "every tile of a launch is stored once, with each of its steps", "every input",
        scheduler.prove, mutants_of=tuple(Kernel),
    ),
    Proof(
        "barriers", "no order of the wgmma kernel's groups of warps ends in a deadlock or reads a wrong slot",
        "every input", barriers.prove, mutants_of=(Kernel.WGMMA,),
    ),
    Proof(
        "row scale", "s is right for every bf16 and fp16 amax", "every input", _without_tiles(quantization.row_scale),
        _native, mutants_of=(Kernel.TRITON,),
    ),
    Proof(
        "silu", "silu equals the reference for every bf16 and fp16 gate, and is within 4 ulp of the true value",
        "every input", _without_tiles(epilogues.silu_halves), mutants_of=(Kernel.TRITON,),
    ),
    Proof(
        "bias", "every bf16 and fp16 bias is added exactly", "every input", _of_kernels(epilogues.bias),
        mutants_of=tuple(Kernel),
    ),
    Proof(
        "quantize, every pair", "q is right for every pair of a bf16 or fp16 amax and a number up to it", "every input",
        _without_tiles(quantization.pairs), _native_gpu,
    ),
    Proof(
        "row scale of fp32", "s and q of a row of one element are right for every fp32 number", "every input",
        _without_tiles(quantization.row_scale_fp32), _native_gpu,
    ),
    Proof(
        "epilogue conversion", "each kernel's epilogue converts every fp32 number to each output dtype right",
        "every input", _of_kernels(epilogues.conversion), _gpu,
    ),
    Proof(
        "accumulator conversion", "the epilogue converts every int32 accumulator to fp32 right", "every input",
        _without_tiles(epilogues.accumulator), _gpu,
    ),
    Proof(
        "silu of fp32", "silu equals the reference for every fp32 gate, and is within 4 ulp of the true value",
        "every input", _without_tiles(epilogues.silu_fp32), _gpu,
    ),
    Proof(
        "swiglu epilogue", "each kernel's SwiGLU epilogue equals the reference for every fp32 gate", "every input",
        _of_kernels(epilogues.swiglu), _gpu,
    ),
)  # fmt: skip
"""The rows of this module in `registry.PROOFS`."""
