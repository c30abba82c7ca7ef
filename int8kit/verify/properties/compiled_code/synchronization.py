"""Checks that the threads of a kernel, and a kernel and the one ahead of it, wait for each other where they must.

Each check takes the code of a kernel and returns how it breaks a rule, or None. A rule holds on every path through the
code: see `ptx`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from int8kit.spec import Kernel, TileConfig
from int8kit.verify.properties.compiled_code.launched import Code
from int8kit.verify.properties.compiled_code.ptx import Instruction, Program, parse, registers, split, written
from int8kit.verify.properties.compiled_code.values import Values

_NOT_GLOBAL = {"param", "shared", "shared::cta", "shared::cluster", "local", "const"}
_COPIES_BETWEEN = ("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all", "cp.async.bulk.commit_group",
                   "cp.async.bulk.wait_group", "cp.async.mbarrier")  # fmt: skip


def is_global(one: Instruction) -> bool:
    """Whether an instruction reads or writes global memory."""
    if one.starts("cp"):
        return not one.starts(*_COPIES_BETWEEN)
    return one.starts("ld", "st", "atom", "red") and not _NOT_GLOBAL & set(one.op.split("."))


def barriers(program: Program) -> list[Instruction]:
    """The barriers between warps. A barrier with a count is for the warps of one group."""
    return program.find("bar.sync", "barrier.sync", "bar.red", "barrier.cta.sync")


def _of_all_threads(program: Program) -> list[Instruction]:
    return [one for one in barriers(program) if "," not in one.operands]


def early_start(code: Code, config: TileConfig | None) -> str | None:
    """No access to global memory comes before the wait for the kernel ahead.

    The wait of one thread and a barrier of all threads behind it serve all others.
    """
    program = parse(code.ptx)
    if not code.early_start:
        return None
    guards = program.find("griddepcontrol.wait")
    if _some_wait_first(program):
        guards += _of_all_threads(program)
    if (access := program.escape_entry(guards=guards, to=filter(is_global, program.instructions))) is None:
        return None
    return f"{access} can come before griddepcontrol.wait, so it may meet data of the kernel ahead"


def _some_wait_first(program: Program) -> bool:
    """Whether in every run some threads wait for the kernel ahead before they reach a barrier of all threads."""
    stops = {one.index for one in _of_all_threads(program)}

    def waits(at: int, seen: frozenset[int]) -> bool:
        while at not in seen:
            one = program.instructions[at]
            if one.starts("griddepcontrol.wait") and not one.guard:
                return True
            if at in stops or not program.following[at]:
                return False
            after = program.following[at]
            if len(after) == 1:
                at = after[0]
                continue
            seen |= {at}
            some = any if program.is_of_thread(one.guard.lstrip("!")) else all
            return some(waits(branch, seen) for branch in after)
        return False

    return waits(0, frozenset())


def counters(code: Code, config: TileConfig | None) -> str | None:
    """The fix-up of stream-K: stores of partial sums, a barrier, an acquiring and releasing count, a barrier, loads."""
    program = parse(code.ptx)
    if not code.constants.get("STREAM_K"):
        return None
    sums = code.parameters["workspace_ptr"]
    touching = [one for one in program.find("ld", "st") if is_global(one) and sums in program.address_origins(one)]
    stores = [one for one in touching if one.starts("st")]
    loads = [one for one in touching if one.starts("ld")]
    counts = program.find("atom", "red")
    if not (stores and loads and counts):
        return f"expected stores and loads of partial sums and a count, got {len(stores)}, {len(loads)}, {len(counts)}"
    for one in counts:
        if "acq_rel" not in one.op or not re.search(r"\.(gpu|sys)\b", one.op):
            return f"{one}: expected acq_rel of scope gpu"
    for one in loads:
        if not re.search(r"\.(cg|cv|volatile|relaxed|acquire)\b", one.op) or ".nc" in one.op:
            return f"{one}: expected a load from L2 (.cg), which other multiprocessors write"
    between = barriers(program)
    if early := program.escape(stores, guards=between, to=counts):
        return f"{early} counts partial sums without a barrier behind their stores"
    if early := program.escape_entry(guards=counts, to=loads) or program.escape(stores, guards=counts, to=loads):
        return f"{early} reads partial sums before the count"
    if early := program.escape(counts, guards=between, to=loads):
        return f"{early} reads partial sums without a barrier behind the count"
    return None


def masks(code: Code, config: TileConfig | None) -> str | None:
    """Each store of the output has a predicate that depends on M and N. TMA clips the wgmma kernel's stores."""
    program = parse(code.ptx)
    if config is None or config.kernel is Kernel.WGMMA:
        return None
    output, extents = code.parameters["out_ptr"], {code.parameters["M"], code.parameters["N"]}
    stores = [one for one in program.find("st") if is_global(one) and output in program.address_origins(one)]
    for one in stores:
        if not extents <= program.origins(one.guard.lstrip("!")):
            return f"{one}: expected a predicate that depends on M and N"
    return None if stores else "expected stores of the output"


