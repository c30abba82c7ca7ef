"""Worker processes that compile and time: one that aborts or hangs costs one configuration, not the run.

    with Workers() as pool:                                # or Workers("tcp://host:8786")
        compilations = pool.compile_all(86, kernels)       # {kernel: Resources, or why it does not compile}
        results = pool.drive([job, job])                   # each a generator of `Batch`es

The processes are workers of a dask cluster. By default it is a cluster of this machine: for each core one worker
without a GPU, which compiles, and for each GPU one worker, which times. A job yields a `Batch` of calls and is sent
their results. Jobs take turns at the workers, so that GPUs of several kinds are busy at once.

A process that dies is replaced, and so is one that takes longer for a call than the batch's limit. Its call is tried
once more, alone. A call that ends its process again has the result `ProcessEnded`. A worker has one call at a time,
since dask blames every call that a dead worker held.

Rejected: a pool on concurrent.futures. It cannot end a call that hangs, and cannot reach another host.
`verify.process_pool` is a second pool, because verification has other needs. It stays on this machine, ends one silent
child at once, and runs children on broken copies of the package. A dask worker could not start there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, TypeVar

from int8kit.errors import CheckFailed, InputError
from int8kit.gpus import Gpu
from int8kit.tune import cluster, tasks
from int8kit.tune.space import Compilation, KernelVariant

T = TypeVar("T")

LIMIT_S = 60.0  # for one compilation; the slowest observed took 19 s
DESCRIBE_S = 120.0  # for a new worker to import torch and describe itself
TICK_S = 0.5  # between two checks of which workers exist
NO_WORKER_S = 60.0  # how long a batch waits for a worker that can take it
PROCESSES = 32  # most that compile on this machine; each takes about half a GB


@dataclass(frozen=True)
class Batch:
    """Calls of one function that may run at once; function and arguments are pickled."""

    function: Callable[..., Any]
    calls: Sequence[tuple[Any, ...]]
    on_result: Callable[[tuple[Any, ...], Any], None] = lambda *_: None  # receives each call and its result at once
    gpu: str | None = None  # alias of the GPU that a worker must have; None: a worker without a GPU, if there are any
    limit_s: float | None = None  # for one call; None: LIMIT_S
    once: bool = False  # a call that ends its process is not tried again
    halt: bool = False  # after a call has ended its process, the calls not begun are left out of the results


@dataclass(frozen=True)
class ProcessEnded:
    """In place of the result of a call that ended its process: twice, or once in a batch with `once`."""

    kind: Literal["crash", "timeout"]
    limit_s: float

    def __str__(self) -> str:
        return f"timeout: not done in {self.limit_s:g} s" if self.kind == "timeout" else "crash: it ended its process"


Job = Generator[Batch, dict[tuple[Any, ...], Any], T]
"""A generator: yields batches, is sent {call: result} of each, and returns its own result."""


def _guarded(function: Any, limit_s: float, *args: Any) -> Any:
    """function(*args) in a worker. Its process ends after limit_s, even if C code holds the interpreter's lock."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=nowhere)
        try:
            return function(*args)
        finally:
            faulthandler.cancel_dump_traceback_later()


@dataclass
class _Running:
    """A job and its current batch."""

    job: Job[Any]
    batch: Batch | None = None
    todo: deque[tuple[Any, ...]] = field(default_factory=deque)
    again: deque[tuple[Any, ...]] = field(default_factory=deque)  # calls that ended their process once
    results: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    in_flight: int = 0
    returned: Any = None

    def advance(self) -> None:
        """Send the results of the finished batch, and fetch the next one that has calls."""
        results: Any = self.results if self.batch else None
        self.batch = None
        try:
            batch = self.job.send(results)
            while not batch.calls:
                batch = self.job.send({})
        except StopIteration as end:
            self.returned = end.value
            return
        self.batch, self.todo, self.again, self.results = batch, deque(batch.calls), deque(), {}

    def next_call(self) -> tuple[tuple[Any, ...], bool] | None:
        """A call that can start now, and whether it is the second try; None if there is none."""
        if self.todo:
            return self.todo.popleft(), False
        if self.again and not self.in_flight:
            return self.again.popleft(), True
        return None

    def done(self, call: tuple[Any, ...], result: Any) -> None:
        """Store and report the result of a call."""
        assert self.batch is not None
        self.results[call] = result
        self.batch.on_result(call, result)
        if self.batch.halt and isinstance(result, ProcessEnded):
            self.todo.clear()


