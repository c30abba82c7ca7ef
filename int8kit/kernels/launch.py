"""Launch of a compiled Triton kernel without the look-up that Triton repeats at each call."""

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

DO_NOT_SPECIALIZE = ("M", "workers", "group_m")
"""Integers that no kernel is compiled for: a new prompt length compiles nothing."""


def interpreted() -> bool:
    """True if Triton runs kernels on the CPU in this process (TRITON_INTERPRET=1 at its import)."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe(x_ptr):
    tl.store(x_ptr, 0)


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which Triton launches on x's device. It does nothing for a CPU tensor or the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def aligned_dtypes(tensors: Iterable[torch.Tensor], integers: Iterable[int]) -> tuple[torch.dtype, ...] | None:
    """The dtypes, on which Triton specializes a kernel, if every address and integer is a multiple of 16; or None."""
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
    """Launch `function` on `grid` programs of the current device; args and constants in the order of its parameters.

    key: identifies the constants and all that Triton specializes on (`aligned_dtypes`). The compiled kernel is stored
    under it. Later launches skip Triton's own look-up, which binds and hashes every argument and takes longer than a
    small GEMM. None: Triton does the look-up.
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
    # the last call of Triton's own launch, private to Triton 3.6 to 3.9; no hooks, and no metadata for them
    kernel.run(*grid, 1, stream, kernel.function, metadata, None, None, None, *args, *values)


def finalize_cache_keys(function: Any) -> None:
    """Compute Triton's cache key of `function` after the keys of all functions that it calls.

    Triton's key of a function covers the constants of a callee only if the callee's key exists. Without this step the
    key depends on the order of earlier launches, and another process compiles the kernel again. Does nothing in
    Triton's interpreter.
    """
    if interpreted() or function.fn in _FINALIZED:
        return
    _FINALIZED.add(function.fn)
    code, space = function.fn.__code__, function.fn.__globals__
    used = [space[name] for name in code.co_names if name in space]
    modules = [value for value in used if isinstance(value, ModuleType)]
    used += [getattr(module, name) for module in modules for name in code.co_names if hasattr(module, name)]
    for value in used:
        if isinstance(value, triton.runtime.jit.JITCallable):
            finalize_cache_keys(value)
    function.cache_key  # noqa: B018  computed at its first use


# Keyed by the Python functions: the hash of a JITFunction would compute its cache key.
_FINALIZED: set[Any] = set()
_COMPILED: dict[tuple[Any, ...], Any] = {}


def divisibility(signature: dict[str, str]) -> dict[tuple[int], list[list[Any]]]:
    """Attributes of a signature for the cross-compiler, as a launch finds them for aligned pointers and extents.

    They are spelt as the launcher spells them, so that a launch finds the cross-compiled kernel in Triton's cache.
    Since Triton 3.7 that includes an empty list for a constant.
    """
    found: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            found |= {} if triton.__version__.startswith("3.6.") else {(i,): []}
        elif name not in DO_NOT_SPECIALIZE and not kind.startswith("tensordesc"):
            found[i,] = [["tt.divisibility", 16]]
    return found


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
