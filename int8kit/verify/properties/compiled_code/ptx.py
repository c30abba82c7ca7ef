"""Text of a compiled kernel as instructions, the paths between them, and the source functions that they come from.

    program = parse(ptx)
    program.escape(stores, guards=barriers, to=counters)    a counter that a path from a store reaches past no barrier

A path follows branches, whatever their predicates are. So a rule that holds on every path holds in every run. It may
fail on a path that no run takes; the kernels have none of these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

_STATEMENT = re.compile(
    r"(?P<loc>\.loc[^\n]*)|//[^\n]*|(?P<label>[$%\w]+):(?!:)|(?P<open>\{)|(?P<close>\})"
    r"|(?P<directive>\.[a-z][^;]*);|(?:@(?P<guard>!?[\w%$]+)\s+)?(?P<op>[a-z][\w.:]*)(?P<operands>[^;]*);"
)
_LINE = re.compile(r"(\w+\.py):(\d+):\d+")


@dataclass(frozen=True)
class Instruction:
    """One instruction. `lines` are its source lines: of the innermost inlined function first, each (file, line)."""

    index: int
    guard: str  # "%p1" or "!%p1" if a predicate decides whether it is executed, else ""
    op: str  # with its modifiers, as "ld.global.cg.b32"
    operands: str
    lines: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        where = f" ({self.lines[0][0]}, line {self.lines[0][1]})" if self.lines else ""
        operands = self.operands if len(self.operands) < 60 else self.operands[:57] + "..."
        return f"{'@' + self.guard + ' ' if self.guard else ''}{self.op} {operands}".strip() + where

    def starts(self, *names: str) -> bool:
        """Whether the operation is one of `names`, with any further modifiers."""
        return any(self.op == name or self.op.startswith(name + ".") for name in names)


@dataclass(frozen=True)
class Program:
    """The instructions of a kernel in their order, and for each the indices of those that may follow it."""

    instructions: tuple[Instruction, ...]
    following: tuple[tuple[int, ...], ...]

    def find(self, *names: str) -> list[Instruction]:
        """All instructions of these operations: see `Instruction.starts`."""
        return [one for one in self.instructions if one.starts(*names)]

    def escape(
        self, start: Iterable[Instruction], *, guards: Iterable[Instruction], to: Iterable[Instruction]
    ) -> Instruction | None:
        """The first of `to` that a path from behind a start reaches past no guard; None if there is none.

        A guard with a predicate guards nothing; an atomic operation, which one thread of a group executes, does.
        """
        return self._reach([after for one in start for after in self.following[one.index]], self._closed(guards), to)

    def escape_entry(self, *, guards: Iterable[Instruction], to: Iterable[Instruction]) -> Instruction | None:
        """The first of `to` that a path from the kernel's entry reaches past no guard; None if there is none."""
        return self._reach([0], self._closed(guards), to)

    def _closed(self, guards: Iterable[Instruction]) -> set[int]:
        return {
            one.index
            for one in guards
            if not one.guard or (one.starts("atom", "red") and self.is_of_thread(one.guard.lstrip("!")))
        }

    def _reach(self, todo: list[int], closed: set[int], to: Iterable[Instruction]) -> Instruction | None:
        wanted = {one.index for one in to}
        seen: set[int] = set()
        found: set[int] = set()
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            if at in wanted:
                found.add(at)
            if at not in closed:
                todo += self.following[at]
        return self.instructions[min(found)] if found else None

    def between(self, ones: Iterable[Instruction], cuts: Iterable[Instruction]) -> set[int]:
        """The indices of all instructions on loops through `ones` that pass none of `cuts`."""
        cut = {one.index for one in cuts}
        back: dict[int, list[int]] = defaultdict(list)
        for at, after in enumerate(self.following):
            for one in after:
                back[one].append(at)
        ends = [one.index for one in ones]
        return _closure(ends, self.following, cut) & _closure(ends, back, cut)

    @cached_property
    def definitions(self) -> dict[str, list[Instruction]]:
        """The instructions that write each register. A store or a branch writes none."""
        found = defaultdict(list)
        for one in self.instructions:
            for register in written(one):
                found[register].append(one)
        return found

    def address_origins(self, one: Instruction) -> set[str]:
        """The parameters that decide the address in an instruction's operands."""
        found = re.search(r"\[([^\]]*)\]", one.operands)
        return set().union(*map(self.origins, registers(found[1]))) if found else set()

    def is_of_thread(self, register: str) -> bool:
        """Whether a register's value depends on the number of the thread and on nothing else."""
        todo, seen = [register], set[str]()
        while todo:
            name = todo.pop()
            definitions = self.definitions.get(name, [])
            if not definitions or any(
                one.starts("ld", "atom") or re.search(r"_param_|%n?ctaid|%clock", one.operands) for one in definitions
            ):
                return False
            seen.add(name)
            todo += [other for one in definitions for other in registers(one.operands) if other not in seen]
        return True

    def origins(self, register: str) -> set[str]:
        """The names of the kernel's parameters that decide a register's value, through any number of instructions."""
        todo, seen, found = [register], set(), set[str]()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            for one in self.definitions.get(name, ()):
                found |= set(re.findall(r"\w+_param_\d+", one.operands))
                todo += [other for other in registers(one.operands) if other not in seen]
        return found


