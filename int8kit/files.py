"""Files: written in one step or not at all, and never over a file that int8kit did not write.

Every JSON file names its format in its first key, `{"format": "int8kit.shapes/1", ...}`. The format identifies a file
that int8kit wrote. Only regular files are read and written: a FIFO would block, and a device has no content to keep.
`shipped("shapes")` and `shipped("tuning_db")` are the folders that come with the package. They are inside the package
when it was installed from a wheel, and at the top of the checkout otherwise.
"""

from __future__ import annotations

import contextlib
import errno
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
    """The folder `shapes` or `tuning_db` of this installation."""
    package = Path(__file__).parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def user_folder() -> Path:
    """The folder of the user's own databases."""
    import platformdirs

    return Path(platformdirs.user_data_dir("int8kit")) / "tuning_db"


def database_folders() -> tuple[Path, ...]:
    """The folders of database files: ./tuning_db, the shipped one, and the user's own."""
    return Path("tuning_db"), shipped("tuning_db"), user_folder()


def read_json(path: Path, *formats: str, remedy: str) -> dict[str, Any]:
    """The document in `path`, whose "format" must be one of `formats`. Raises FileError with `remedy` otherwise.

    A duplicate key in one object and a number that is not finite are damage, because other programs read such a file
    differently or refuse it.
    """
    document = read_any_json(path, remedy=remedy)
    found = document.get("format") if isinstance(document, dict) else None
    if found not in formats:
        expected = " or ".join(map(repr, formats))
        raise FileError(f"{str(path)!r} has the format {found!r}; expected {expected}; {remedy}")
    assert isinstance(document, dict)
    return document


def read_any_json(path: Path, *, remedy: str) -> Any:
    """The JSON value in `path`, of any program. Raises FileError with `remedy`."""
    if (kind := kind_of(path)) is not None:
        raise FileError(f"cannot read {str(path)!r}: it is a {kind}; {remedy}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"no file {str(path)!r}; {remedy}") from None
    except (OSError, ValueError) as error:  # a null character in the path, bytes that are no UTF-8
        raise FileError(f"cannot read {str(path)!r} ({_reason(error)}); {remedy}") from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise FileError(f"damaged JSON in {str(path)!r} (line {error.lineno}: {error.msg}); {remedy}") from None
    except _Ambiguous as error:
        raise FileError(f"damaged JSON in {str(path)!r} ({error}); {remedy}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise FileError(f"damaged JSON in {str(path)!r} (nested too deep, or a number too long); {remedy}") from None


class _Ambiguous(ValueError):
    """JSON that two readers may understand differently."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Ambiguous(f"duplicate key {twice!r} in one object")
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


def kind_of(path: Path) -> str | None:
    """Name of the kind of `path` where it is no regular file: folder, FIFO, device, socket, or loop of links.

    None for a regular file, and for a path without a file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # whoever opens it reports the reason
        return "loop of symbolic links" if isinstance(error, OSError) and error.errno == errno.ELOOP else None
    if stat.S_ISREG(mode):
        return None
    return "folder" if stat.S_ISDIR(mode) else "FIFO" if stat.S_ISFIFO(mode) else _other_kind(mode)


def _other_kind(mode: int) -> str:
    return "socket" if stat.S_ISSOCK(mode) else "device"


def check_target(path: Path, *, ours: Callable[[Path], bool], force: bool) -> None:
    """Raise FileError unless `path` can be written. A verb calls this before any long work starts."""
    if not path.name:  # "" and "." name the present folder
        raise FileError(f"cannot write {str(path)!r}: it is a folder; name a file")
    _check_replaceable(path)
    try:
        exists = path.exists()
        if exists and not force and not _is_ours(path, ours):
            raise FileError(
                f"{str(path)!r} exists and was not written by int8kit, or is damaged; name another file, or use --force"
            )
        folder = Path(os.path.realpath(path)).parent
        _make_folder(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".int8kit-"):
            pass
    except (OSError, ValueError) as error:  # a null character in the path
        raise _cannot_write(path, error) from None


def _is_ours(path: Path, ours: Callable[[Path], bool]) -> bool:
    try:
        return ours(path)
    except ValueError:  # bytes that are no UTF-8
        return False


def _make_folder(folder: Path) -> None:
    """Make `folder` and its parents. Raises NotADirectoryError that names the part of the path that is a file."""
    for part in (folder, *folder.parents):
        if part.exists():
            if not part.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{str(part)!r} is not a folder")
            break
    folder.mkdir(parents=True, exist_ok=True)


def _cannot_write(path: Path, error: Exception) -> FileError:
    """The error for a file that cannot be written. A full disk is no mistake of the call: exit status 1."""
    full = isinstance(error, OSError) and error.errno in FULL
    remedy = "free some space" if full else "name a file in a writable folder"
    reason = _reason(error)
    if isinstance(error, FileNotFoundError):  # the folder is there: a folder such as /proc takes no new file
        reason = f"{str(path.parent)!r} takes no new file"
    found = FileError(f"cannot write {str(path)!r} ({reason}); {remedy}")
    found.exit_status = 1 if full else FileError.exit_status
    return found


FULL = (errno.ENOSPC, errno.EDQUOT)


def _check_replaceable(path: Path) -> None:
    """Raise FileError for a path that is no regular file, and for a read-only file.

    A replacement of a read-only file would ask only the folder's permission.
    """
    if (kind := kind_of(path)) is not None:
        raise FileError(f"cannot write {str(path)!r}: it is a {kind}; name a file")
    with contextlib.suppress(OSError, ValueError):  # a name that cannot be looked up: writing it reports the reason
        if not path.stat().st_mode & 0o222:
            raise FileError(f"cannot write {str(path)!r}: it is read-only; name another file, or chmod u+w it")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. It replaces `path` when the block ends, and is removed when the block raises.

    A symbolic link stays a link: the file that it names is replaced. A file keeps its mode and its owner. Raises
    FileError.
    """
    _check_replaceable(path)
    target = Path(os.path.realpath(path))
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".int8kit-", suffix=target.suffix)
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if target.exists():
            before = target.stat()
            with contextlib.suppress(OSError, AttributeError):  # only root may give a file away; Windows cannot
                os.chown(temporary, before.st_uid, before.st_gid)
            os.chmod(temporary, stat.S_IMODE(before.st_mode))
        else:
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step. Raises FileError."""
    try:
        _make_folder(Path(os.path.realpath(path)).parent)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from None
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def dump_rows(document: dict[str, Any], rows: str) -> str:
    """`document` as JSON with each item of its list `rows` on one line. A diff then shows only the changed items."""
    head = {key: value for key, value in document.items() if key != rows}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    items = ",\n".join(f"    {json.dumps(item)}" for item in document[rows])
    body = f"[\n{items}\n  ]" if items else "[]"
    return "\n".join(["{", *lines, f"  {json.dumps(rows)}: {body}", "}", ""])


def lacks(error: Exception) -> str:
    """Reason why a document is damaged: the key that a KeyError missed, or the error's text."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
