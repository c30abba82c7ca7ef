"""Functions that a worker process executes: describe itself, compile, check its GPU, time configurations.

`session` calls them by way of `workers`. All arguments and results can be pickled. A result says which configurations
were rejected and why; each reason begins with its class.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from int8kit.database.schema import GpuState, Resources
from int8kit.errors import CheckFailed, ConfigError, FileError
from int8kit.gpus import Gpu, present
from int8kit.spec import GemmShape, TileConfig
from int8kit.timing import interleave
from int8kit.timing.health import check_health
from int8kit.tune import measure
from int8kit.tune.search import RoundTimes
from int8kit.tune.space import KernelVariant


@dataclass(frozen=True)
class LaunchCode:
    """Code for launches: the architecture of the GPU that runs it, and the architecture of the code."""

    runs_on: int  # 90 for a GPU of sm_90
    code_arch: str | None = None  # "sm86" for code of that older architecture; None: the GPU's own code


def versions() -> str:
    """Everything that decides the code which a worker compiles, as one text."""
    import triton

    from int8kit import __version__
    from int8kit.kernels import gemm

    hashes = " ".join(gemm.toolchain().kernel_hashes.values())
    return f"int8kit {__version__} ({hashes}), Triton {triton.__version__}"


def describe() -> tuple[str, Gpu | None]:
    """The versions and the GPU of this process."""
    return versions(), present()


def compile_kernel(arch: int, kernel: KernelVariant, launch_code: LaunchCode | None) -> Resources | str:
    """Resources of `kernel` on `arch`, or "compile: ..." with the compiler's message.

    launch_code: compile this too, so that a launch on this machine finds it in Triton's cache. Raises FileError if a
    file cannot be written: no verdict on a kernel.
    """
    from int8kit.tune import cross_compile

    try:
        resources = cross_compile.compile_for(arch, kernel)
        if launch_code is not None and launch_code != LaunchCode(arch):
            cross_compile.assemble(launch_code.runs_on, kernel, code=launch_code.code_arch)
    except ConfigError as error:
        return f"compile: {error}"
    except OSError as error:
        where = f"{error.filename!r}, a file of" if error.filename else "a file of"
        failure = FileError(
            f"cannot write {where} the compiler ({error.strerror or error}); free some space, or set TRITON_CACHE_DIR "
            "and TMPDIR to writable folders"
        )
        failure.exit_status = 1
        raise failure from None
    return resources


def health(number: int) -> tuple[float, str | None]:
    """bf16 TFLOP/s of this process's GPU, and the reason why its times are not worth storing, if there is one.

    number: of the worker; it makes the calls distinct.
    """
    gpu = present()
    assert gpu is not None
    try:
        return check_health(gpu), None
    except CheckFailed as error:
        return 0.0, str(error)


def time_configs(
    shape: GemmShape, code_arch: str | None, configs: tuple[TileConfig, ...], samples: int, sustained: bool, bf16: bool
) -> RoundTimes:
    """Check that each of `configs` is bit-exact at `shape`, then time the exact ones in `samples` interleaved samples.

    code_arch: code of an older architecture. sustained: see `measure.ShapeBench.times`. Ends the process if a
    configuration has broken its CUDA context, since every later result would be meaningless.
    """
    try:
        bench = _bench(shape, code_arch)
        rejected = {config: reason for config in configs if (reason := bench.launch_and_check(config))}
        exact = [config for config in configs if config not in rejected]
        times = bench.times(exact, samples, sustained=sustained, bf16=bf16) if exact or bf16 else []
    except measure.ContextLost:
        os._exit(1)
    bf16_times = times.pop() if bf16 else None
    state = None
    if bf16_times and exact:
        state = interleave.under_load(partial(bench.launch, exact[0]), times[0].p50)
    return RoundTimes(dict(zip(exact, times, strict=True)), rejected, bf16_times, GpuState(**state) if state else None)


def try_alone(shape: GemmShape, code_arch: str | None, config: TileConfig) -> str | None:
    """Why `config` is rejected, or None. Launches one configuration only, to find the one that ends its process."""
    try:
        return _bench(shape, code_arch).launch_and_check(config)
    except measure.ContextLost:
        os._exit(1)


_latest: dict[tuple[GemmShape, str | None], measure.ShapeBench] = {}
"""The operands of the last shape: the next call of the same shape uses them again."""


def _bench(shape: GemmShape, code_arch: str | None) -> measure.ShapeBench:
    if (shape, code_arch) not in _latest:
        _latest.clear()  # before new operands are made: the GPU may not hold both
        gpu = present()
        assert gpu is not None
        _latest[shape, code_arch] = measure.ShapeBench(shape, gpu, code_arch=code_arch)
    return _latest[shape, code_arch]
