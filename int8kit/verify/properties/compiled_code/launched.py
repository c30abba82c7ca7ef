"""The code that a launch compiles, for any GPU and without one: the launch is stopped where Triton would compile.

    code(90, lambda: gemm.scaled_mm(x, w, sx, sw, bias, config=config))  ->  Code("_gemm_wgmma", ptx, early_start=True)

The public entry points are called with CPU tensors, and a stand-in for Triton's driver names the GPU. So the signature,
the constants and the options are the launcher's own. A second list of these for the cross-compiler was rejected: it
could differ from the launcher, and a fault in the launcher's options would not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    name: str  # of the kernel function
    ptx: str
    early_start: bool  # it may start before the kernel ahead of it has ended
    contraction: bool  # the compiler may join a product and a sum in one rounding
    arch: int  # of the target, 90 for sm_90
    parameters: Mapping[str, str]  # the first parameter in `ptx` of each argument
    constants: Mapping[str, Any]


class _Stopped(BaseException):
    """The end of a launch, with the arguments of Triton's compiler. No handler of the launchers catches it."""


@dataclass(frozen=True)
class _Driver:
    """A stand-in for Triton's driver of an absent GPU."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # type: ignore[no-any-return]  # Triton keeps one target for each index

    def get_current_stream(self, device: int) -> int:
        return 0


def code(arch: int, launch: Callable[[], Any]) -> Code:
    """The code for `arch` (86 for sm_86) of the first kernel that `launch` launches, from CPU tensors."""
    with _absent_gpu(arch):
        try:
            launch()
        except _Stopped as stopped:
            source, target, options = stopped.args
        else:
            raise AssertionError("expected a launch to compile a kernel")
    compiled = triton.compile(source, target=target, options=options)
    name, metadata = source.fn.fn.__name__, compiled.metadata
    return Code(
        name=name,
        ptx=compiled.asm["ptx"],
        early_start=bool(getattr(metadata, "launch_pdl", False)),
        contraction=bool(metadata.enable_fp_fusion),
        arch=arch,
        parameters=_parameters(name, source.signature),
        constants={source.fn.arg_names[path[0]]: value for path, value in source.constants.items()},
    )


def _parameters(name: str, signature: Mapping[str, str]) -> dict[str, str]:
    """The first parameter of each argument: constants have none; a TMA descriptor has one, its extents and strides."""
    found, at = {}, 0
    for argument, kind in signature.items():
        if kind == "constexpr":
            continue
        found[argument] = f"{name}_param_{at}"
        rank = kind[kind.index("[") : kind.index("]")].count(",") + 1 if kind.startswith("tensordesc") else 0
        at += 1 + 2 * rank
    return found


@contextmanager
def _absent_gpu(arch: int) -> Iterator[None]:
    """A context in which launches take the CPU for the GPU, and stop where Triton would compile."""
    target = GPUTarget("cuda", arch, 32)
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)

    def stop(source: Any, target: GPUTarget, options: dict[str, Any]) -> None:
        raise _Stopped(source, target, options)

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(target))
    try:
        with (
            mock.patch.object(triton.compiler, "compile", stop),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(arch, 10)),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        ):
            yield
    finally:
        triton.runtime.driver._active = before
