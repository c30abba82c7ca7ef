"""Stored examples that have failed once. Later runs try them first, because a fault often returns.

    {"property": "output", "implementation": "int8kit", "example": {"shape": {"m": 1, ...}, "config": {...}, ...}}

The file is in the user's data folder: one line for each example, the newest last, at most MAX_EXAMPLES lines. A line
that this version cannot read is skipped, because the file is an aid and not a database. Earlier versions wrote
"subject" for "implementation". Hypothesis' own example database was rejected: a person cannot read its bytes, and
another version of the strategies reads them as another example.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import platformdirs

from int8kit import files
from int8kit.errors import InputError
from int8kit.verify.examples.encoding import from_json, to_json

MAX_EXAMPLES = 200


def path() -> Path:
    """The file that holds the examples."""
    return Path(platformdirs.user_data_dir("int8kit")) / "examples.jsonl"


def load(name: str, implementation: str = "int8kit") -> tuple[Any, ...]:
    """The examples that broke property `name` of `implementation` in earlier runs, the newest first."""
    found = (example for kind, of, example in _read() if (kind, of) == (name, implementation))
    return tuple(found)[::-1]


def add(name: str, example: str, implementation: str = "int8kit") -> None:
    """Store an example, as `to_json` writes it. Raises FileError if the folder cannot be written."""
    rows = [row for row in _read() if (row[0], row[1], to_json(row[2])) != (name, implementation, example)]
    rows = [*rows, (name, implementation, from_json(example))][-MAX_EXAMPLES:]
    lines = (
        json.dumps({"property": kind, "implementation": of, "example": json.loads(to_json(one))}) + "\n"
        for kind, of, one in rows
    )
    path().parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path(), "".join(lines))


def _read() -> list[tuple[str, str, Any]]:
    try:
        lines = path().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            of = row["implementation"] if "implementation" in row else row["subject"]
            rows.append((str(row["property"]), str(of), from_json(json.dumps(row["example"]))))
        except (ValueError, TypeError, KeyError, AttributeError, InputError):
            continue
    return rows
