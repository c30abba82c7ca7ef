"""Locks between processes that write one file, on every system and file system.

    with locks.Lock(folder / "a.lock", of="tuning_db/a.json"):
        ...

The operating system's lock (flock on Unix, msvcrt on Windows) is used where it works: it ends with its process. Where
it is missing, as on some NFS mounts, a lock file takes its place, which a process makes and removes. A killed process
may leave that file behind; the error then names it.
"""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from int8kit.errors import FileError

MISSING = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EIO}
"""Errors of flock on a file system that does not have it. EIO and EINVAL come from user-space file systems."""


class Held(FileError):
    """Another process has the lock. left_over: the remedy for a lock file that a killed process has left, or ""."""

    def __init__(self, of: str, left_over: str) -> None:
        super().__init__(f"another process writes {of!r}: wait for it, and try again{left_over}")
        self.left_over = left_over


class Lock:
    """A lock as a context manager, or with `acquire` and `release`.

    path: the lock file; it must lie in a folder that exists. of: the file that it protects, for messages. timeout:
    seconds to wait before `Held` is raised.
    """

    def __init__(self, path: Path, of: str, timeout: float = 60) -> None:
        self.path, self.of, self.timeout = path, of, timeout
        self._held: Any = None

    def acquire(self) -> None:
        """Take the lock. Raises Held, and FileError where no lock can be made."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "only soft file lock")  # without fcntl, which is no reason to worry
            import filelock
        soft = self.path.with_suffix(".soft")
        lock: Any = self._of_the_system()
        try:
            if issubclass(filelock.FileLock, filelock.SoftFileLock) or not self._acquired(lock):
                lock = filelock.SoftFileLock(soft, timeout=self.timeout)
                lock.acquire()
        except filelock.Timeout:
            left = f"; if no int8kit runs, delete {str(soft)!r}" if soft.exists() else ""
            raise Held(self.of, left) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise FileError(
                f"cannot lock {str(self.path)!r} ({reason}); set XDG_CACHE_HOME to a writable folder"
            ) from None
        self._held = lock

    def _of_the_system(self) -> Any:
        import filelock

        try:
            return filelock.FileLock(self.path, timeout=self.timeout, fallback_to_soft=False)
        except TypeError:  # earlier versions of filelock never take another lock by themselves
            return filelock.FileLock(self.path, timeout=self.timeout)

    @staticmethod
    def _acquired(lock: Any) -> bool:
        """Take the operating system's lock. False where the file system has none. Raises filelock.Timeout."""
        try:
            lock.acquire()
        except NotImplementedError:  # of earlier versions of filelock
            return False
        except OSError as error:
            if error.errno in MISSING:
                return False
            raise
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
