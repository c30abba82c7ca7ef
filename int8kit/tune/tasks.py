"""What a worker's process does: say what it is, compile a kernel, judge its card's health, time configurations.

Every function's arguments and result can be pickled; a result says which configurations were out and why, opening with
the class. Whoever calls them is `session`, by way of `workers`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from int8kit.database.schema import GpuState, Resources
from int8kit.errors import CheckFailed, ConfigError
from int8kit.gpus import Gpu, present
from int8kit.spec import GemmShape, TileConfig
from int8kit.timing import interleave
from int8kit.timing.health import check_health
from int8kit.timing.interleave import Times
from int8kit.tune import measure


@dataclass(frozen=True)
class Timed:
    """Configurations of one shape, timed in the same rounds."""

    times: dict[TileConfig, Times]
    wrong: dict[TileConfig, str]  # out, and why
    bf16: Times | None = None  # torch's bf16 product, if it was asked for
    state: GpuState | None = None  # of the card at work, with `bf16`


@dataclass(frozen=True)
class Code:
    """What a card is to run: its own code, or that of an older one."""

    target: int  # compute capability of the card
    arch: str | None = None  # "sm86": an older card's code


def toolchain() -> str:
    """What decides the code that a worker compiles."""
    import triton

    from int8kit import __version__
    from int8kit.kernels import gemm

    hashes = " ".join(gemm.toolchain().kernels.values())
    return f"int8kit {__version__} ({hashes}), Triton {triton.__version__}"


def describe() -> tuple[str, Gpu | None]:
    """The toolchain and the card of this process."""
    return toolchain(), present()


def compile_kernel(arch: int, config: TileConfig, even_k: bool, code: Code | None) -> Resources | str:
    """What the kernel takes on `arch`, or "compile: ..." with the compiler's words.

    code: compile that too, as a launch would, so that the launch finds it in Triton's cache on this machine.
    """
    from int8kit.tune import cross_compile

    try:
        resources = cross_compile.compile_for(arch, config, even_k=even_k)
        if code is not None and code != Code(arch):
            cross_compile.assemble(code.target, config, even_k=even_k, code=code.arch)
    except ConfigError as error:
        return f"compile: {error}"
    return resources


def health(number: int) -> tuple[float, str | None]:
    """bf16 TFLOP/s of this process's card, and why nothing timed on it is worth storing, if so.

    number: of the worker; tells the calls apart.
    """
    card = present()
    assert card is not None
    try:
        return check_health(card), None
    except CheckFailed as error:
        return 0.0, str(error)


def time_configs(
    shape: GemmShape, arch: str | None, configs: tuple[TileConfig, ...], rounds: int, sample_us: int, bf16: bool
) -> Timed:
    """Check each of `configs` bit-exact at `shape`, then time the exact ones in interleaved rounds.

    arch: an older card's code. Ends the process if a configuration has broken its CUDA context: nothing that ran later
    would say anything.
    """
    try:
        bench = _bench(shape, arch)
        wrong = {config: reason for config in configs if (reason := bench.why_not(config))}
        exact = [config for config in configs if config not in wrong]
        times = bench.times(exact, rounds, sample_us, bf16=bf16) if exact or bf16 else []
    except measure.ContextLost:
        os._exit(1)
    last = times.pop() if bf16 else None
    state = None
    if last and exact:
        state = interleave.under_load(partial(bench.call, exact[0]), times[0].p50)
    return Timed(dict(zip(exact, times, strict=True)), wrong, last, GpuState(**state) if state else None)


def launch(shape: GemmShape, arch: str | None, config: TileConfig) -> str | None:
    """Why `config` is out, or None: one configuration alone, to find the one that ends its process."""
    try:
        return _bench(shape, arch).why_not(config)
    except measure.ContextLost:
        os._exit(1)


_held: dict[tuple[GemmShape, str | None], measure.Bench] = {}  # the last shape's operands


def _bench(shape: GemmShape, arch: str | None) -> measure.Bench:
    if (shape, arch) not in _held:
        _held.clear()  # before the next one's are made: the card may not hold both
        card = present()
        assert card is not None
        _held[shape, arch] = measure.Bench(shape, card, arch=arch)
    return _held[shape, arch]
