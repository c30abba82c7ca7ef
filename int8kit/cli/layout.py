"""Layout of text and tables within the width of the terminal or 80 columns.

A table that is too wide first moves a column of equal values below it. Then it leaves out the columns that matter
least, and then it breaks a column of text between words. The JSON document of a verb holds everything.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

LEAST_ROOM = 10  # characters of a column of text, and a quarter of the narrowest screen


def screen_width() -> int:
    """Width to print in: COLUMNS, else the terminal's, else 80."""
    return max(shutil.get_terminal_size((80, 24)).columns, 40)


def count(number: int, noun: str, plural: str = "") -> str:
    """1 entry, 2 entries."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def wrapped(text: str) -> str:
    """`text` within the width, broken between words."""
    return "\n".join(broken(line, screen_width()) for line in text.split("\n"))


def broken(text: str, width: int) -> str:
    lines = textwrap.wrap(text, max(width, LEAST_ROOM), break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) or text


def fit(
    rows: Iterable[Sequence[Any]], head: Sequence[str], *, drop: Sequence[str] = (), wrap: str = "", left: str = ""
) -> str:
    """A table within the width.

    drop: columns to leave out where they do not fit, the least important first. wrap: the column of text to break
    between words. left: columns to align left, by their names in one text, or "*" for all.
    """
    table = _Table(list(head), [[str(cell) for cell in row] for row in rows], left)
    width, constant, dropped = screen_width(), [], []
    for name in drop:
        if table.width > width and (value := table.constant(name)) is not None:
            table.remove(name)
            if value:
                constant.append(f"{name}: {value}")
    left_out = [name for name in drop if name in table.head]
    while table.width > width:
        if wrap and (table.can_wrap(wrap, width) or not left_out):
            table.wrap(wrap, width)
            break
        if not left_out:
            break
        table.remove(left_out[0])
        dropped.append(left_out.pop(0))
    lines = [table.text()]
    if constant:
        lines.append(wrapped(f"the same in every row: {'; '.join(constant)}"))
    if dropped:
        lines.append(wrapped(f"with --json or in a wider terminal also: {', '.join(reversed(dropped))}"))
    return "\n".join(lines)


class _Table:
    """Cells as text, while a table is made to fit."""

    def __init__(self, head: list[str], rows: list[list[str]], left: str) -> None:
        self.head, self.rows, self.left = head, rows, left

    @property
    def width(self) -> int:
        return max(map(len, self.text().splitlines()), default=0)

    def text(self) -> str:
        aligned = ["left" if self.left == "*" or name in self.left.split(",") else "right" for name in self.head]
        return tabulate(self.rows, self.head, disable_numparse=True, colalign=aligned if self.rows else None)

    def constant(self, name: str) -> str | None:
        """The value of a column whose rows are equal, where there are several rows."""
        at = self.head.index(name)
        values = {row[at] for row in self.rows}
        return values.pop() if len(values) == 1 and len(self.rows) > 1 else None

    def remove(self, name: str) -> None:
        at = self.head.index(name)
        for cells in (self.head, *self.rows):
            del cells[at]

    def room(self, name: str, width: int) -> int:
        """Characters that a column may have so that the table fits."""
        at = self.head.index(name)
        widest = max((len(row[at]) for row in self.rows), default=0)
        return max(widest, len(name)) - (self.width - width)

    def can_wrap(self, name: str, width: int) -> bool:
        """Whether every word of a column of text fits its room."""
        at, room = self.head.index(name), self.room(name, width)
        return room >= LEAST_ROOM and all(len(word) <= room for row in self.rows for word in (name, *row[at].split()))

    def wrap(self, name: str, width: int) -> None:
        at, room = self.head.index(name), self.room(name, width)
        for row in self.rows:
            row[at] = broken(row[at], room)
