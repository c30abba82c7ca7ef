"""Generated mutants: every place where a rule makes a fault, and the sample of a run.

    sample(300, seed=0)                    -> 300 of several thousand, of every rule and file
    part(mutants, 2, 4)                    -> the second of four parts
    find("gemm_triton:61:38:mask")         -> the mutant of that name

The sample is deterministic in the seed and the source. A mutant's place in the order is a hash of its own text, so an
edit of one file leaves the choice in the other files. Each rule and each file gets its quota first, one thirtieth of
the sample, and all places where there are fewer.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from int8kit.errors import UnknownName
from int8kit.verify.mutation import sources
from int8kit.verify.mutation.parsed import Parsed
from int8kit.verify.mutation.rules import RULES, Edit

PACKAGE = Path(__file__).parent.parent.parent
QUOTA = 30  # one mutant of so many for each rule and each file


@dataclass(frozen=True, order=True)
class GeneratedMutant:
    """One replacement in one file, made by a rule."""

    name: str  # stem, line, column and rule; a number where a rule has several replacements at one place
    file: str
    rule: str
    line: int
    function: str  # around the place; or the constant
    start: int  # bytes of the file
    end: int
    old: str
    new: str
    context: str  # the first line of the place, without spaces around it
    device: bool  # the code is compiled by Triton
    gpu_alone: bool = False  # no CPU executes the place
    interpreter_alone: bool = False  # no GPU executes the place

    def __str__(self) -> str:
        return f"int8kit/{self.file}:{self.line}"

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return sources.stem(self.file)

    def applied(self, text: str) -> str:
        """`text` of the file with the fault."""
        data = text.encode()
        assert data[self.start : self.end].decode() == self.old
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()

    def diff(self, text: str) -> tuple[str, str]:
        """The lines of the place, without and with the fault, as one line each."""
        data = text.encode()
        first, last = data.rfind(b"\n", 0, self.start) + 1, data.find(b"\n", self.end)
        lines = data[first:last].decode(), data[first : self.start].decode() + self.new + data[self.end : last].decode()
        before, after = (" ".join(line.split()) for line in lines)
        return before, after


def read(file: str) -> str:
    """The source of a file of the package."""
    return (PACKAGE / file).read_text(encoding="utf-8")


@cache
def places(file: str, text: str) -> tuple[GeneratedMutant, ...]:
    """Every replacement that a rule makes in a file, in the order of its source. `is_program` says which can run."""
    parsed, found, seen = parse(file, text), [], set[Edit]()
    names = Counter[str]()
    for node in parsed.mutable_nodes():
        for rule_name, rule in RULES.items():
            for edit in rule(parsed, node):
                if edit in seen or parsed.between(edit.start, edit.end) == edit.new:
                    continue
                seen.add(edit)
                found.append(_mutant(parsed, node, rule_name, edit, names))
    return tuple(found)


def every() -> Iterator[GeneratedMutant]:
    """The mutants of all files."""
    for file in sources.FILES:
        yield from places(file, read(file))


def find(name: str) -> GeneratedMutant:
    """The mutant of this name. Raises UnknownName with the files if there is none."""
    stem = name.partition(":")[0]
    file = next((file for file in sources.FILES if sources.stem(file) == stem), None)
    if file is None:
        raise UnknownName("file of mutants", stem, map(sources.stem, sources.FILES))
    listed = {mutant.name: mutant for mutant in places(file, read(file))}
    if name not in listed:
        line = name.split(":")[1] if ":" in name else ""
        near = [other for other in listed if other.split(":")[1] == line]
        raise UnknownName("mutant", name, near or [f"{stem}:LINE:COLUMN:RULE"])
    return listed[name]


def sample(
    count: int, seed: int, *, kernels: Iterable[str] = (), rules: Iterable[str] = ()
) -> tuple[GeneratedMutant, ...]:
    """`count` mutants, or all if there are fewer. kernels: stems of files; rules: names of RULES; all by default."""
    stems = [sources.stem(file) for file in sources.FILES]
    wanted = _known("kernel", kernels, stems), _known("rule", rules, list(RULES))
    able = [mutant for mutant in every() if mutant.stem in wanted[0] and mutant.rule in wanted[1]]
    return _stratified(_in_order(able, seed), count)


def part(mutants: Sequence[GeneratedMutant], number: int, of: int) -> tuple[GeneratedMutant, ...]:
    """Part `number` of `of`, from 1. The parts share no mutant and have the kinds of mutants in equal numbers."""
    return tuple(mutants[number - 1 :: of])


def counts(mutants: Iterable[GeneratedMutant]) -> tuple[Counter[str], Counter[str]]:
    """The number of mutants by file and by rule."""
    mutants = list(mutants)
    return Counter(m.file for m in mutants), Counter(m.rule for m in mutants)


def _stratified(ordered: Sequence[GeneratedMutant], count: int) -> tuple[GeneratedMutant, ...]:
    """Mutants in their order, but first the mutants whose file or rule has not reached its quota."""
    quota = count // QUOTA
    of_file, of_rule = Counter[str](), Counter[str]()
    left, chosen = list(ordered), list[GeneratedMutant]()

    def need(mutant: GeneratedMutant) -> int:
        return (of_file[mutant.file] < quota) + (of_rule[mutant.rule] < quota)

    while left and len(chosen) < count:
        best = max(left, key=need) if any(map(need, left)) else left[0]
        left.remove(best)
        if is_program(best):
            chosen.append(best)
            of_file[best.file] += 1
            of_rule[best.rule] += 1
    return tuple(chosen)


def _in_order(mutants: Iterable[GeneratedMutant], seed: int) -> list[GeneratedMutant]:
    """Mutants in an order by the seed, in which a rule of a file with four times the places comes twice as often."""
    cells: dict[tuple[str, str], list[GeneratedMutant]] = {}
    for mutant in mutants:
        cells.setdefault((mutant.file, mutant.rule), []).append(mutant)
    ranked = []
    for cell in cells.values():
        by_hash = sorted((_rank(mutant, seed), mutant) for mutant in cell)
        ranked += [((i + hash_[0] / 256) / len(cell) ** 0.5, hash_, m) for i, (hash_, m) in enumerate(by_hash)]
    return [mutant for *_, mutant in sorted(ranked)]


def _rank(mutant: GeneratedMutant, seed: int) -> bytes:
    text = f"{seed} {mutant.file} {mutant.function} {mutant.rule} {mutant.context} {mutant.old} {mutant.new}"
    return hashlib.sha256(text.encode()).digest() + mutant.start.to_bytes(8, "big")


def _known(what: str, names: Iterable[str], listed: list[str]) -> list[str]:
    for name in (names := list(names)):
        if name not in listed:
            raise UnknownName(what, name, listed)
    return names or listed


def _mutant(p: Parsed, node: ast.AST, rule: str, edit: Edit, names: Counter[str]) -> GeneratedMutant:
    line = p.line(edit.start)
    base = f"{sources.stem(p.file)}:{line}:{edit.start - p.starts[line - 1] + 1}:{rule}"
    names[base] += 1
    name = base if names[base] == 1 else f"{base}-{names[base]}"
    inside = next((one for one in p.up(node) if hasattr(one, "lineno")), node)
    function, old, context = p.qualified(inside), p.between(edit.start, edit.end), p.line_text(line)
    place = p.file, function, context, p.branches(edit.start, inside)
    return GeneratedMutant(
        name, p.file, rule, line, function, *edit[:2], old, edit.new, context, p.is_device(inside),
        "device=" in old
        or sources.runs_on_gpu_alone(*place)
        or sources.is_dtype_of_rows(p.file, p.between(edit.end, edit.end + 40)),
        "interpreter_fp32" in old or sources.runs_in_interpreter_alone(*place),
    )  # fmt: skip


def is_program(mutant: GeneratedMutant) -> bool:
    """Whether the mutant is Python, and another program than the original after its constants are computed."""
    p = parse(mutant.file, read(mutant.file))
    start, end = next(span for span in map(p.whole_span, p.tree.body) if span[0] <= mutant.start < span[1])
    data = p.bytes[start : mutant.start] + mutant.new.encode() + p.bytes[mutant.end : end]
    try:
        return normal(data.decode()) != normal(p.bytes[start:end].decode())
    except SyntaxError:
        return False


@cache
def parse(file: str, text: str) -> Parsed:
    """The parsed source of a file."""
    return Parsed(file, text)


@cache
def normal(text: str) -> str:
    """The syntax tree of `text` as text, with the operations of two numbers computed. Comments and layout are lost."""
    return ast.dump(_Folded().visit(ast.parse(text)))


class _Folded(ast.NodeTransformer):
    """Computes the operations of two numbers."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        a, b = getattr(node.left, "value", None), getattr(node.right, "value", None)
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            with contextlib.suppress(KeyError, ArithmeticError, TypeError):
                return ast.Constant(_COMPUTED[type(node.op)](a, b))
        return node


_COMPUTED: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow,
}  # fmt: skip
