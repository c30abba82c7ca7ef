"""Errors that int8kit raises on purpose, and their exit statuses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Int8kitError(Exception):
    """Root of every error that int8kit raises on purpose.

    Int8kitError
    +-- InputError          a user's mistake: exit status 2
    |   +-- ShapeError      a GEMM outside the kernels' domain, or tensors that do not fit together
    |   +-- ConfigError     a tile configuration that cannot run
    |   +-- UnknownName     an unknown model, GPU or branch; the message lists the names that exist
    |   +-- FileError       a file that is missing, damaged, not ours, or cannot be written
    +-- CheckFailed         a check ran and failed: exit status 1
    """

    exit_status = 2


class InputError(Int8kitError):
    """A user's mistake. The message names the value, the expected values and the remedy."""


class ShapeError(InputError):
    """A GEMM outside the kernels' domain, or tensors that do not fit together."""


class ConfigError(InputError):
    """A tile configuration that cannot run."""


class UnknownName(InputError):
    """An unknown name, with the names that exist: "unknown gpu 'rtx9'; expected h200, rtx3090".

    Of more than `MOST` names, the message has the closest ones.
    """

    MOST = 20

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        names = sorted(known)
        expected = ", ".join(names)
        if len(names) > self.MOST:
            close = difflib.get_close_matches(name, names, n=5, cutoff=0.0)
            expected = f"one of {len(names)}, such as {', '.join(close)}"
        super().__init__(f"unknown {kind} {name!r}; expected {expected}{'; ' + remedy if remedy else ''}")


class FileError(InputError):
    """A file that is missing, damaged, not ours, or cannot be written."""


class CheckFailed(Int8kitError):
    """A check ran and failed."""

    exit_status = 1