@dataclass(frozen=True)
class _ActiveCall:
    """A call that a worker is executing."""

    running: _Running
    call: tuple[Any, ...]
    again: bool
    address: str
    start: float
    future: Any


class Workers:
    """Workers of a cluster, as a context manager."""

    def __init__(self, scheduler: str | None = None, *, processes: int | None = None) -> None:
        """scheduler: address of the cluster's; None: a cluster of this machine.

        processes: how many compile on this machine; None: one for each core, at most PROCESSES.
        """
        self.scheduler = scheduler
        self.processes = processes or min(os.cpu_count() or 1, PROCESSES)
        self._stack = contextlib.ExitStack()
        self._client: Any = None
        self._workers: dict[str, Gpu | None] = {}  # by address, with the GPU of each
        self._asked: dict[str, Any] = {}  # by address, the future of `tasks.describe`
        self._active: dict[str, _ActiveCall] = {}  # by the future's key
        self._finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._names = itertools.count()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
        self._client = None
        self._asked.clear()

    def gpus(self) -> list[Gpu]:
        """The GPU of each worker that has one. Raises InputError if no scheduler answers."""
        self._connect()
        return [gpu for gpu in self._workers.values() if gpu is not None]

    def compile_all(self, arch: int, kernels: Iterable[KernelVariant]) -> dict[KernelVariant, Compilation]:
        """Compile each of `kernels` for `arch`."""
        compilations: dict[KernelVariant, Compilation] = {}

        def job() -> Job[None]:
            yield Batch(tasks.compile_kernel, [(arch, kernel, None) for kernel in kernels], keep)

        def keep(call: tuple[Any, ...], result: Any) -> None:
            _, kernel, _ = call
            compilations[kernel] = compilation(result)

        self.drive([job()])
        return compilations

    def drive(self, jobs: Iterable[Job[T]]) -> list[T]:
        """Run the jobs to their ends, side by side, and return their results.

        Raises what the jobs raise, InputError if no scheduler answers, and CheckFailed if no worker is left with
        the GPU that a batch needs.
        """
        running = [_Running(job) for job in jobs]
        try:
            for one in running:
                one.advance()
            idle_since = time.monotonic()
            while any(one.batch for one in running):
                self._connect()
                self._start_calls(running)
                if self._active:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > NO_WORKER_S:
                    raise CheckFailed(_no_worker(next(one.batch.gpu for one in running if one.batch)))
                self._finish_one()
                for one in running:
                    if one.batch and not (one.todo or one.again or one.in_flight):
                        one.advance()
        finally:
            for active in self._active.values():
                active.future.cancel()
            self._active.clear()
            for one in running:
                one.job.close()
        return [one.returned for one in running]

    def _start_calls(self, running: list[_Running]) -> None:
        """Give every free worker a call."""
        busy = {active.address for active in self._active.values()}
        for address in [a for a in self._workers if a not in busy]:
            # the jobs with the fewest running calls come first, so that jobs share the workers
            for one in sorted(running, key=lambda one: one.in_flight):
                if one.batch is None or not self._suits(address, one.batch.gpu):
                    continue
                if (next_call := one.next_call()) is not None:
                    self._submit(one, address, *next_call)
                    break

    def _suits(self, address: str, wanted: str | None) -> bool:
        gpu = self._workers[address]
        if wanted is not None:
            return gpu is not None and gpu.alias == wanted
        return gpu is None or None not in self._workers.values()

    def _submit(self, running: _Running, address: str, call: tuple[Any, ...], again: bool) -> None:
        assert running.batch is not None
        limit_s = running.batch.limit_s or LIMIT_S
        future = self._client.submit(
            _guarded, running.batch.function, limit_s, *call,
            workers=[address], pure=False, key=f"{running.batch.function.__name__}-{id(self)}-{next(self._names)}",
        )  # fmt: skip
        self._active[future.key] = _ActiveCall(running, call, again, address, time.monotonic(), future)
        running.in_flight += 1
        future.add_done_callback(self._finished.put)

    def _finish_one(self) -> None:
        """Wait for the end of one call; after TICK_S without one, check which workers exist."""
        from distributed import KilledWorker

        try:
            future = self._finished.get(timeout=TICK_S)
        except queue.Empty:
            self._check_workers()
            return
        active = self._active.pop(future.key, None)
        if active is None:
            return  # its worker has gone meanwhile
        error = future.exception() if future.status == "error" else None
        if isinstance(error, KilledWorker) or future.status in ("cancelled", "lost"):
            self._process_ended(active)
        elif error is not None:
            raise error
        else:
            active.running.in_flight -= 1
            active.running.done(active.call, future.result())

    def _process_ended(self, active: _ActiveCall) -> None:
        """Try the call again whose process has ended, or store that it ended twice."""
        running = active.running
        assert running.batch is not None
        running.in_flight -= 1
        self._workers.pop(active.address, None)
        limit_s = running.batch.limit_s or LIMIT_S
        if active.again or running.batch.once:
            hung = time.monotonic() - active.start >= limit_s
            running.done(active.call, ProcessEnded("timeout" if hung else "crash", limit_s))
        else:
            running.again.append(active.call)

    def _check_workers(self) -> None:
        """Register new workers, and drop those that have gone together with their calls."""
        there = set(self._client.nthreads())
        for address in set(self._workers) - there:
            self._workers.pop(address)
        for key, active in list(self._active.items()):
            if active.address not in there:
                self._active.pop(key)
                active.future.cancel()
                self._process_ended(active)
        self._register(there)

    def _register(self, there: set[str]) -> None:
        """Ask each new worker for its toolchain and its GPU, and register each that has answered.

        Never blocks: if the worker ended meanwhile, a blocking call would not return. A worker that answers with an
        error is not asked again.
        """
        for address in self._asked.keys() - there:
            self._asked.pop(address).cancel()
        for address in sorted(there - self._workers.keys() - self._asked.keys()):
            key = f"describe-{id(self)}-{address}"
            self._asked[address] = self._client.submit(
                _guarded, tasks.describe, DESCRIBE_S, workers=[address], pure=False, key=key
            )
        for address in [address for address, future in self._asked.items() if future.status == "finished"]:
            theirs, gpu = self._asked.pop(address).result()
            if theirs != (mine := tasks.versions()):
                raise InputError(f"the worker {address} has {theirs}, but this process has {mine}: install the same")
            self._workers[address] = gpu

    def _connect(self) -> None:
        if self._client is None:
            cluster.configure(self._stack)
            if self.scheduler is None:
                self._client = cluster.local(self.processes, self._stack)
            else:
                self._client = cluster.remote(self.scheduler, self._stack)
            deadline = time.monotonic() + DESCRIBE_S
            self._check_workers()
            while time.monotonic() < deadline and not all(future.done() for future in self._asked.values()):
                time.sleep(0.05)
                self._check_workers()
            self._check_workers()
            failed = [(address, future) for address, future in self._asked.items() if future.status == "error"]
            if failed and not self._workers:
                address, future = failed[0]
                raise InputError(f"the worker {address} cannot run int8kit: {future.exception()}")


def compilation(result: Any) -> Compilation:
    """The result of `tasks.compile_kernel`; a reason too if it ended its process."""
    return str(result) if isinstance(result, ProcessEnded) else result


def _no_worker(gpu: str | None) -> str:
    wanted = f"the GPU {gpu!r}" if gpu else "a compiler"
    return f"no worker with {wanted} is left; finished work is kept: run the same command again to resume"
