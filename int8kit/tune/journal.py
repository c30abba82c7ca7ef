"""Journal of a tuning run: the finished steps, one line each, so that a killed run can be resumed by the same command.

    {"format": "int8kit.journal/2", "run": {"gpu": "rtx3090", "source": "proxy", "card": "NVIDIA H200", ...}}
    {"compiled": {"config": {"block_m": 128, ...}, "even_k": true, "resources": {"registers": 168, ...}}}
    {"compiled": {"config": {"block_m": 256, ...}, "failed": "crash: the compiler ended its process"}}
    {"wrong": {"m": 4096, "n": 4608, "k": 4608, "config": {...}, "reason": "compile: ..."}}
    {"timed": {"m": 4096, "n": 4608, "k": 4608, "round": 0, "times": [[{...}, 198.1, 198.4, 199.0], ...]}}
    {"chosen": {"m": 4096, "n": 4608, "k": 4608, ...}}                                          a database's entry

"round" is null for the sustained round. "even_k" is there only for the Triton kernel; in a row of another kernel, which
earlier versions wrote with it, it is ignored. "swiglu" is there, and true, only for that epilogue.

The file lies beside the database, `<name>.journal`. A line is on the disk before the next step begins, so a kill loses
only the unfinished steps. A shape's round is one step, since its times compare only with each other. An incomplete last
line is dropped.

The journal of another run (another GPU, Triton, kernel or policy) is replaced. The journal of a finished run is
removed. A lock lets one tuner at a time write a database and refuses a second one. The lock ends with its process.

Rejected: the database itself as the journal. It holds the chosen configurations and not the tried ones, and a new run
must not take yesterday's entries for its own.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pydantic import ValidationError

from int8kit import files, locks
from int8kit.database import store
from int8kit.database.schema import Entry, Resources
from int8kit.errors import FileError, InputError
from int8kit.spec import GemmShape, Kernel, SwigluShape, TileConfig, config_from
from int8kit.timing.interleave import Times
from int8kit.tune.search import ShapeHistory
from int8kit.tune.space import Compilation, KernelVariant, kernel_variant

FORMAT = "int8kit.journal/2"


class Journal:
    """Journal of one run, as a context manager. The attributes hold the finished steps, an earlier run's included.

    Before the block it has the lock and the finished steps, and has written nothing. `close` gives the lock back.
    """

    def __init__(self, database: Path, run_key: dict[str, Any]) -> None:
        """run_key: everything that makes the results of two runs comparable, as plain JSON.

        Raises FileError if another tuner writes `database`, or if the journal is damaged or no file.
        """
        self.path = database.with_name(f"{database.name}.journal")
        self.compiled: dict[KernelVariant, Compilation] = {}
        self.rejected: dict[tuple[GemmShape, TileConfig], str] = {}
        self.histories: dict[GemmShape, ShapeHistory] = {}
        self.chosen: dict[GemmShape, Entry] = {}
        self._head = {"format": FORMAT, "run": run_key}
        self._file: TextIO | None = None
        self._lock = store.lock_of(self.path, timeout=0)
        try:
            self._lock.acquire()
        except locks.Held as error:
            raise FileError(
                f"another tuner is writing {str(database)!r}; wait for it, or name another file with --output"
                f"{error.left_over}"
            ) from None
        try:
            self._kept = self._earlier()  # bytes of the file that stay; None: it is replaced
        except BaseException:
            self._lock.release()
            raise

    def add_compiled(self, kernel: KernelVariant, compilation: Compilation) -> None:
        """Resources of a kernel, or why it does not compile."""
        row: dict[str, Any] = {"config": asdict(kernel.config)}
        if kernel.even_k is not None:
            row["even_k"] = kernel.even_k
        if kernel.swiglu:
            row["swiglu"] = True
        if isinstance(compilation, Resources):
            row["resources"] = compilation.model_dump()
        else:
            row["failed"] = compilation
        self.compiled[kernel] = compilation
        self._write({"compiled": row})

    def add_rejected(self, shape: GemmShape, config: TileConfig, reason: str) -> None:
        """A configuration that was launched and rejected; the reason begins with its class."""
        self._reject(shape, config, reason)
        self._write({"wrong": {**_row_of(shape), "config": asdict(config), "reason": reason}})

    def add_timed(self, shape: GemmShape, number: int | None, times: dict[TileConfig, Times]) -> None:
        """The next round of one shape; number: None for the sustained round."""
        self._timed(shape, number, times)
        rows = [[asdict(config), t.p20, t.p50, t.p80] for config, t in times.items()]
        self._write({"timed": {**_row_of(shape), "round": number, "times": rows}})

    def history(self, shape: GemmShape) -> ShapeHistory:
        """The timings of a shape so far."""
        return self.histories.setdefault(shape, ShapeHistory(shape))

    def _reject(self, shape: GemmShape, config: TileConfig, reason: str) -> None:
        self.rejected[shape, config] = self.history(shape).rejected[config] = reason

    def _timed(self, shape: GemmShape, number: int | None, times: dict[TileConfig, Times]) -> None:
        history = self.history(shape)
        if number is None:
            history.sustained = times
        elif number != len(history.rounds):
            raise ValueError(f"round {number} of {shape} after {len(history.rounds)} rounds")
        else:
            history.rounds.append(times)

    def add_chosen(self, entry: Entry) -> None:
        """The entry of one shape, which ends its search."""
        self.chosen[entry.tuned] = entry
        self._write({"chosen": entry.model_dump(mode="json", exclude_none=True)})

    def finish(self) -> None:
        """Remove the file: the run is complete."""
        self._close_file()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock."""
        self._close_file()
        self._lock.release()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Journal:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _earlier(self) -> int | None:
        """Take over the steps of an interrupted run -> the length of its complete lines. None without such a run."""
        if (kind := files.kind_of(self.path)) is not None:
            raise FileError(f"cannot write {str(self.path)!r}: it is a {kind}; remove it, or name another --output")
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        except OSError as error:
            raise self._cannot_write(error) from None
        if len(lines) < 2 or _json(lines[0]) != self._head:
            return None
        whole = lines[:-1]  # after the last line break there is an incomplete line, or nothing
        for number, line in enumerate(whole[1:], 2):
            self._replay(line, number)
        return sum(len(line) + 1 for line in whole)

    def _open(self) -> None:
        """Open the file at its end: the interrupted run's, else a new one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._kept is not None:
                os.truncate(self.path, self._kept)
            self._file = self.path.open("w" if self._kept is None else "a", encoding="utf-8")
        except OSError as error:
            raise self._cannot_write(error) from None
        if self._kept is None:
            self._write(self._head)

    def _cannot_write(self, error: OSError) -> FileError:
        return FileError(f"cannot write {str(self.path)!r} ({error.strerror}); name another --output")

    def _replay(self, line: bytes, number: int) -> None:
        try:
            document = json.loads(line)
            ((kind, row),) = document.items()
            if kind == "compiled":
                compilation = row["failed"] if "failed" in row else Resources.model_validate(row["resources"])
                config = config_from(row["config"])
                even_k = bool(row["even_k"]) if config.kernel is Kernel.TRITON else True
                self.compiled[kernel_variant(config, even_k, bool(row.get("swiglu")))] = compilation
            elif kind == "wrong":
                self._reject(_shape_of(row), config_from(row["config"]), row["reason"])
            elif kind == "timed":
                times = {config_from(config): Times(*map(float, us)) for config, *us in row["times"]}
                self._timed(_shape_of(row), row["round"], times)
            else:
                entry = Entry.model_validate(document["chosen"])
                self.chosen[entry.tuned] = entry
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError, InputError):
            raise FileError(
                f"{str(self.path)!r} is damaged in line {number}; delete it to start the run again, the database stays"
            ) from None

    def _write(self, document: dict[str, Any]) -> None:
        assert self._file is not None, "outside the block"
        self._file.write(json.dumps(document) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _row_of(shape: GemmShape) -> dict[str, Any]:
    return asdict(shape) | ({"swiglu": True} if isinstance(shape, SwigluShape) else {})


def _shape_of(row: dict[str, Any]) -> GemmShape:
    return (SwigluShape if row.get("swiglu") else GemmShape)(row["m"], row["n"], row["k"])


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
