"""A child process on another platform: `python platforms.py PLATFORM CODE` runs Python code there.

no-flock     flock fails as on NFS without a lock service (ENOLCK)
no-syscall   flock fails as on a file system that lacks it (ENOSYS)
windows      no fcntl, resource, pwd, grp and termios, and no function of os and signal that Windows lacks
"""

import errno
import os
import signal
import sys

POSIX = ("fcntl", "resource", "pwd", "grp", "termios")
NOT_ON_WINDOWS = ("fork", "killpg", "chown", "sched_getaffinity", "sysconf", "getuid", "setsid", "getpgid")


def failing(number):
    import fcntl

    def flock(*_):
        raise OSError(number, os.strerror(number))

    fcntl.flock = flock


def windows():
    import random  # noqa: F401  (they import what is hidden below)
    import subprocess  # noqa: F401
    import uuid  # noqa: F401

    import psutil  # noqa: F401

    for name in POSIX:
        sys.modules[name] = None  # its import fails
    for name in NOT_ON_WINDOWS:
        delattr(os, name)
    for name in ("SIGALRM", "pthread_sigmask"):
        delattr(signal, name)


def main():
    enter = {
        "no-flock": lambda: failing(errno.ENOLCK),
        "no-syscall": lambda: failing(errno.ENOSYS),
        "windows": windows,
    }
    enter[sys.argv[1]]()
    exec(compile(sys.argv[2], "<code>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