def barrier_setup(code: Code, config: TileConfig | None) -> str | None:
    """An mbarrier is set up before, and used behind, a barrier of all threads."""
    program = parse(code.ptx)
    setups = program.find("mbarrier.init")
    uses = [one for one in program.find("mbarrier", "cp.async.bulk.tensor") if not one.starts("mbarrier.init")]
    uses = [one for one in uses if "mbarrier" in one.op]
    everyone = _of_all_threads(program)
    if uses and not setups:
        return f"{uses[0]} uses an mbarrier that is never set up"
    if (one := program.escape(everyone, guards=(), to=setups)) is not None:
        return f"{one} sets up an mbarrier behind the barrier that announces it"
    if (one := program.escape_entry(guards=everyone, to=uses)) is not None:
        return f"{one} uses an mbarrier before the barrier that announces it"
    return None


def products(code: Code, config: TileConfig | None) -> str | None:
    """wgmma: fenced before, committed and waited for behind; its slot is released when it has been read."""
    program = parse(code.ptx)
    multiplies = program.find("wgmma.mma_async")
    if not multiplies:
        return None
    sums = _accumulators(program, multiplies)
    fences, commits = program.find("wgmma.fence"), program.find("wgmma.commit_group")
    waits = {n: [one for one in program.find("wgmma.wait_group") if int(one.operands) <= n] for n in (0, 1)}
    changes = [one for one in program.instructions if not one.starts("wgmma") and sums.intersection(written(one))]
    if early := program.escape_entry(guards=fences, to=multiplies) or program.escape(
        changes, guards=fences, to=multiplies
    ):
        return f"{_short(early)} has no wgmma.fence before it"
    if (one := program.escape(multiplies, guards=commits, to=program.find("wgmma.wait_group"))) is not None:
        return f"{one} waits for products that are not committed"
    uses = [one for one in program.instructions if not one.starts("wgmma", "mov") and sums.intersection(_read(one))]
    if (one := program.escape(multiplies, guards=waits[0], to=uses)) is not None:
        return f"{one} reads sums before wgmma.wait_group 0"
    return _released(program, multiplies, waits)


def _released(program: Program, multiplies: list[Instruction], waits: dict[int, list[Instruction]]) -> str | None:
    """Slots are released one step late, in the loop that multiplies, and behind the last product after it."""
    values = Values(program)
    fixed = {values.address(one.operands) for one in program.find("mbarrier.init")}
    arrivals = program.find("mbarrier.arrive")
    releases = [one for one in arrivals if "expect_tx" not in one.op and values.address(one.operands) not in fixed]
    if (one := program.escape(multiplies, guards=waits[1], to=releases)) is not None:
        return f"{one} releases a slot before wgmma.wait_group 1"
    tiles = [one for one in program.find("wgmma.wait_group") if one.operands == "0"]
    loops = program.between(multiplies, tiles)
    last = [one for one in releases if one.index not in loops]
    if (one := program.escape(multiplies, guards=waits[0], to=last)) is not None:
        return f"{one} releases the last slot before wgmma.wait_group 0"
    return None


def ring(code: Code, config: TileConfig | None) -> str | None:
    """Every pass through a loop that copies into the ring, or multiplies from it, waits for an mbarrier."""
    program = parse(code.ptx)
    waits = program.find("mbarrier.try_wait", "mbarrier.test_wait")
    loads = [one for one in program.find("cp.async.bulk.tensor") if "mbarrier" in one.op]
    if not loads:
        return None
    for one in (*loads, *program.find("wgmma.mma_async")):
        if program.escape([one], guards=waits, to=[one]):
            return f"{_short(one)} is repeated without a wait for an mbarrier"
        if program.escape_entry(guards=waits, to=[one]):
            return f"{_short(one)} comes before the first wait for an mbarrier"
    return None


def _accumulators(program: Program, multiplies: Iterable[Instruction]) -> set[str]:
    """The registers that products are added to, and their copies."""
    sums = {register for one in multiplies for register in registers(split(one.operands)[0])}
    copies = program.find("mov")
    while more := {r for one in copies if sums.intersection(_read(one)) for r in written(one)} - sums:
        sums |= more
    return sums


def _read(one: Instruction) -> list[str]:
    """The registers that an instruction reads."""
    return registers(one.operands if not written(one) else ",".join(split(one.operands)[1:]))


def _short(one: Instruction) -> str:
    return f"{one.op} ({one.lines[0][0]}, line {one.lines[0][1]})" if one.lines else one.op
