"""What a run of the tuner has done, a line at a time: kill it at any moment, and the same command goes on from there.

    {"format": "int8kit.journal/2", "run": {"gpu": "rtx3090", "source": "proxy", "card": "NVIDIA H200", ...}}
    {"compiled": {"config": {"block_m": 128, ...}, "even_k": true, "resources": {"registers": 168, ...}}}
    {"compiled": {"config": {"block_m": 256, ...}, "even_k": true, "failed": "crash: the compiler ended its process"}}
    {"wrong": {"m": 4096, "n": 4608, "k": 4608, "config": {...}, "reason": "compile: ..."}}
    {"timed": {"m": 4096, "n": 4608, "k": 4608, "round": 0, "times": [[{...}, 198.1, 198.4, 199.0], ...]}}   null: hot
    {"chosen": {"m": 4096, "n": 4608, "k": 4608, ...}}                                          a database's entry

The file lies beside the database, `<name>.journal`. A line is on the disk before the next thing is begun, so that a
kill costs what was under way, of timings one shape's round, which compare only within it; a last line that was cut off
is dropped. The journal of another run (another card, Triton, kernel or policy) is begun anew, and that of a finished
one removed. One tuner at a time writes a database: a second is refused while the first one lives, by a lock that dies
with its process.

Rejected: the database itself as the journal. It holds what was chosen, not what was tried, and a run that was asked
for anew must not take yesterday's entries for its own.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import filelock
from pydantic import ValidationError

from int8kit.database import store
from int8kit.database.schema import Entry, Resources
from int8kit.errors import FileError, InputError
from int8kit.spec import GemmShape, TileConfig, config_from
from int8kit.timing.interleave import Times
from int8kit.tune.search import Trail
from int8kit.tune.workers import Job, Outcome

FORMAT = "int8kit.journal/2"


class Journal:
    """Of one run; use as a context manager. What an earlier, killed run had done is in the attributes."""

    def __init__(self, database: Path, run: dict[str, Any]) -> None:
        """run: what makes results comparable, plain JSON. Raises FileError if another tuner writes `database`."""
        self.path = database.with_name(f"{database.name}.journal")
        self.compiled: dict[Job, Outcome] = {}
        self.wrong: dict[tuple[GemmShape, TileConfig], str] = {}
        self.trails: dict[GemmShape, Trail] = {}
        self.chosen: dict[GemmShape, Entry] = {}
        self._lock = store.lock_of(self.path, timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise FileError(
                f"another tuner is writing {str(database)!r}; wait for it, or name another file with --output"
            ) from None
        try:
            self._file = self._open({"format": FORMAT, "run": run})
        except BaseException:
            self._lock.release()
            raise

    def add_compiled(self, job: Job, outcome: Outcome) -> None:
        """What a kernel takes, or why there is none."""
        config, even_k = job
        row: dict[str, Any] = {"config": asdict(config), "even_k": even_k}
        if isinstance(outcome, Resources):
            row["resources"] = outcome.model_dump()
        else:
            row["failed"] = outcome
        self.compiled[job] = outcome
        self._write({"compiled": row})

    def add_wrong(self, shape: GemmShape, config: TileConfig, reason: str) -> None:
        """A configuration that was launched and is out, with its class and reason."""
        self._wrong(shape, config, reason)
        self._write({"wrong": {**asdict(shape), "config": asdict(config), "reason": reason}})

    def add_timed(self, shape: GemmShape, number: int | None, times: dict[TileConfig, Times]) -> None:
        """One shape's round, the next one, or with None the hot one."""
        self._timed(shape, number, times)
        rows = [[asdict(config), t.p20, t.p50, t.p80] for config, t in times.items()]
        self._write({"timed": {**asdict(shape), "round": number, "times": rows}})

    def trail(self, shape: GemmShape) -> Trail:
        """What is known of a shape."""
        return self.trails.setdefault(shape, Trail(shape))

    def _wrong(self, shape: GemmShape, config: TileConfig, reason: str) -> None:
        self.wrong[shape, config] = self.trail(shape).wrong[config] = reason

    def _timed(self, shape: GemmShape, number: int | None, times: dict[TileConfig, Times]) -> None:
        trail = self.trail(shape)
        if number is None:
            trail.hot = times
        elif number != len(trail.rounds):
            raise ValueError(f"round {number} of {shape} after {len(trail.rounds)}")
        else:
            trail.rounds.append(times)

    def add_chosen(self, entry: Entry) -> None:
        """The end of one shape."""
        self.chosen[entry.shape] = entry
        self._write({"chosen": entry.model_dump(mode="json", exclude_none=True)})

    def finish(self) -> None:
        """The run is over: nothing to go on from."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._lock.release()

    def _open(self, head: dict[str, Any]) -> TextIO:
        """The file, open at its end: the old one if it is of this run, else a new one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
            if len(lines) > 1 and _json(lines[0]) == head:
                whole = lines[:-1]  # what follows the last line break was cut off, or is nothing
                for number, line in enumerate(whole[1:], 2):
                    self._replay(line, number)
                with self.path.open("r+b") as whole_lines:
                    whole_lines.truncate(sum(len(line) + 1 for line in whole))
                return self.path.open("a", encoding="utf-8")
            file = self.path.open("w", encoding="utf-8")
        except OSError as error:
            raise FileError(f"cannot write {str(self.path)!r} ({error.strerror}); name another --output") from None
        self._file = file
        self._write(head)
        return file

    def _replay(self, line: bytes, number: int) -> None:
        try:
            document = json.loads(line)
            ((kind, row),) = document.items()
            if kind == "compiled":
                outcome = row["failed"] if "failed" in row else Resources.model_validate(row["resources"])
                self.compiled[config_from(row["config"]), bool(row["even_k"])] = outcome
            elif kind == "wrong":
                self._wrong(GemmShape(row["m"], row["n"], row["k"]), config_from(row["config"]), row["reason"])
            elif kind == "timed":
                times = {config_from(config): Times(*map(float, us)) for config, *us in row["times"]}
                self._timed(GemmShape(row["m"], row["n"], row["k"]), row["round"], times)
            else:
                entry = Entry.model_validate(document["chosen"])
                self.chosen[entry.shape] = entry
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError, InputError):
            raise FileError(
                f"{str(self.path)!r} is damaged in line {number}; delete it to begin the run anew, the database stays"
            ) from None

    def _write(self, document: dict[str, Any]) -> None:
        self._file.write(json.dumps(document) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
