"""The launches of a process without a GPU: which stored kernel each of them would run.

Triton's interpreter stores no kernel. In the context of `observed_launches` the launchers run as on a GPU up to Triton,
and nothing is compiled or executed. A launch that finds a stored kernel must find one that was compiled for

    the same function, constants and options
    the same kinds of arguments: dtypes; addresses and integers that are multiples of 16; integers that are 1

FREE names the integers on which no kernel depends. The rule is Triton's, written a second time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton

from int8kit.kernels import gemm, gemm_triton, launch, row_primitives

FREE = ("M", "group_m", "IMAGE_ROWS", "PERIOD")
_DEVICE, _STREAM = 3, 7
_DRIVER = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: (_STREAM, device)))
_Named = tuple[tuple[str, Any], ...]


def kind_of(name: str, value: Any) -> Any:
    """The kind of an argument, on which Triton compiles a kernel."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return float
    wide = not -(2**31) <= value < 2**31
    return wide if name in FREE else (wide, value == 1, value % 16 == 0)


@dataclass
class Observed:
    """The launches of one context."""

    compiled: int = 0  # launches for which Triton looked a kernel up
    launches: int = 0
    problems: list[str] = field(default_factory=list)
    present: tuple[Any, ...] = ()  # grid, arguments, constants, options of the launch that runs
    needs: tuple[Any, ...] = ()  # of that launch: two launches with the same needs have one kernel

    def launch_cached(
        self, function: Any, grid: tuple[int, int], args: tuple[Any, ...], constants: _Named, options: _Named, key: Any
    ) -> None:
        """Call the present function, with a device function that this object watches."""
        kinds = tuple(map(kind_of, inspect.signature(function.fn).parameters, args))
        self.present, self.needs = (grid, args, constants, options), (function.fn, constants, options, kinds)
        self.launches += 1
        launch.launch_cached(_Function(self, function.fn), grid, args, constants, options, key)

    def expect(self, what: str, got: Any, want: Any) -> None:
        """Note a problem if a launch hands something else to Triton than expected."""
        one, two = ([id(v) if isinstance(v, torch.Tensor) else v for v in side] for side in (got, want))
        if one != two:
            self.problems.append(f"Triton gets other {what} than the launcher was given")


@dataclass
class _Function:
    """A device function, as Triton looks its kernel up."""

    seen: Observed
    fn: Any

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def compiled(*args: Any, **named: Any) -> _Kernel:
            of_grid, of_args, constants, options = self.seen.present
            wanted = dict(constants) | dict(options) | {"enable_fp_fusion": False}
            self.seen.compiled += 1
            self.seen.expect("a grid", grid, of_grid)
            self.seen.expect("arguments", args, of_args)
            self.seen.expect("constants or options", sorted(named.items()), sorted(wanted.items()))
            return _Kernel(self.seen, self.seen.needs)

        return compiled


@dataclass
class _Kernel:
    """A compiled kernel, as `launch_cached` stores and launches it."""

    seen: Observed
    needs: tuple[Any, ...]
    packed_metadata = "metadata"
    function = "handle"

    def run(self, *values: Any) -> None:
        """Launch it."""
        grid, args, constants, _ = self.seen.present
        before = (*grid, 1, (_STREAM, _DEVICE), self.function, self.packed_metadata, None, None, None)
        self.seen.expect("values", values, (*before, *args, *(value for _, value in constants)))
        names = "function", "constants", "options", "arguments"
        other = [name for name, mine, theirs in zip(names, self.needs, self.seen.needs, strict=True) if mine != theirs]
        if other:
            self.seen.problems.append(f"it runs a kernel that was compiled for other {' and '.join(other)}")


@contextmanager
def observed_launches() -> Iterator[Observed]:
    """A context that starts from an empty store of kernels, without a GPU; its value has the launches."""
    seen, kept = Observed(), dict(launch._COMPILED)
    launch._COMPILED.clear()
    with ExitStack() as stack:
        for module in (gemm_triton, row_primitives):
            stack.enter_context(mock.patch.object(module, "launch_cached", seen.launch_cached))
        for module in (gemm, launch):
            stack.enter_context(mock.patch.object(module, "interpreted", return_value=False))
        stack.enter_context(mock.patch.object(row_primitives, "interpreter_fp32", lambda x: x))
        stack.enter_context(mock.patch.object(launch, "finalize_cache_keys", return_value=None))
        stack.enter_context(mock.patch.object(triton.runtime, "driver", _DRIVER))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=_DEVICE))
        try:
            yield seen
        finally:
            launch._COMPILED.clear()
            launch._COMPILED.update(kept)