def _closure(start: list[int], following: Sequence[Iterable[int]] | Mapping[int, list[int]], cut: set[int]) -> set[int]:
    """All places that a path of at least one step from `start` reaches without passing `cut`."""
    seen: set[int] = set()
    todo = [after for one in start for after in following[one]]
    while todo:
        at = todo.pop()
        if at not in seen and at not in cut:
            seen.add(at)
            todo += following[at]
    return seen


def split(operands: str) -> list[str]:
    """The operands in a text; a vector in braces and an address in brackets are one each."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)]


def registers(operands: str) -> list[str]:
    """The names of registers in a text of operands."""
    return re.findall(r"%[a-z]+\d+", operands)


def written(one: Instruction) -> list[str]:
    """The registers that an instruction writes: its first operand, or the vector or pair that stands there."""
    if one.starts("st", "bra", "brx", "bar", "barrier", "stmatrix", "red", "cp", "fence", "mbarrier", "ret"):
        return []
    first = re.match(r"\s*(\{[^}]*\}|[^,]*)", one.operands)
    return registers(first[1]) if first else []


@lru_cache(maxsize=64)
def parse(ptx: str) -> Program:
    """The program of the kernel in `ptx`, which has one entry function."""
    found: list[Instruction] = []
    scopes: list[int] = []
    opened = 0
    scope_of: list[tuple[int, ...]] = []
    labels: dict[tuple[int, str], int] = {}
    tables: dict[str, list[str]] = {}
    label, lines = "", tuple[tuple[str, int], ...]()
    for match in _STATEMENT.finditer(ptx, ptx.index("{", ptx.index(".entry"))):
        if match["open"]:
            scopes.append(opened := opened + 1)
        elif match["close"]:
            scopes.pop()
            if not scopes:
                break
        elif match["loc"]:
            lines = tuple((file, int(line)) for file, line in _LINE.findall(match["loc"]))
        elif match["label"]:
            label = match["label"]
            labels[scopes[-1], label] = len(found)
        elif match["directive"]:
            if match["directive"].startswith(".branchtargets"):
                tables[label] = re.findall(r"[$\w]+", match["directive"].removeprefix(".branchtargets"))
        elif match["op"]:
            operands = " ".join(match["operands"].split())
            found.append(Instruction(len(found), match["guard"] or "", match["op"], operands, lines))
            scope_of.append(tuple(scopes))
    following = tuple(_following(one, scope_of[one.index], labels, tables, len(found)) for one in found)
    return Program(tuple(found), following)


def _following(
    one: Instruction,
    scopes: tuple[int, ...],
    labels: dict[tuple[int, str], int],
    tables: dict[str, list[str]],
    end: int,
) -> tuple[int, ...]:
    """The indices of the instructions that may follow `one`."""

    def place(name: str) -> int:
        return next(labels[scope, name] for scope in reversed(scopes) if (scope, name) in labels)

    target: tuple[int, ...] = ()
    after = (one.index + 1,) if one.index + 1 < end else ()
    if one.starts("bra"):
        target = (place(one.operands),)
    elif one.starts("brx"):
        target = tuple(place(name) for name in tables[one.operands.split(",")[1].strip()])
    elif not one.starts("ret", "exit"):
        return after
    return target + after if one.guard else target
