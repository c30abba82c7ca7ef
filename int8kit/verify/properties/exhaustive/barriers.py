"""The proof of the wgmma kernel's barriers: no order of its groups of warps ends in a deadlock or reads a wrong slot.

The producer and the two consumers run unchanged as Python, see `device_python`, one after the other. What they wait
for and where they arrive does not depend on time, so a trace of each is enough. Then every interleaving of the three
traces is explored: a state is the number of operations that each group has done. In each state

    a group that can go on exists, or all have ended
    a consumer behind its wait for a slot finds the step that it is to multiply
    the producer fills a slot when both consumers have multiplied its older step

A wait for a parity passes when the phase of that parity is the last one completed, as on the GPU: two more phases look
like none. So a barrier that may complete twice before a group looks at it shows as a deadlock.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any

from int8kit.kernels import gemm_wgmma
from int8kit.spec import Kernel, Schedule, TileConfig
from int8kit.verify.executors import Executor
from int8kit.verify.properties.exhaustive.device_python import plain
from int8kit.verify.properties.exhaustive.launches import Fault, Gluon, Launch
from int8kit.verify.properties.proof import Outcome, Report

NAMES = ("consumer 0", "consumer 1", "the producer")
PRODUCER, CONSUMERS = 2, (0, 1)
STAGES = (2, 3, 4, 5, 10)
STEPS = (1, 2, 3, 4, 5, 9)
TILES = (1, 2, 3, 4, 7)
SMS = (1, 2, 3)
SHAPES = (  # rows of a tile, stream-K, schedule
    (64, 0, Schedule.PINGPONG),
    (128, 1, Schedule.PINGPONG),
    (256, 0, Schedule.COOPERATIVE),
    (256, 1, Schedule.COOPERATIVE),
)
Barrier = tuple[int, int]  # an allocation, and the number of the barrier in it


@dataclass(frozen=True)
class Ring:
    """An allocation of shared memory, which has its own number."""

    number: int
    shape: tuple[int, ...]

    def index(self, at: int) -> Part:
        """Part `at`, a slot or a barrier."""
        return Part((self.number, at))


@dataclass(frozen=True)
class Part:
    """A slot or a barrier, or rows of a slot."""

    name: Barrier

    def slice(self, row: int, rows: int, dim: int) -> Part:
        """Rows of the slot."""
        return self

    def permute(self, axes: Any) -> Part:
        """The slot, transposed."""
        return self


@dataclass
class Turn:
    """One wait, and all that the group does until its next wait."""

    barrier: Barrier
    parity: int
    step: int | None = None  # that a consumer is to find in the slot behind the wait
    arrivals: list[Barrier] = field(default_factory=list)
    filled: list[Barrier] = field(default_factory=list)  # full barriers whose slots the producer fills
    read: list[int] = field(default_factory=list)  # steps whose products are complete


class Recorder(Gluon):
    """The stand-in of `gl`, which records a trace of each group and then explores their interleavings."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = 0

    def zeros(self, shape: Any, dtype: Any, layout: Any) -> None:
        """Accumulators, which are not computed."""

    def allocate_shared_memory(self, dtype: Any, shape: Any, layout: Any) -> Any:
        """An allocation of shared memory."""
        self.allocated += 1
        return Ring(self.allocated, tuple(shape))

    def warp_specialize(self, parts: list[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        """Record the producer, which is the last, and the consumers; then explore."""
        self.traces: list[list[Turn]] = [[] for _ in parts]
        for self.group in reversed(range(len(parts))):
            self.open: list[int] = []  # steps whose products may be in flight
            function, args = parts[self.group]
            function(*args)
            if self.open:
                raise Fault(f"consumer {self.group} ends before its products")
        explore(self.traces, self.counts)

    # the stand-ins of mbarrier, of hopper and of the copies

    counts: dict[Barrier, int]  # arrivals that complete a phase

    def init(self, barrier: Part, count: int) -> None:
        """A new barrier."""
        self.counts[barrier.name] = count

    def wait(self, barrier: Part, parity: int) -> None:
        """A wait begins a turn."""
        turn = Turn(barrier.name, parity)
        if self.group != PRODUCER and barrier.name in self.fills:
            turn.step = next(self.steps)
        self.traces[self.group].append(turn)

    def arrive(self, barrier: Part, pred: Any = True) -> None:
        """An arrival."""
        if pred:
            self.traces[self.group][-1].arrivals.append(barrier.name)

    def expect(self, barrier: Part, count: int, pred: Any = True) -> None:
        """The producer's arrival, which the copies complete."""
        if pred:
            self.traces[PRODUCER][-1].filled.append(barrier.name)
            self.fills.add(barrier.name)

    def multiply(self, x: Part, w: Part, acc: Any, is_async: bool = False) -> None:
        """A product of the step that was waited for last."""
        step = self.traces[self.group][-1].step
        if step is None:
            raise Fault(f"consumer {self.group} multiplies a slot without a wait for it")
        self.open.append(step)
        if not is_async:
            self.finish(0)

    def finish(self, in_flight: int, deps: Any = ()) -> tuple[None, ...] | None:
        """A wait for all products but the last ones."""
        while len(self.open) > in_flight:
            self.traces[self.group][-1].read.append(self.open.pop(0))
        return None


class BarrierLaunch(Launch):
    """A launch whose barriers are explored."""

    def language(self) -> Recorder:
        """The recorder of this launch."""
        return Recorder()

    def _not_stored_once(self) -> None:
        """Nothing: `Launch` proves the stores."""

    def _wgmma(self, gl: Any) -> dict[str, Any]:
        gl.counts, gl.fills = {}, set()

        def nothing(*args: Any, **options: Any) -> None: ...

        bottom: dict[str, Any] = {
            "mbarrier": SimpleNamespace(
                init=gl.init, wait=gl.wait, arrive=gl.arrive, expect=gl.expect, MBarrierLayout=nothing
            ),
            "hopper": SimpleNamespace(warpgroup_mma=gl.multiply, warpgroup_mma_wait=gl.finish),
            "tma": SimpleNamespace(async_copy_global_to_shared=nothing, store_wait=nothing),
            "gdc_wait": nothing,
            "fix_up": lambda acc, *args: (True, acc),
            "_store": nothing,
        }
        multiply = plain(gemm_wgmma._multiply, gl, **bottom)

        def multiplied(*args: Any) -> Any:
            first, last = args[7:9]
            gl.steps = iter(range(first, last))
            return multiply(*args)

        return {**bottom, "_multiply": multiplied}


def explore(traces: list[list[Turn]], counts: dict[Barrier, int]) -> int:
    """Follow every interleaving of `traces`: the number of states. Raises Fault for a deadlock or a wrong slot."""
    arrivals = [_arrivals(trace) for trace in traces]
    ends = [{step: i for i, turn in enumerate(trace) for step in turn.read} for trace in traces]
    contents = _contents(traces[PRODUCER])
    seen, open_states = {(0, 0, 0)}, [(0, 0, 0)]
    while open_states:
        state = open_states.pop()
        moved = False
        for group, trace in enumerate(traces):
            at = state[group]
            if at == len(trace):
                continue
            turn = trace[at]
            done = sum(arrivals[other][turn.barrier][state[other]] for other in range(3)) // counts[turn.barrier]
            if done & 1 == turn.parity:
                continue
            moved = True
            if turn.step is not None and contents[turn.barrier][state[PRODUCER]][-1] != turn.step:
                found = contents[turn.barrier][state[PRODUCER]][-1]
                raise Fault(f"consumer {group} finds step {found} in a slot, expected step {turn.step}")
            for barrier in turn.filled:
                older = contents[barrier][at][-1]
                if any(state[c] <= ends[c].get(older, -1) for c in CONSUMERS):
                    raise Fault(f"a slot is filled while a consumer may read step {older} in it")
            producer, one, two = (count + (other == group) for other, count in enumerate(state))
            after = producer, one, two
            if after not in seen:
                seen.add(after)
                open_states.append(after)
        if not moved and any(at < len(trace) for at, trace in zip(state, traces, strict=True)):
            left = [f"{NAMES[group]} behind {at} waits" for group, at in enumerate(state) if at < len(traces[group])]
            raise Fault(f"nothing can go on: {', '.join(left)}")
    return len(seen)


def _arrivals(trace: list[Turn]) -> dict[Barrier, list[int]]:
    """For each barrier, the arrivals after 0, 1, 2, ... turns."""
    found: dict[Barrier, list[int]] = defaultdict(lambda: [0] * (len(trace) + 1))
    for number, turn in enumerate(trace, 1):
        for barrier in (*turn.arrivals, *turn.filled):
            counts = found[barrier]
            counts[number:] = [count + 1 for count in counts[number:]]
    return found


def _contents(trace: list[Turn]) -> dict[Barrier, list[list[int]]]:
    """For each full barrier, the steps that its slot has held after 0, 1, 2, ... turns of the producer."""
    found: dict[Barrier, list[list[int]]] = defaultdict(lambda: [[-1] for _ in range(len(trace) + 1)])
    for step, turn in enumerate(trace):
        for barrier in turn.filled:
            for later in found[barrier][step + 1 :]:
                later.append(step)
    return found


def prove(executor: Executor, tiles: tuple[TileConfig, ...], report: Report) -> Outcome:
    """All small launches of each schedule."""
    count = 0
    for (rows, stream_k, schedule), stages in product(SHAPES, STAGES):
        config = TileConfig(rows, 64, 128, 8, stages, 2, Kernel.WGMMA, stream_k, schedule)
        report(str(config))
        for number, sms, steps in product(TILES, SMS, STEPS):
            count += 1
            if why := BarrierLaunch(config, number * rows - 5, 60, steps * 128 - 16, sms).run():
                return Outcome(count, why)
    return Outcome(count)
