"""Proofs that read the compiled code of the kernels, for faults that rarely change a result.

    launch of a variant --stopped where Triton compiles--> source, options --compiler, no GPU--> PTX --> checks

A missing barrier, fence or wait loses a race once in many runs, and tests may never see it. In the code it is plain.
The kernels are compiled in child processes: Triton's interpreter, in which a machine without a GPU runs, hides the
compiler.

    launched, variants    the code of every kind of launch
    ptx, values           its instructions, paths, source functions and places in shared memory
    synchronization, memory, arithmetic    the checks
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import int8kit
from int8kit.spec import Kernel, TileConfig
from int8kit.verify import process_pool
from int8kit.verify.executors import Executor
from int8kit.verify.process_pool import Call, Ending, Place
from int8kit.verify.properties.compiled_code import inspection, variants
from int8kit.verify.properties.compiled_code.variants import Variant
from int8kit.verify.properties.proof import Outcome, Proof, Report

MAX_PROCESSES = 4
DEFAULT_ARCH = 86  # where nothing names a GPU
Run = Callable[[Executor, tuple[TileConfig, ...], Report], Outcome]


@contextmanager
def compiling(index: int) -> Iterator[Place]:
    """The place of a child in which Triton compiles, with this process's copy of the package."""
    yield Place(environment={"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "0"})


def inspect(wanted: Sequence[Variant], report: Report) -> Outcome:
    """Compile and check the variants, up to MAX_PROCESSES at a time."""
    processes = max(1, min(len(os.sched_getaffinity(0)), MAX_PROCESSES, len(wanted)))
    shares = [tuple(wanted[first::processes]) for first in range(processes)]
    package = str(Path(int8kit.__file__).parent)
    endings = process_pool.run_all(
        [Call(inspection.inspect, (package, share)) for share in shares],
        processes=processes,
        open_place=compiling,
        on_report=lambda index, text: report(text),
    )
    failures = [failure for ending in endings if (failure := _failure(ending))]
    return Outcome(sum(len(ending.reports) for ending in endings), failures[0] if failures else None)


def _failure(ending: Ending) -> str | None:
    if ending.kind == "done":
        failure: str | None = ending.result
        return failure
    last = ending.reports[-1] if ending.reports else "before the first kernel"
    return f"{last}: the process that compiles ended: {ending.kind} {ending.detail}"


def _run(of: Callable[[int, tuple[TileConfig, ...]], Sequence[Variant]]) -> Run:
    """The `run` of a proof about the variants that `of` gives for an architecture and the configurations."""

    def run(executor: Executor, tiles: tuple[TileConfig, ...], report: Report) -> Outcome:
        return inspect(of(executor.code or executor.asked or DEFAULT_ARCH, tiles), report)

    return run


PROOFS: tuple[Proof, ...] = (
    Proof(
        "gemm code",
        "the compiled GEMM kernels wait, fence, count and round where they must, in every variant",
        "compiled code",
        _run(lambda arch, tiles: variants.gemms(arch)),
        mutants_of=tuple(Kernel),
    ),
    Proof(
        "row code",
        "the compiled row kernels round each operation by itself, and have the operations of their source",
        "compiled code",
        _run(lambda arch, tiles: variants.rows(arch)),
        mutants_of=(Kernel.TRITON,),
    ),
    Proof(
        "database code",
        "the GEMM kernels of all given configurations do so too, with bias and bf16 output",
        "compiled code",
        _run(variants.served),
        level="exhaustive",
    ),
)
"""The rows of this module in `registry.PROOFS`."""
