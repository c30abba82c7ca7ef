"""The result for a generated mutant, and the score of many by file and by rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

ENDINGS = ("killed", "survived", "equivalent", "triaged", "needs a GPU", "not applicable")
"""The first two count; the others were not run, or change nothing."""


@dataclass(frozen=True)
class GeneratedVerdict:
    """The result for one generated mutant."""

    name: str
    file: str
    line: int
    rule: str
    before: str  # the changed lines as one line, without and with the fault
    after: str
    ending: str  # one of ENDINGS
    by: str | None = None  # the property that caught it
    how: str | None = None  # differs, crash, compile or timeout
    evidence: str = ""  # the example that shows it; or the reason why it does not count
    tried: dict[str, int] = field(default_factory=dict)  # examples of each property
    seconds: float = 0.0
    compared: bool = False  # of a survivor: its compiled code was compared

    @property
    def command(self) -> str:
        """The command that runs this mutant alone."""
        return f"int8kit verify mutate --only {self.name}"


def score(verdicts: Iterable[GeneratedVerdict]) -> dict[str, Any]:
    """The counts of endings and the score, killed / (killed + survived), of all, of each file and of each rule."""
    verdicts = list(verdicts)
    files = sorted({verdict.file for verdict in verdicts})
    rules = sorted({verdict.rule for verdict in verdicts})
    return {
        **_counts(verdicts),
        "by_file": {file: _counts(v for v in verdicts if v.file == file) for file in files},
        "by_rule": {rule: _counts(v for v in verdicts if v.rule == rule) for rule in rules},
    }


def _counts(verdicts: Iterable[GeneratedVerdict]) -> dict[str, Any]:
    count = Counter(verdict.ending for verdict in verdicts)
    ran = count["killed"] + count["survived"]
    return {**{ending: count[ending] for ending in ENDINGS}, "score": count["killed"] / ran if ran else None}
