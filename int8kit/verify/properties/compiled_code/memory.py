"""Checks of buffers in shared memory that the threads and the copy engines share: no one reads or writes too early.

The check runs the code of thread 0 on every path and follows the state of each buffer. All threads execute the same
instructions, so a buffer is `shared` between them by the next barrier. Branches that one input decides are followed
together: if `k + 64 >= end` held, `k + 128 >= end` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

from int8kit.spec import Kernel, TileConfig, consumer_rows
from int8kit.verify.properties.compiled_code.launched import Code
from int8kit.verify.properties.compiled_code.ptx import Instruction, Program, parse, split, written
from int8kit.verify.properties.compiled_code.synchronization import barriers
from int8kit.verify.properties.compiled_code.values import Values

CHUNK_BYTES = 64  # of a row of a staging buffer
_Fact = tuple[str, str, int, bool]  # register + number >= register, or the contrary


@dataclass(frozen=True)
class _State:
    """What has happened to the buffers on a path, and the comparisons that decided the path."""

    pending: tuple[frozenset[int], ...] = ()  # groups of copies in flight, each the buffers of one; the newest last
    open_group: frozenset[int] = frozenset()  # buffers of copies that are not committed yet
    landed: frozenset[int] = frozenset()  # waited for, but not shared by a barrier yet
    touched: frozenset[int] = frozenset()  # read (slots) or written (staging) by threads since the last barrier
    unfenced: frozenset[int] = frozenset()  # written by threads and not shown to the copy engine
    facts: frozenset[_Fact] = frozenset()

    def busy(self, buffer: int) -> bool:
        """Whether copies of the buffer may be in flight for some thread."""
        return buffer in self.open_group or buffer in self.landed or any(buffer in group for group in self.pending)

    def committed(self) -> _State:
        return replace(self, pending=(*self.pending, self.open_group), open_group=frozenset())

    def waited(self, left: int) -> _State:
        """The state behind a wait that leaves the newest `left` groups in flight."""
        done = self.pending[: max(0, len(self.pending) - left)]
        return replace(self, pending=self.pending[len(done) :], landed=self.landed.union(*done))


Step = Callable[[_State, Instruction], "_State | str"]


def slots(code: Code, config: TileConfig | None) -> str | None:
    """The mma.sync kernel's slots: read when their copy has landed, and copied into when they have been read."""
    if config is None or config.kernel is not Kernel.MMA_SYNC:
        return None
    program = parse(code.ptx)
    values = Values(program)
    copies, reads = program.find("cp.async.cg", "cp.async.ca"), program.find("ldmatrix")
    if not copies or not reads:
        return f"expected cp.async and ldmatrix, got {len(copies)} and {len(reads)}"
    places = _slots(program, values, copies, code, config)
    if isinstance(places, str):
        return places
    of: dict[int, int] = {}
    for one in (*copies, *reads):
        address = values.address(one.operands)
        if (place := _place(address, places)) is None:
            return f"{one}: expected an address in one of {len(places)} slots, got {address}"
        of[one.index] = place
    shared = {one.index for one in barriers(program) if not one.guard}

    groups = program.find("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all")

    def step(state: _State, one: Instruction) -> _State | str:
        if one.index in shared:
            return replace(state, landed=frozenset(), touched=frozenset())
        if one.starts("cp.async.commit_group"):
            return state.committed()
        if one.starts("cp.async.wait_group"):
            return state.waited(int(one.operands))
        if one.starts("cp.async.wait_all"):
            return state.committed().waited(0)
        if one.starts("ldmatrix"):
            if state.busy(of[one.index]):
                return f"{one} reads slot {of[one.index]} before its copy is known to have landed"
            return replace(state, touched=state.touched | {of[one.index]})
        if one.index in of:
            if of[one.index] in state.touched:
                return f"{one} copies into slot {of[one.index]}, which other warps may be reading"
            return replace(state, open_group=state.open_group | {of[one.index]})
        return state

    return _explore(program, step, {*of, *shared, *(one.index for one in groups)})


def _slots(
    program: Program, values: Values, copies: Iterable[Instruction], code: Code, config: TileConfig
) -> list[tuple[int, int]] | str:
    """Start and size of every slot: x and w have num_stages each, and the first copy into each is to its start."""
    found: list[tuple[int, int]] = []
    for operand, rows in (("x_ptr", config.block_m), ("w_ptr", config.block_n)):
        size, starts = rows * config.block_k, list[int]()
        source = code.parameters[operand]
        addresses = {
            values.address(one.operands) for one in copies
            if source in set().union(*(program.origins(r) for r in _source(one)))
        }  # fmt: skip
        for address in sorted(a for a in addresses if a is not None):
            if not starts or address >= starts[-1] + size:
                starts.append(address)
        if len(starts) != config.num_stages:
            return f"expected {config.num_stages} slots of {operand}, got {len(starts)}"
        found += [(start, size) for start in starts]
    return found


def _place(address: int | None, places: list[tuple[int, int]]) -> int | None:
    """The index of the buffer (start, size) that an address lies in."""
    inside = (i for i, (start, size) in enumerate(places) if address is not None and start <= address < start + size)
    return next(inside, None)


def _source(one: Instruction) -> list[str]:
    """The registers of the source address of a copy, its second operand."""
    return split(one.operands)[1].strip("[] ").replace("+", " ").split()[:1]


