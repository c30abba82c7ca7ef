"""Launch of a Triton kernel past the look-up that Triton makes at each call."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

COMPILE_OPTIONS = {"enable_fp_fusion": False}
"""ptxas must not contract the epilogue's product and sum into one rounding."""


def interpreted() -> bool:
    """True if Triton runs kernels on the CPU in this process (TRITON_INTERPRET=1 at its import)."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe(x_ptr):
    tl.store(x_ptr, 0)


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which Triton launches on x's device; does nothing for a CPU tensor or the present device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def aligned_dtypes(tensors: Iterable[torch.Tensor], integers: Iterable[int]) -> tuple[torch.dtype, ...] | None:
    """What Triton specializes a kernel on, if every address and integer is a multiple of 16; or None."""
    loose = 0
    dtypes = []
    for tensor in tensors:
        loose |= tensor.data_ptr()
        dtypes.append(tensor.dtype)
    for integer in integers:
        loose |= integer
    return None if loose % 16 else tuple(dtypes)


def launch_cached(
    function: Any,
    grid: tuple[int, int],
    args: tuple[Any, ...],
    constants: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    key: Hashable | None,
) -> None:
    """Launch `function` on `grid` programs of the present device; args and constants in the order of its parameters.

    key stands for the constants and for all that Triton specializes on (`aligned_dtypes`): the compiled kernel is kept
    by it and launched past Triton's own look-up, which binds and hashes every argument anew, for longer than a small
    GEMM takes on the card. None: let Triton look.
    """
    if interpreted():
        key = None
    device = -1 if key is None else torch.cuda.current_device()
    kernel = _COMPILED.get((function.fn, device, key, options))
    if kernel is None:
        finalize_cache_keys(function)
        kernel = function[grid](*args, **dict(constants), **COMPILE_OPTIONS, **dict(options))
        if key is not None:
            _COMPILED[function.fn, device, key, options] = kernel
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    metadata = kernel.packed_metadata
    values = [value for _, value in constants]
    # what Triton's own launch ends in; no hooks and no metadata for them
    kernel.run(*grid, 1, stream, kernel.function, metadata, None, None, None, *args, *values)


def finalize_cache_keys(function: Any) -> None:
    """Have Triton compute the key of `function`, by which its cache holds it, after the keys of all that it calls.

    Such a key covers the constants of those callees alone whose own keys are computed by then. Processes that use
    kernels in another order would look for them under other keys, and compile again what is there. Nothing in
    Triton's interpreter.
    """
    if interpreted() or function.fn in _SETTLED:
        return
    _SETTLED.add(function.fn)
    code, space = function.fn.__code__, function.fn.__globals__
    used = [space[name] for name in code.co_names if name in space]
    modules = [value for value in used if isinstance(value, ModuleType)]
    used += [getattr(module, name) for module in modules for name in code.co_names if hasattr(module, name)]
    for value in used:
        if isinstance(value, triton.runtime.jit.JITCallable):
            finalize_cache_keys(value)
    function.cache_key  # noqa: B018  computed at its first use


_SETTLED: set[Any] = set()  # the Python functions: a function of Triton's hashes by its key, and so computes it

_COMPILED: dict[tuple[Any, ...], Any] = {}  # for the process, like Triton's own, which hashes by the key each time

DO_NOT_SPECIALIZE = (
    "M",
    "workers",
    "group_m",
)  # integers that no kernel is compiled for: a new prompt length compiles nothing


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
