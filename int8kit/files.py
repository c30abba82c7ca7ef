"""Files that int8kit writes: whole or not at all, and never over somebody else's.

Every JSON file names its format in its first key, `{"format": "int8kit.shapes/1", ...}`; that is how a file is
recognised as ours. `shipped("shapes")` and `shipped("tuning_db")` are the folders that come with the package: inside
it when installed from a wheel, at the top of the checkout otherwise.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from int8kit.errors import FileError


def shipped(folder: str) -> Path:
    """The folder `shapes` or `tuning_db` that this installation came with."""
    package = Path(__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def read_json(path: Path, *formats: str, remedy: str) -> dict[str, Any]:
    """The document in `path`, whose "format" must be one of `formats`. Raises FileError with `remedy` otherwise.

    A key that stands twice in one object, and a number that is not finite, are damage: other programs read something
    else from such a file, or nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"no file {str(path)!r}; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {str(path)!r} ({_reason(error)}); {remedy}") from None
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise FileError(f"damaged JSON in {str(path)!r} (line {error.lineno}: {error.msg}); {remedy}") from None
    except _Ambiguous as error:
        raise FileError(f"damaged JSON in {str(path)!r} ({error}); {remedy}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise FileError(f"damaged JSON in {str(path)!r} (no sane document); {remedy}") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found not in formats:
        expected = " or ".join(map(repr, formats))
        raise FileError(f"{str(path)!r} has the format {found!r}; expected {expected}; {remedy}")
    assert isinstance(document, dict)
    return document


class _Ambiguous(ValueError):
    """JSON that two readers may understand differently."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Ambiguous(f"the key {twice!r} stands twice in one object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise _Ambiguous(f"the number {text} is not finite")
    return number


def is_ours(path: Path, *formats: str) -> bool:
    """True if `path` is a JSON document of one of these formats."""
    try:
        read_json(path, *formats, remedy="")
    except FileError:
        return False
    return True


def check_target(path: Path, *, ours: Callable[[Path], bool], force: bool) -> None:
    """Raise FileError unless `path` can be written, before any long work starts."""
    if path.is_dir():
        raise FileError(f"cannot write {str(path)!r}: it is a folder; name a file")
    if path.exists() and not force and not ours(path):
        raise FileError(
            f"{str(path)!r} exists and was not written by int8kit, or is damaged; name another file, or use --force"
        )
    _check_writable(path)
    folder = Path(os.path.realpath(path)).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".int8kit-"):
            pass
    except OSError as error:
        raise FileError(f"cannot write {str(path)!r} ({_reason(error)}); name a file in a writable folder") from None


def _check_writable(path: Path) -> None:
    """Raise FileError for a file that its owner made read-only: a replacement asks the folder alone."""
    if path.exists() and not path.stat().st_mode & 0o222:
        raise FileError(f"cannot write {str(path)!r}: it is read-only; name another file, or chmod u+w it")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    A symbolic link stays one: the file that it names is replaced. A file keeps its mode and its owner.
    """
    target = Path(os.path.realpath(path))
    _check_writable(target)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".int8kit-", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if target.exists():
            before = target.stat()
            with contextlib.suppress(OSError):  # only root may give a file away
                os.chown(temporary, before.st_uid, before.st_gid)
            os.chmod(temporary, stat.S_IMODE(before.st_mode))
        else:
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise FileError(f"cannot write {str(path)!r} ({_reason(error)}); name a file in a writable folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step. Raises FileError."""
    Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def dump_rows(document: dict[str, Any], rows: str) -> str:
    """`document` as JSON with each item of its list `rows` on one line, so that a diff shows the items that changed."""
    head = {key: value for key, value in document.items() if key != rows}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    items = ",\n".join(f"    {json.dumps(item)}" for item in document[rows])
    body = f"[\n{items}\n  ]" if items else "[]"
    return "\n".join(["{", *lines, f"  {json.dumps(rows)}: {body}", "}", ""])


def lacks(error: Exception) -> str:
    """What is wrong with a document, for people: the key that a KeyError missed, or the error's own words."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
