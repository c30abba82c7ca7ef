"""The errors that int8kit raises on purpose, as one small tree."""

from __future__ import annotations

from collections.abc import Iterable


class Int8kitError(Exception):
    """Root of every error that int8kit raises on purpose.

    Int8kitError
    +-- InputError          the call is off: exit status 2
    |   +-- ShapeError      a GEMM outside the kernels' domain, or tensors that do not fit together
    |   +-- ConfigError     a tile configuration that cannot run
    |   +-- UnknownName     a model, card or branch that is not known; lists those that are
    |   +-- FileError       a file that is missing, damaged, not ours, or cannot be written
    +-- CheckFailed         the program ran and the answer is no: exit status 1
    """

    exit_status = 2


class InputError(Int8kitError):
    """The call is off; the message names the value, the legal values and the remedy."""


class ShapeError(InputError):
    """A GEMM outside the kernels' domain, or tensors that do not fit together."""


class ConfigError(InputError):
    """A tile configuration that cannot run."""


class UnknownName(InputError):
    """A name that is in no list. `UnknownName("card", "rtx9", ["rtx3090"])` spells the message."""

    def __init__(self, what: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        super().__init__(f"unknown {what} {name!r}; known: {', '.join(sorted(known))}{'; ' + remedy if remedy else ''}")


class FileError(InputError):
    """A file that is missing, damaged, not ours, or cannot be written."""


class CheckFailed(Int8kitError):
    """The program ran and the answer is no."""

    exit_status = 1
