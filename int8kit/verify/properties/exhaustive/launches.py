"""Launches of the Gluon GEMM kernels in Python, without their arithmetic: which program adds which steps of which tile.

The launchers, the kernels' loops over their work, and the fix-up of stream-K run unchanged, see `device_python`. A few
functions at the bottom are replaced: copies into shared memory, products, and stores of tiles record their arguments.
Accumulators are numbers that name the tile and the steps that they contain.

    Launch(config, m=300, n=128, k=640, sms=8).run()    -> None, or how the launch is wrong

A kernel's programs run one after the other, in several orders. No program waits for another one, so an order decides
which program completes a tile, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from types import FunctionType, SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from int8kit.kernels import gemm
from int8kit.kernels.operands import Operands
from int8kit.spec import Kernel, TileConfig, consumer_rows
from int8kit.verify.properties.exhaustive.device_python import Array, Language, plain

COLUMNS = 2  # of the accumulators that stand for a tile; each has a value of its own
_TILE = 1 << 20  # a tile's name is a multiple; the steps are the bits below


Kind = Literal["accumulators", "output", "swiglu"]


class Fault(Exception):
    """Something that no sound launch does."""


class Accumulators(np.ndarray[Any, Any]):
    """[1, COLUMNS] int64: the name of the tile times the steps, plus a bit for each step."""

    type = SimpleNamespace(layout=None)


def accumulators(row: int, column: int, steps: Iterable[int]) -> Accumulators:
    """The accumulators of the tile at `row` and `column` over `steps`."""
    name = 1 + (row + 7919 * column) * COLUMNS
    values = [sum((1 << step) + _TILE * (name + c) for step in steps) for c in range(COLUMNS)]
    return np.array([values], np.int64).view(Accumulators)


class Memory:
    """A buffer in global memory. It refuses loads of elements that were never stored."""

    def __init__(self, size: int, *, zero: bool) -> None:
        self.values = np.zeros(size, np.int64)
        self.stored = np.full(size, zero)
        self.unordered = False  # stores that no barrier has followed

    def at(self, offsets: Any) -> Any:
        """The offsets, if they lie inside the buffer."""
        if np.min(offsets) < 0 or np.max(offsets) >= self.values.size:
            raise Fault(f"offset {np.max(offsets)} in a buffer of {self.values.size}")
        return offsets


class Absent:
    """A vector that no part of a launch reads here, and each value that is loaded from it."""

    def __add__(self, more: Any) -> Absent:
        return self

    def to(self, dtype: Any) -> Absent:
        """Itself, as another type."""
        return self


@dataclass(frozen=True)
class Pointer:
    """Offsets into a memory."""

    memory: Memory
    offsets: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + more)


class Gluon(Language):
    """The functions of `gl` that the kernels' loops and the fix-up use."""

    int8 = int32 = int64 = float32 = None

    def __init__(self) -> None:
        super().__init__()
        self.waited = False  # for the kernel ahead
        self.workspaces: list[Memory] = []
        self.ring: Ring = {}  # of the program that runs

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *args, **options: None
        raise AttributeError(f"the stand-in of gl has no {name}; see int8kit/verify/properties/exhaustive/launches.py")

    def arange(self, start: int, end: int, layout: Any = None) -> Array:
        """start, start + 1, ..., end - 1."""
        return np.arange(start, end)

    def expand_dims(self, x: Array, axis: int) -> Array:
        """x with one more axis."""
        return np.expand_dims(x, axis)

    def store(self, pointer: Pointer, values: Any) -> None:
        """Store `values`, each element once in a launch."""
        memory, offsets = pointer.memory, pointer.memory.at(pointer.offsets)
        if memory.stored[offsets].any():
            raise Fault("a slot of the workspace is stored twice")
        memory.values[offsets], memory.stored[offsets], memory.unordered = values, True, True

    def load(self, pointer: Pointer | Absent, cache_modifier: str = "", **options: Any) -> Accumulators | Absent:
        """The stored values."""
        if isinstance(pointer, Absent):
            return pointer
        offsets = pointer.memory.at(pointer.offsets)
        if not pointer.memory.stored[offsets].all():
            raise Fault("a slot of the workspace is loaded before it is stored")
        if cache_modifier != ".cg":
            raise Fault("another program's accumulators are loaded through L1, which may hold older ones")
        values: Accumulators = pointer.memory.values[offsets].view(Accumulators)
        return values

    def atomic_add(self, pointer: Pointer, value: int, sem: str = "") -> int:
        """The value before the addition."""
        if any(memory.unordered for memory in self.workspaces) or sem != "acq_rel":
            raise Fault("an arrival is counted before all threads have stored, or without release")
        offset = pointer.memory.at(pointer.offsets)
        before = int(pointer.memory.values[offset])
        pointer.memory.values[offset] += value
        return before

    def allocate_shared_memory(self, dtype: Any, shape: Iterable[int], layout: Any) -> Shared:
        """An allocation of shared memory."""
        return Shared(tuple(shape))

    def warp_specialize(self, parts: list[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        """Run the producer, which is the last, and then the consumers."""
        self.ring.clear()
        waited = self.waited
        for function, args in reversed(parts):
            self.waited = waited
            function(*args)
            if not self.waited:
                raise Fault("a group of warps does not wait for the kernel ahead")
        cooperative = parts[0][1][2]
        if any(step.read != 1 + cooperative for steps in self.ring.values() for step in steps):
            raise Fault(f"program {self.pid} copies a step that its consumers do not release as often as expected")

    def barrier(self) -> None:
        """All stores before it are complete."""
        for memory in self.workspaces:
            memory.unordered = False


@dataclass
class Launch:
    """One launch under `config`, on a GPU of `sms` multiprocessors."""

    config: TileConfig
    m: int
    n: int
    k: int
    sms: int
    kind: Kind = "accumulators"
    order: int = 1  # of the programs: 1 the first one first, -1 the last one first, else by multiples of it

    def __str__(self) -> str:
        where = f"{self.sms} multiprocessors, order {self.order}"
        return f"{self.kind} of {self.m}x{self.n}x{self.k}, {self.config}, {where}"

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return -(-self.k // self.config.block_k)

    def run(self) -> str | None:
        """How the launch is wrong, or None."""
        self.stores: dict[tuple[int, int], int] = {}
        try:
            self._launch()
        except (Fault, ArithmeticError, LookupError) as fault:
            return f"{self}: {fault}"
        return self._not_stored_once()

    def _not_stored_once(self) -> str | None:
        corners = product(range(0, self.m, consumer_rows(self.config)), range(0, self.n, self.config.block_n))
        wrong = next((corner for corner in corners if self.stores.get(corner) != 1), None)
        return wrong and f"{self}: the tile at {wrong} is stored {self.stores.get(wrong, 0)} times, expected once"

    def _launch(self) -> None:
        x, w = (torch.empty(rows, self.k, dtype=torch.int8) for rows in (self.m, self.n))
        sums = self.kind == "accumulators"
        swiglu = self.kind == "swiglu"
        sx, sw = (None, None) if sums else (torch.empty(self.m), torch.empty(self.n))
        self.out = torch.empty(self.m, self.n // (1 + swiglu), dtype=torch.int32 if sums else torch.float32)
        replaced = {
            "launch_cached": self._launched,
            "multiprocessors": lambda device: self.sms,
            "TensorDescriptor": SimpleNamespace(from_tensor=_descriptor),
        }
        launch = _host(gemm.module(self.config.kernel).launch, replaced)
        launch(Operands(x, w, sx, sw, sw, self.out, swiglu), self.config, {})

    def language(self) -> Gluon:
        """The stand-in of `gl` for this launch."""
        return Gluon()

    def _launched(self, function: Any, grid: Any, args: Any, values: Any, options: Any, key: Any) -> None:
        """The stand-in of `launch_cached`: run the programs."""
        gl = self.language()
        memories = [self._memory(arg) for arg in args]
        gl.workspaces = [m.memory for m in memories if isinstance(m, Pointer)]
        bottom = self._mma_sync() if self.config.kernel is Kernel.MMA_SYNC else self._wgmma(gl)
        body = plain(function, gl, barrier=gl.barrier, **bottom)
        programs = list(range(grid[0]))
        if self.order == -1:
            programs.reverse()
        elif self.order > 1:
            programs.sort(key=lambda p: (p * self.order % (grid[0] + 1), p))
        for program in programs:
            gl.pid, gl.programs, gl.waited = program, grid[0], False
            body(*memories, **dict(values))

    def _memory(self, arg: Any) -> Any:
        """A launch argument as the kernel sees it here: buffers of stream-K are memories, other tensors are absent."""
        if not isinstance(arg, torch.Tensor):
            return arg
        if arg is self.out or arg.dtype is not torch.int32:
            return Absent()
        if arg.dim() == 1:
            if arg.any():
                raise Fault("the counters of arrivals do not start at zero")
            return Pointer(Memory(arg.numel(), zero=True))
        pieces = self.config.block_m // consumer_rows(self.config)
        slots = arg.numel() // (self.config.block_m * self.config.block_n)
        return Pointer(Memory(slots * pieces * COLUMNS, zero=False))

    def _mma_sync(self) -> dict[str, Any]:
        """Stand-ins of the functions of the mma_sync kernel that compute."""
        step = self.config.block_k

        def tile(
            x_slots: Any, w_slots: Any, x: Any, w: Any, row: int, col: int, first: int, end: int, *rest: Any
        ) -> Any:
            if first % step or (end % step and end != self.k) or end > self.k:
                raise Fault(f"the tile at ({row}, {col}) is multiplied from K = {first} to {end}")
            return accumulators(row, col, range(first // step, -(-end // step)))

        return {"_tile": tile, "_store": lambda acc, row, col, *rest: self._stored(acc, row, col)}

    def _wgmma(self, gl: Gluon) -> dict[str, Any]:
        """Stand-ins of the functions of the wgmma kernel that copy or compute."""

        def nothing(*args: Any, **options: Any) -> None: ...

        def wait_for_kernel_ahead() -> None:
            gl.waited = True

        def wait(barrier: View, parity: int) -> None:  # of the producer, until a slot is empty
            gl.ring.setdefault(barrier.at, []).append(Step())

        def expect(barrier: View, count: int, pred: Any = True) -> None:
            gl.ring[barrier.at][-1].expected += count if pred else 0

        def copy(desc: Any, corner: list[int], barrier: View, target: View, pred: Any = True) -> None:
            if pred:
                gl.ring[target.at][-1].copies.append((target.row, desc.block_shape[0] * desc.block_shape[1], *corner))

        return {
            "mbarrier": SimpleNamespace(wait=wait, expect=expect, init=nothing, MBarrierLayout=nothing),
            "tma": SimpleNamespace(async_copy_global_to_shared=copy, store_wait=nothing),
            "gdc_wait": wait_for_kernel_ahead,
            "_multiply": lambda consumer, *args: self._multiplied(gl.ring, consumer, *args),
            "_store": lambda consumer, acc, row, col, *rest: self._stored(acc, row, col),
        }

    def _multiplied(
        self, ring: Ring, consumer: int, x_ring: Shared, w_ring: Shared, full: Any, empty: Any, order: Any, parity: Any,
        first: int, last: int, alone: Any, cooperative: bool, layout: Any,
    ) -> Accumulators:  # fmt: skip
        """The accumulators of a consumer's rows in the slots of steps `first` to `last`: stand-in of `_multiply`."""
        stages, rows, step_k = x_ring.shape[0], consumer_rows(self.config), self.config.block_k
        offset = consumer * rows if cooperative else 0
        tiles, steps = set(), []
        for step in range(first, last):
            copied = ring.get(step % stages, [])
            if step // stages >= len(copied):
                raise Fault(f"consumer {consumer} waits for step {step}, which the producer does not copy")
            slot = copied[step // stages]
            slot.read += 2 if alone and cooperative else 1
            row, col, k = slot.contents(offset, rows, self.m)
            tiles.add((row, col))
            steps.append(k // step_k)
        if len(tiles) != 1:
            raise Fault(f"consumer {consumer} multiplies steps {first} to {last} of {len(tiles)} tiles, expected of 1")
        return accumulators(*tiles.pop(), steps)

    def _stored(self, acc: Accumulators, row: int, col: int) -> None:
        """A tile, or a consumer's half of one, is stored at (row, col)."""
        if (acc != accumulators(row, col, range(self.steps))).any():
            raise Fault(f"the tile at ({row}, {col}) is stored with other steps than its own, each once")
        self.stores[row, col] = self.stores.get((row, col), 0) + 1


@dataclass
class Step:
    """A slot's contents for one step: the copies into it, and how often consumers release it."""

    copies: list[tuple[int, int, int, int]] = field(default_factory=list)  # row of the slot, bytes, row, column
    expected: int = 0  # bytes for which the barrier waits
    read: int = 0

    def contents(self, offset: int, rows: int, m: int) -> tuple[int, int, int]:
        """Row of x at `offset`, row of w, and column of K, of a slot whose first copy is w and the others x."""
        if sum(size for _, size, *_ in self.copies) != self.expected:
            raise Fault(f"a barrier expects {self.expected} bytes, and copies have another number")
        (_, _, col, k), *boxes = self.copies
        if {box[3] for box in boxes} != {k}:
            raise Fault("x and w of a step are copied from different columns of K")
        row = boxes[0][2] - boxes[0][0] + offset
        have = {at + i: start + i for at, size, start, column in boxes for i in range(size // 128)}
        if any(have.get(offset + i) != row + i for i in range(min(rows, m - row))):
            raise Fault(f"rows from {row} on are not all in the slot")
        return row, col, k


Ring = dict[int, list[Step]]


@dataclass(frozen=True)
class Shared:
    """An allocation of shared memory."""

    shape: tuple[int, ...]

    def index(self, at: int) -> View:
        """Part `at`, a slot or a barrier."""
        return View(at)


@dataclass(frozen=True)
class View:
    """A slot or a barrier of a ring, or the rows of a slot from `row` on."""

    at: int
    row: int = 0

    def store(self, values: Any) -> None:
        """Nothing: only the epilogue, which is left out, reads it."""

    def slice(self, row: int, rows: int, dim: int) -> View:
        """The rows from `row` on."""
        return View(self.at, row)


def _descriptor(tensor: torch.Tensor, block: list[int], layout: Any) -> Any:
    return SimpleNamespace(block_shape=block, layout=None, dtype=None)


def _host(function: Any, replaced: dict[str, Any], made: dict[Any, Any] | None = None) -> Any:
    """A host function that sees `replaced` instead of its module's names, as do int8kit's functions that it calls."""
    made, code, space = {} if made is None else made, function.__code__, dict(function.__globals__)
    if code in made:
        return made[code]
    made[code] = FunctionType(code, space, function.__name__, function.__defaults__)
    space.update((name, value) for name, value in replaced.items() if name in space)
    for name in code.co_names:
        value = space.get(name)
        if name not in replaced and isinstance(value, FunctionType) and value.__module__.startswith("int8kit."):
            space[name] = _host(value, replaced, made)
    return made[code]
