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
PER_PROCESS = 5  # variants, which take as long as the start of a process
DEFAULT_ARCH = 86  # where nothing names a GPU
Run = Callable[[Executor, tuple[TileConfig, ...], Report], Outcome]


@contextmanager
def compiling(index: int) -> Iterator[Place]:
    """The place of a child in which Triton compiles, with this process's copy of the package."""
    yield Place(environment={"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "0"})


def inspect(wanted: Sequence[Variant], report: Report) -> Outcome:
    """Compile and check the variants, up to MAX_PROCESSES at a time."""
    cores = min(process_pool.cores(), MAX_PROCESSES)
    processes = max(1, min(cores, len(wanted) // PER_PROCESS))
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


def _run(of: Callable[[int], Sequence[Variant]]) -> Run:
    """The `run` of a proof about the variants that `of` gives for an architecture."""

    def run(executor: Executor, tiles: tuple[TileConfig, ...], report: Report) -> Outcome:
        return inspect(of(executor.code or executor.asked or DEFAULT_ARCH), report)

    return run


def _of_kernel(kernel: Kernel) -> Proof:
    return Proof(
        f"{kernel} code",
        f"the compiled {kernel} kernel waits, fences, counts and rounds where it must, in every variant",
        "compiled code",
        _run(lambda arch: [one for one in variants.gemms(arch) if one.config.kernel is kernel]),
        mutants_of=(kernel,),
    )


PROOFS: tuple[Proof, ...] = (
    *map(_of_kernel, Kernel),
    Proof(
        "row code",
        "the compiled row kernels round each operation by itself, and have the operations of their source",
        "compiled code",
        _run(variants.rows),
        mutants_of=(Kernel.TRITON,),
    ),
    Proof(
        "database code",
        "the GEMM kernels of every shipped configuration do so too, with bias and bf16 output",
        "compiled code",
        _run(variants.served),
        level="exhaustive",
    ),
)
"""The rows of this module in `registry.PROOFS`."""
