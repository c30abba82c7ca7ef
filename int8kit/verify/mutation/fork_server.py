"""A process that has imported torch and Triton, and forks a child for each mutant: no child pays these imports again.

    with ForkServer() as server:
        Place(command=server.command, folder=copy, path=[copy])     of `process_pool.run_all`

    process_pool --starts--> client, 20 ms --socket: pipe, output, folder, environment--> server --fork--> child

The child imports int8kit from its own folder, after the fork. The client lives as long as the child, ends as it ended,
and takes it along if it is killed. So `process_pool` sees an ordinary child. The server never touches a GPU, since
CUDA does not survive a fork. This file runs as a script, so that the server imports nothing of int8kit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import resource
except ImportError:  # Windows: `verify mutate` refuses before a server starts
    resource = None  # type: ignore[assignment]

_PRELOADED = (
    "numpy", "torch", "triton", "triton.language", "triton.compiler", "triton.language.extra.cuda",
    "triton.experimental.gluon.language.nvidia.hopper", "triton.experimental.gluon.language.nvidia.ampere",
    "triton.experimental.gluon.nvidia.hopper", "hypothesis.strategies", "pydantic", "filelock", "platformdirs",
)  # fmt: skip


class ForkServer:
    """The server as a context manager. environment: variables beside the present ones, such as TRITON_INTERPRET."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}

    def __enter__(self) -> ForkServer:
        self._folder = tempfile.TemporaryDirectory(prefix="int8kit-fork-")
        address = str(Path(self._folder.name, "socket"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)  # clients wait here until the server has imported
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, "server", str(listener.fileno())], env=self._environment,
                pass_fds=[listener.fileno()], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        # -S and -E: the client needs the standard library alone
        self.command = (sys.executable, "-S", "-E", "-P", __file__, "client", address)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the server ends with its children
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def client(address: str, pipe: int) -> None:
    """Have the server fork a child that serves `pipe`, and end as the child ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        head = json.dumps({"environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(connection, [len(head).to_bytes(8, "big")], [pipe, 1, 2])
        connection.sendall(head)
        os.close(pipe)  # the child's end alone keeps it open
        answer = connection.recv(8)
    code = int.from_bytes(answer, "big", signed=True) if answer else 1
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def server(listening: int) -> None:
    """Fork a child for each client, until the parent closes stdin."""
    for name in _PRELOADED:
        with contextlib.suppress(ImportError, AttributeError):
            importlib.import_module(name)
    listener = socket.socket(fileno=listening)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    children: dict[int, socket.socket] = {}
    try:
        while True:
            waited: list[Any] = [0, listener, woken, *children.values()]
            ready, _, _ = select.select(waited, [], [])
            if 0 in ready:
                return
            if listener in ready:
                connection, _ = listener.accept()
                if (child := _fork(connection, [listener, *children.values()])) is not None:
                    children[child] = connection
            if woken in ready:
                os.read(woken, 512)
            for child, connection in list(children.items()):
                if connection in ready:  # its client was killed, and says nothing otherwise
                    _kill(child)
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    with contextlib.suppress(OSError):
                        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
                    children.pop(child).close()
    finally:
        for child in children:
            _kill(child)


def _kill(child: int) -> None:
    for end in (os.killpg, os.kill):  # the group is there a moment after the fork
        with contextlib.suppress(ProcessLookupError):
            end(child, signal.SIGKILL)


def _fork(connection: socket.socket, others: list[socket.socket]) -> int | None:
    """A child for the request on `connection`; None if its client is gone."""
    try:
        size, files, _, _ = socket.recv_fds(connection, 8, 3)
        request = b""
        while len(request) < int.from_bytes(size, "big"):
            if not (more := connection.recv(1 << 16)):
                raise EOFError
            request += more
    except (OSError, EOFError):
        connection.close()
        return None
    child = os.fork()
    if child == 0:
        _live(json.loads(request), files, [connection, *others])
    for file in files:
        os.close(file)
    return child


def _live(request: dict[str, object], files: list[int], foreign: list[socket.socket]) -> None:
    """The life of a child: it runs the calls that arrive on its pipe, and never returns."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for one in foreign:
            one.close()
        pipe, out, err = files
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        environment = request["environment"]
        assert isinstance(environment, dict)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(str(request["folder"]))
        path = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:] = [*path, *(folder for folder in sys.path if folder not in path)]
        importlib.invalidate_caches()
        sys.modules["torch"].set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
        importlib.import_module("int8kit.verify.process_pool").serve(Connection(pipe))
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "server":
        server(int(sys.argv[2]))
    else:
        client(sys.argv[2], int(sys.argv[3]))
