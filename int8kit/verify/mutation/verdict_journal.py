"""Journal of generated mutants: a line for each verdict as it comes, so that a killed run is resumed by its command.

    {"format": "int8kit.mutants/1", "run": {"source": "9c2f...", "on": "NVIDIA H200", ...}}
    {"sound": ["accumulator", [...]]}                          a property that the unchanged copy has
    {"verdict": {"name": "gemm_triton:61:38:mask", "ending": "killed", "by": "accumulator", ...}}

The file lies beside the output, or in the user's cache folder under the hash of its head. There the parts of a sample
and the samples of other seeds share it. A later line about a mutant replaces an earlier one. An incomplete last line is
dropped. The journal of another source, executor or version of Triton is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import platformdirs

from int8kit.errors import FileError
from int8kit.verify.mutation.verdict import GeneratedVerdict

FORMAT = "int8kit.mutants/1"


class VerdictJournal:
    """The verdicts of earlier runs with the same head, and the place for new ones."""

    def __init__(self, output: Path | None, identity: dict[str, Any]) -> None:
        """output: the file of the run's document, or None. identity: all that makes verdicts comparable."""
        head = json.dumps({"format": FORMAT, "run": identity}, sort_keys=True)
        cache = Path(platformdirs.user_cache_dir("int8kit"), "mutants")
        self.path = (
            output.with_name(f"{output.name}.journal")
            if output is not None
            else cache / f"{hashlib.sha256(head.encode()).hexdigest()[:16]}.jsonl"
        )
        self.verdicts: dict[str, GeneratedVerdict] = {}
        self.sound: set[str] = set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(head)
        except OSError as error:
            raise FileError(f"cannot write {str(self.path)!r} ({error.strerror}); name another --output") from None

    def add(self, verdict: GeneratedVerdict) -> None:
        """The verdict on a mutant."""
        self.verdicts[verdict.name] = verdict
        self._append({"verdict": asdict(verdict)})

    def add_sound(self, trial: str) -> None:
        """A trial of the unchanged copy that passed."""
        self.sound.add(trial)
        self._append({"sound": trial})

    def _open(self, head: str) -> None:
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        if len(lines) < 2 or lines[0] != head.encode():
            self.path.write_text(head + "\n", encoding="utf-8")
            return
        os.truncate(self.path, sum(len(line) + 1 for line in lines[:-1]))
        for number, line in enumerate(lines[1:-1], 2):
            try:
                ((kind, value),) = json.loads(line).items()
                if kind == "sound":
                    self.sound.add(str(value))
                else:
                    verdict = GeneratedVerdict(**value)
                    self.verdicts[verdict.name] = verdict
            except (ValueError, TypeError, AttributeError):
                raise FileError(f"{str(self.path)!r} is damaged in line {number}; delete it to start again") from None

    def _append(self, document: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(document) + "\n")
