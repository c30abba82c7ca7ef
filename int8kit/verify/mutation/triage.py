"""Mutants that a person has judged equivalent: `triage.json`, keyed by text, so that it survives moves of lines.

    {"file": "kernels/operands.py", "old": "1", "new": "2", "line": "GemmShape(max(m, 1), n, k)", "reason": "..."}

`line` is the first line of the place, without spaces around it. Such a mutant is not run and does not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from int8kit.verify.mutation.generate import GeneratedMutant

PATH = Path(__file__).with_name("triage.json")
MOST = 0.1  # of the mutants of a run


class Judgement(NamedTuple):
    """One row of the list."""

    file: str
    old: str
    new: str
    line: str
    reason: str

    def matches(self, mutant: GeneratedMutant) -> bool:
        """Whether the row is about `mutant`."""
        return (mutant.file, mutant.old, mutant.new, mutant.context) == self[:4]


@cache
def judgements() -> tuple[Judgement, ...]:
    """All rows of the list."""
    return tuple(Judgement(**row) for row in json.loads(PATH.read_text(encoding="utf-8")))


def reason(mutant: GeneratedMutant, rows: Iterable[Judgement] | None = None) -> str | None:
    """Why a person judged the mutant equivalent, or None."""
    listed = judgements() if rows is None else rows
    return next((row.reason for row in listed if row.matches(mutant)), None)
