"""Examples that have failed once: later runs begin with them, since what broke once breaks again.

    {"property": "output", "subject": "int8kit", "example": {"shape": {"m": 1, ...}, "config": {...}, ...}}

A line each, in the user's data folder, the newest last, at most MOST. A line that this version cannot read is passed
over: the file is a help and no database. Hypothesis' own example database was rejected: it keeps bytes that say nothing
to a person and that another version of the strategies reads as something else.
"""

from __future__ import annotations

import json
from pathlib import Path

import platformdirs

from int8kit import files
from int8kit.errors import InputError
from int8kit.verify.examples.strategies import Draw, from_json, to_json

MOST = 200


def path() -> Path:
    """Where the examples are kept."""
    return Path(platformdirs.user_data_dir("int8kit")) / "examples.jsonl"


def load(name: str, subject: str = "int8kit") -> tuple[Draw, ...]:
    """What broke property `name` of `subject` before, the newest first."""
    found = (draw for kind, of, draw in _read() if (kind, of) == (name, subject))
    return tuple(found)[::-1]


def add(name: str, example: str, subject: str = "int8kit") -> None:
    """Keep an example, as `to_json` writes it. Raises FileError if the folder cannot be written."""
    rows = [row for row in _read() if (row[0], row[1], to_json(row[2])) != (name, subject, example)]
    rows = [*rows, (name, subject, from_json(example))][-MOST:]
    lines = (
        json.dumps({"property": kind, "subject": of, "example": json.loads(to_json(d))}) + "\n" for kind, of, d in rows
    )
    path().parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path(), "".join(lines))


def _read() -> list[tuple[str, str, Draw]]:
    try:
        lines = path().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append((str(row["property"]), str(row["subject"]), from_json(json.dumps(row["example"]))))
        except (ValueError, TypeError, KeyError, AttributeError, InputError):
            continue
    return rows
