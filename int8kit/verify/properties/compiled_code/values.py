"""Values of registers in thread 0: the places in shared memory that the code names, which no input decides.

Values(program).address("[%r298+9216]")  ->  25600, bytes from the start of the program's shared memory
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from int8kit.verify.properties.compiled_code.ptx import Instruction, Program, split

_BINARY: dict[str, Callable[[int, int], Any]] = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "min": min, "max": max, "mul": operator.mul, "shl": operator.lshift, "shr": operator.rshift,
    "rem": lambda a, b: a % b if b else None, "div": lambda a, b: a // b if b else None,
}  # fmt: skip
_COMPARED = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_SHARED = "global_smem"


class Values:
    """The values of a program's registers in thread 0, as far as constants decide them; all numbers are 0 or more.

    known: values of registers that are given, such as a loop's counter. in_first_round: a register with several
    definitions has the value of the first one that constants decide, as in the first round of a loop.
    """

    def __init__(
        self, program: Program, known: Mapping[str, int] | None = None, *, in_first_round: bool = False
    ) -> None:
        self._definitions = program.definitions
        self._most = 10**6 if in_first_round else 1  # definitions of a register that is followed
        self._found: dict[str, int | None] = dict(known or {})

    def address(self, operands: str) -> int | None:
        """The value of the first address in a text of operands."""
        found = re.search(r"\[([^\]]*)\]", operands)
        return self.of(found[1]) if found else None

    def of(self, text: str) -> int | None:
        """The value of an operand: a register, a number, the start of shared memory, or a sum of these."""
        terms = [self._term(term) for term in text.replace(" ", "").split("+")]
        return None if any(term is None for term in terms) else sum(term for term in terms if term is not None)

    def _term(self, term: str) -> int | None:
        if term in (_SHARED, "%tid.x", "%laneid"):
            return 0
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", term):
            return int(term, 0)
        if term not in self._found:
            self._found[term] = None  # of a value that depends on itself
            definitions = self._definitions.get(term, [])
            if len(definitions) <= self._most:
                values = (self._computed(one) for one in definitions)
                self._found[term] = next((value for value in values if value is not None), None)
        return self._found[term]

    def _computed(self, one: Instruction) -> int | None:
        name, *modifiers = one.op.split(".")
        operands = split(one.operands)[1:]
        if one.guard or name not in (*_BINARY, "mov", "cvt", "cvta", "not", "mad", "bfe", "setp", "selp", "shfl"):
            return None
        values = [self.of(operand) for operand in operands[: 1 if name == "shfl" else None]]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        if name in ("mov", "cvt", "cvta", "shfl"):
            return known[0]
        if name == "not":
            return 1 - known[0] if "pred" in modifiers else ~known[0]
        if name == "setp":
            return int(_COMPARED[modifiers[0]](*known)) if modifiers[0] in _COMPARED else None
        if name == "selp":
            return known[0] if known[2] else known[1]
        if name == "bfe":
            return known[0] >> known[1] & (1 << known[2]) - 1
        if name == "mad":
            return known[0] * known[1] + known[2]
        if name == "mul" and modifiers[0] == "hi":
            return known[0] * known[1] >> 32
        result: int | None = _BINARY[name](*known)
        return result
