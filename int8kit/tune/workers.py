"""Processes that compile: a compiler that aborts or hangs costs one configuration, not the run.

`compile_all` hands jobs to the workers of a dask cluster, by default one of this machine with a process a core, and
yields results as they come. A process that dies, or is at one job for longer than LIMIT_S, is replaced; what it was at
is tried once more, alone, and what ends its process again is recorded as `crash` or `timeout`.

    with Workers() as workers:                             # or Workers("tcp://host:8786")
        for job, outcome in workers.compile_all(86, jobs): ...

A pool of our own on concurrent.futures was given up: it cannot end a job that hangs, nor reach another host.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from int8kit.schema import Resources
from int8kit.spec import ConfigError, InputError, TileConfig

Job = tuple[TileConfig, bool]
"""A configuration, and whether K is a multiple of its block_k: the two kernels differ."""

Outcome = Resources | str
"""What a job's kernel takes, or why there is none, opening with the class: "compile: ...", "crash: ..." and so on."""

LIMIT_S = 60.0  # of one compilation; the slowest seen takes 19
CONNECT_S = 10

_CONFIG = {
    "distributed.scheduler.allowed-failures": 0,  # whatever ended a worker is tried again by us, alone
    "distributed.scheduler.worker-saturation": 1.0,  # a worker that dies takes only what it was at with it
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.scheduler.active-memory-manager.start": False,
}
# Ctrl-C reaches the whole group; it is the parent's to handle
_PRELOAD = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def _compile(arch: int, config: TileConfig, even_k: bool) -> Outcome:
    from int8kit.tune import offline

    try:
        return offline.compile_for(arch, config, even_k=even_k)
    except ConfigError as error:
        return f"compile: {error}"


def _guarded(function: Any, limit_s: float, *args: Any) -> Any:
    """function(*args) in a worker; its process ends after limit_s, also where nothing lets go of the interpreter."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=nowhere)
        try:
            return function(*args)
        finally:
            faulthandler.cancel_dump_traceback_later()


def toolchain() -> str:
    """What decides the code that a worker compiles."""
    import triton

    from int8kit import __version__
    from int8kit.kernels import gemm

    hashes = " ".join(gemm.toolchain().kernels.values())
    return f"int8kit {__version__} ({hashes}), Triton {triton.__version__}"


class Workers:
    """A cluster's workers, as a context manager. scheduler: its address; None: a cluster of this machine."""

    def __init__(self, scheduler: str | None = None, *, processes: int | None = None, limit_s: float = LIMIT_S) -> None:
        """processes: of this machine's; None for one a core. Raises InputError if no scheduler answers."""
        self.scheduler, self.limit_s = scheduler, limit_s
        self.processes = processes or os.cpu_count() or 1
        self._stack = contextlib.ExitStack()
        self._client: Any = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
        self._client = None

    def compile_all(self, arch: int, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Compile each job for `arch`; yields (job, outcome) as they are done."""
        ended: list[Job] = []
        yield from self._wave(arch, list(jobs), ended)
        for job in ended:
            again: list[Job] = []
            start = time.monotonic()
            yield from self._wave(arch, [job], again)
            if again:
                hung = time.monotonic() - start >= self.limit_s
                yield job, f"timeout: not compiled in {self.limit_s:g} s" if hung else _CRASH

    def _wave(self, arch: int, jobs: list[Job], ended: list[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Outcomes of `jobs`; those whose process ended go to `ended` instead."""
        if not jobs:
            return
        from distributed import KilledWorker, as_completed

        client = self._connected()
        futures = {
            client.submit(_guarded, _compile, self.limit_s, arch, *job, pure=False, key=f"compile-{id(jobs)}-{i}"): job
            for i, job in enumerate(jobs)
        }
        try:
            for future in as_completed(futures, loop=client.loop):
                error = future.exception()
                if isinstance(error, KilledWorker):
                    ended.append(futures[future])
                elif error is not None:
                    raise error
                else:
                    yield futures[future], future.result()
        finally:
            client.cancel(list(futures))

    def _connected(self) -> Any:
        if self._client is None:
            import dask

            self._stack.enter_context(dask.config.set(_CONFIG))
            logging.getLogger("distributed").setLevel(logging.CRITICAL)
            self._client = self._local() if self.scheduler is None else self._remote(self.scheduler)
        return self._client

    def _local(self) -> Any:
        from distributed import Client, LocalCluster

        cluster = self._stack.enter_context(
            LocalCluster(
                n_workers=self.processes, threads_per_worker=1, processes=True, dashboard_address=None,
                host="127.0.0.1", silence_logs=logging.CRITICAL, preload=_PRELOAD, memory_limit="auto",
                env={"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
        return self._stack.enter_context(Client(cluster, set_as_default=False))

    def _remote(self, address: str) -> Any:
        from distributed import Client

        try:
            client = self._stack.enter_context(Client(address, timeout=CONNECT_S, set_as_default=False))
            client.wait_for_workers(1, timeout=CONNECT_S)
        except (OSError, ValueError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise InputError(
                f"no scheduler with workers at {address!r} ({reason}); legal is what `dask scheduler` prints, "
                "such as tcp://host:8786"
            ) from None
        mine = toolchain()
        for worker, theirs in client.run(toolchain).items():
            if theirs != mine:
                raise InputError(f"the worker {worker} has {theirs}; legal is what runs here, {mine}")
        return client


_CRASH = "crash: the compiler ended its process"