def staging(code: Code, config: TileConfig | None) -> str | None:
    """TMA stores: the buffer is written, fenced and shared before; it has been read before it is written again.

    All stores have read their buffers before the kernel, or its part for a group of warps, ends.
    """
    if config is None or config.kernel is not Kernel.WGMMA:
        return None
    program = parse(code.ptx)
    values = Values(program)
    stores = [one for one in program.find("cp.async.bulk.tensor") if ".global.shared" in one.op]
    if not stores:
        return "expected TMA stores"
    at = {one.index: values.address(split(one.operands)[1]) for one in stores}
    starts = sorted({address for address in at.values() if address is not None})
    if None in at.values():
        return f"{stores[0]}: expected a constant address of the staging buffer"
    places = [(start, consumer_rows(config) * CHUNK_BYTES) for start in starts]
    at |= {one.index: values.address(one.operands) for one in program.find("st.shared", "stmatrix")}
    of = {index: place for index, address in at.items() if (place := _place(address, places)) is not None}
    if why := _of_two_groups(program, stores, of):
        return why
    shared = {one.index for one in barriers(program) if not one.guard}
    everyone = {one.index for one in barriers(program) if "," not in one.operands}
    others = program.find("cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "fence.proxy.async", "ret")

    def step(state: _State, one: Instruction) -> _State | str:
        if (one.index in everyone or one.starts("ret")) and (state.pending or state.open_group):
            return f"{one} ends a group of warps before its TMA stores have read their buffers"
        if one.index in shared:
            return replace(state, landed=frozenset(), touched=frozenset())
        if one.starts("cp.async.bulk.commit_group"):
            return state.committed()
        if one.starts("cp.async.bulk.wait_group"):
            return state.waited(int(one.operands))
        if one.starts("fence.proxy.async"):
            return replace(state, unfenced=frozenset())
        if one.index not in of:
            return state
        buffer = of[one.index]
        if not one.starts("cp"):
            if state.busy(buffer):
                return f"{one} writes staging buffer {buffer}, which a TMA store may be reading"
            return replace(state, touched=state.touched | {buffer}, unfenced=state.unfenced | {buffer})
        if buffer in state.unfenced:
            return f"{one} reads staging buffer {buffer} without fence.proxy.async behind its stores"
        if buffer in state.touched:
            return f"{one} reads staging buffer {buffer} without a barrier behind its stores"
        return replace(state, open_group=state.open_group | {buffer})

    return _explore(program, step, {*of, *shared, *(one.index for one in others)})


def _of_two_groups(program: Program, stores: list[Instruction], of: dict[int, int]) -> str | None:
    """A staging buffer that two groups of warps store: no path leads from one store to the other within a group."""
    ends = [one for one in barriers(program) if "," not in one.operands]
    for first, second in combinations(stores, 2):
        if of[first.index] == of[second.index] and not (
            program.escape([first], guards=ends, to=[second]) or program.escape([second], guards=ends, to=[first])
        ):
            return f"{second} reads staging buffer {of[second.index]}, which another group of warps writes"
    return None


@dataclass
class _Search:
    """The states that wait to be followed, and the ones that were."""

    todo: list[tuple[int, _State]] = field(default_factory=lambda: [(0, _State())])
    seen: set[tuple[int, _State]] = field(default_factory=set)

    def __iter__(self) -> Iterator[tuple[int, _State]]:
        while self.todo:
            at, state = self.todo.pop()
            if (at, state) not in self.seen:
                self.seen.add((at, state))
                yield at, state


LIMIT = 200000  # of steps: fifty times the kernels' own


def _explore(program: Program, step: Step, relevant: set[int]) -> str | None:
    """Follow `step` on all paths from the entry; its first objection. It changes states at `relevant` places only."""
    search = _Search()
    comparisons = _comparisons(program)
    kept = {register for base, bound, _ in comparisons.values() for register in (base, bound)}
    relevant |= {one.index for register in kept for one in program.definitions[register]}
    for start, state in search:
        at = start
        while at not in relevant and len(program.following[at]) == 1:
            at = program.following[at][0]
        one = program.instructions[at]
        after = step(state, one)
        if isinstance(after, str):
            return after
        if changed := kept.intersection(written(one)):
            after = replace(after, facts=frozenset(f for f in after.facts if not changed.intersection(f[:2])))
        if len(search.seen) > LIMIT:
            return "expected fewer states: the code cannot be followed"
        following = program.following[at]
        if len(following) < 2 or (comparison := comparisons.get(one.guard.lstrip("!"))) is None:
            search.todo += [(target, after) for target in following]
            continue
        for target, taken in zip(following, (True, False), strict=False):
            holds = taken != one.guard.startswith("!")  # the comparison, on this branch
            if not _contradicts(after.facts, comparison, holds):
                search.todo.append((target, replace(after, facts=after.facts | {(*comparison, holds)})))
    return None


def _contradicts(facts: frozenset[_Fact], comparison: tuple[str, str, int], holds: bool) -> bool:
    """Whether `base + number >= bound` cannot be `holds`, since it was otherwise for a smaller or larger number."""
    base, bound, number = comparison
    return any(
        held != holds and (number >= other if held else number <= other)
        for fact_base, fact_bound, other, held in facts
        if (fact_base, fact_bound) == (base, bound)
    )


def _comparisons(program: Program) -> dict[str, tuple[str, str, int]]:
    """The predicates of the form `base + number >= bound`."""
    found = {}
    for name, definitions in program.definitions.items():
        if len(definitions) == 1 and definitions[0].op == "setp.ge.s32":
            _, left, bound = split(definitions[0].operands)
            base, number = left, 0
            sums = program.definitions.get(left, [])
            if len(sums) == 1 and sums[0].op == "add.s32" and split(sums[0].operands)[2].isdigit():
                base, number = split(sums[0].operands)[1], int(split(sums[0].operands)[2])
            if bound.startswith("%"):
                found[name] = base, bound, number
    return found
