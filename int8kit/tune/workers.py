"""Processes that compile and time: one that aborts or hangs costs one configuration, not the run.

    with Workers() as pool:                                # or Workers("tcp://host:8786")
        outcomes = pool.compile_all(86, jobs)              # {(config, even K): Resources, or why there are none}
        results = pool.drive([program, program])           # each a generator of `Batch`es

The processes are workers of a dask cluster, by default one of this machine: one without a card a core, which compile,
and one for each card, which time. A program yields a `Batch` of calls and is sent their results; programs take turns
at the workers, so that several kinds of card are kept busy at once. A process that dies, or is at one call for longer
than the batch's limit, is replaced. What it was at is tried once more, alone; what ends its process again has the
result `Ended`. A worker has one call at a time, since dask blames all that a dead worker held.

A pool of our own on concurrent.futures was given up: it cannot end a call that hangs, nor reach another host.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, TypeVar

from int8kit.database.schema import Resources
from int8kit.errors import CheckFailed, InputError
from int8kit.gpus import Gpu
from int8kit.spec import GROUP_M, GemmShape, TileConfig
from int8kit.tune import tasks

T = TypeVar("T")

Job = tuple[TileConfig, bool]
"""A configuration, and whether K is a multiple of its block_k: the two kernels differ."""

Outcome = Resources | str
"""What a job's kernel takes, or why there is none, opening with the class: "compile: ...", "crash: ..." and so on."""

LIMIT_S = 60.0  # of one compilation; the slowest seen takes 19
CONNECT_S = 10
ASK_S = 120.0  # for a new worker to import torch and say what it is
TICK_S = 0.5  # between looks at which workers there are
ALONE_S = 60.0  # how long a batch waits for a worker that could take it
PROCESSES = 32  # at most, of this machine's; each takes about half a GB

_CONFIG = {
    "distributed.scheduler.allowed-failures": 0,  # whatever ended a worker is tried again by us, alone
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.scheduler.active-memory-manager.start": False,
    # its nanny starts a worker again; by default the cluster gives up one that is down 15 s after an earlier end
    "distributed.deploy.lost-worker-timeout": "1000 days",
}
# Ctrl-C reaches the whole group; it is the parent's to handle
_PRELOAD = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def job(config: TileConfig, shape: GemmShape) -> Job:
    """The kernel that `config` needs for `shape`: a band's width is an argument of it."""
    return replace(config, group_m=GROUP_M), shape.k % config.block_k == 0


@dataclass(frozen=True)
class Batch:
    """Calls of one function that may run at once; function and arguments are pickled."""

    function: Callable[..., Any]
    calls: Sequence[tuple[Any, ...]]
    on_result: Callable[[tuple[Any, ...], Any], None] = lambda *_: None  # told each call and its result as it comes
    card: str | None = None  # alias of the card that a worker must have; None: a worker without one, if there are any
    limit_s: float | None = None  # of one call; None: LIMIT_S
    once: bool = False  # what ends its process is not tried again
    halt: bool = False  # once a call has the result Ended, those not begun are left out of the results


@dataclass(frozen=True)
class Ended:
    """In place of the result of a call that ended its process, twice unless its batch says `once`."""

    kind: Literal["crash", "timeout"]
    limit_s: float

    def __str__(self) -> str:
        return f"timeout: not done in {self.limit_s:g} s" if self.kind == "timeout" else "crash: it ended its process"


Program = Generator[Batch, dict[tuple[Any, ...], Any], T]
"""Yields batches, is sent {call: result} of each, and returns what it came to."""


def _guarded(function: Any, limit_s: float, *args: Any) -> Any:
    """function(*args) in a worker; its process ends after limit_s, also where nothing lets go of the interpreter."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=nowhere)
        try:
            return function(*args)
        finally:
            faulthandler.cancel_dump_traceback_later()


@dataclass
class _Running:
    """A program and its present batch."""

    program: Program[Any]
    batch: Batch | None = None
    todo: deque[tuple[Any, ...]] = field(default_factory=deque)
    again: deque[tuple[Any, ...]] = field(default_factory=deque)  # ended their process once
    results: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    flying: int = 0
    outcome: Any = None

    def advance(self) -> None:
        """Send the results of the batch that is done, and fetch the next one that has calls."""
        results: Any = self.results if self.batch else None
        self.batch = None
        try:
            batch = self.program.send(results)
            while not batch.calls:
                batch = self.program.send({})
        except StopIteration as end:
            self.outcome = end.value
            return
        self.batch, self.todo, self.again, self.results = batch, deque(batch.calls), deque(), {}

    def next_call(self) -> tuple[tuple[Any, ...], bool] | None:
        """A call that can be made now, and whether it is made again."""
        if self.todo:
            return self.todo.popleft(), False
        if self.again and not self.flying:
            return self.again.popleft(), True
        return None

    def done(self, call: tuple[Any, ...], result: Any) -> None:
        """Note a result; advance if it was the batch's last."""
        assert self.batch is not None
        self.results[call] = result
        self.batch.on_result(call, result)
        if self.batch.halt and isinstance(result, Ended):
            self.todo.clear()


@dataclass(frozen=True)
class _Flight:
    """A call under way."""

    running: _Running
    call: tuple[Any, ...]
    again: bool
    address: str
    start: float
    future: Any


class Workers:
    """A cluster's workers, as a context manager. scheduler: its address; None: a cluster of this machine."""

    def __init__(self, scheduler: str | None = None, *, processes: int | None = None) -> None:
        """processes: of this machine's that compile; None for one a core."""
        self.scheduler = scheduler
        self.processes = processes or min(os.cpu_count() or 1, PROCESSES)
        self._stack = contextlib.ExitStack()
        self._client: Any = None
        self._workers: dict[str, Gpu | None] = {}  # by address, with the card of each
        self._asked: dict[str, Any] = {}  # by address, the future with what the worker says of itself
        self._flights: dict[str, _Flight] = {}  # by the future's key
        self._landed: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._names = itertools.count()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
        self._client = None
        self._asked.clear()

    def cards(self) -> list[Gpu]:
        """The card of each worker that has one. Raises InputError if no scheduler answers."""
        self._connect()
        return [card for card in self._workers.values() if card is not None]

    def compile_all(self, arch: int, jobs: Iterable[Job]) -> dict[Job, Outcome]:
        """Compile each job for `arch`."""
        found: dict[Job, Outcome] = {}

        def program() -> Program[None]:
            yield Batch(tasks.compile_kernel, [(arch, *job, None) for job in jobs], keep)

        def keep(call: tuple[Any, ...], result: Any) -> None:
            found[call[1:3]] = outcome(result)

        self.drive([program()])
        return found

    def drive(self, programs: Iterable[Program[T]]) -> list[T]:
        """Run the programs to their ends, side by side -> what they returned.

        Raises what they raise, InputError if no scheduler answers, CheckFailed if no worker is left that has a card
        that a batch needs.
        """
        running = [_Running(program) for program in programs]
        try:
            for one in running:
                one.advance()
            idle_since = time.monotonic()
            while any(one.batch for one in running):
                self._connect()
                self._launch(running)
                if self._flights:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > ALONE_S:
                    card = next(one.batch.card for one in running if one.batch)
                    raise CheckFailed(f"no worker with the card {card} is left; what was finished is kept")
                self._land()
                for one in running:
                    if one.batch and not (one.todo or one.again or one.flying):
                        one.advance()
        finally:
            for flight in self._flights.values():
                flight.future.cancel()
            self._flights.clear()
            for one in running:
                one.program.close()
        return [one.outcome for one in running]

    def _launch(self, running: list[_Running]) -> None:
        """Give every free worker a call."""
        busy = {flight.address for flight in self._flights.values()}
        for address in [a for a in self._workers if a not in busy]:
            # those first that have the fewest calls under way, so that programs share the workers
            for one in sorted(running, key=lambda one: one.flying):
                if one.batch is None or not self._suits(address, one.batch.card):
                    continue
                if (found := one.next_call()) is not None:
                    self._submit(one, address, *found)
                    break

    def _suits(self, address: str, card: str | None) -> bool:
        has = self._workers[address]
        if card is not None:
            return has is not None and has.alias == card
        return has is None or None not in self._workers.values()

    def _submit(self, running: _Running, address: str, call: tuple[Any, ...], again: bool) -> None:
        assert running.batch is not None
        limit_s = running.batch.limit_s or LIMIT_S
        future = self._client.submit(
            _guarded, running.batch.function, limit_s, *call,
            workers=[address], pure=False, key=f"{running.batch.function.__name__}-{id(self)}-{next(self._names)}",
        )  # fmt: skip
        self._flights[future.key] = _Flight(running, call, again, address, time.monotonic(), future)
        running.flying += 1
        future.add_done_callback(self._landed.put)

    def _land(self) -> None:
        """Wait for one call, or look which workers there are."""
        from distributed import KilledWorker

        try:
            future = self._landed.get(timeout=TICK_S)
        except queue.Empty:
            self._look()
            return
        flight = self._flights.pop(future.key, None)
        if flight is None:
            return  # given up
        error = future.exception() if future.status == "error" else None
        if isinstance(error, KilledWorker) or future.status in ("cancelled", "lost"):
            self._ended(flight)
        elif error is not None:
            raise error
        else:
            flight.running.flying -= 1
            flight.running.done(flight.call, future.result())

    def _ended(self, flight: _Flight) -> None:
        """A call's process is gone."""
        running = flight.running
        assert running.batch is not None
        running.flying -= 1
        self._workers.pop(flight.address, None)
        limit_s = running.batch.limit_s or LIMIT_S
        if flight.again or running.batch.once:
            hung = time.monotonic() - flight.start >= limit_s
            running.done(flight.call, Ended("timeout" if hung else "crash", limit_s))
        else:
            running.again.append(flight.call)

    def _look(self) -> None:
        """Take in workers that have come, and give up those that are gone with what they were at."""
        there = set(self._client.nthreads())
        for address in set(self._workers) - there:
            self._workers.pop(address)
        for key, flight in list(self._flights.items()):
            if flight.address not in there:
                self._flights.pop(key)
                flight.future.cancel()
                self._ended(flight)
        self._meet(there)

    def _meet(self, there: set[str]) -> None:
        """Ask each new worker for its toolchain and its GPU, and take in each that has answered.

        A call that blocks here would block for ever where the worker ends meanwhile. A worker that answers with an
        error is not asked again.
        """
        for address in self._asked.keys() - there:
            self._asked.pop(address).cancel()
        for address in sorted(there - self._workers.keys() - self._asked.keys()):
            self._asked[address] = self._client.submit(
                _guarded, tasks.describe, ASK_S, workers=[address], pure=False, key=f"describe-{id(self)}-{address}"
            )
        for address in [address for address, future in self._asked.items() if future.status == "finished"]:
            theirs, card = self._asked.pop(address).result()
            if theirs != (mine := tasks.toolchain()):
                raise InputError(f"the worker {address} has {theirs}, but this process has {mine}: install the same")
            self._workers[address] = card

    def _connect(self) -> None:
        if self._client is None:
            import dask
            import distributed  # noqa: F401  its defaults come with the import, and would leave with _CONFIG

            self._stack.enter_context(dask.config.set(_CONFIG))
            logging.getLogger("distributed").setLevel(logging.CRITICAL)
            self._client = self._local() if self.scheduler is None else self._remote(self.scheduler)
            deadline = time.monotonic() + ASK_S
            self._look()
            while time.monotonic() < deadline and not all(future.done() for future in self._asked.values()):
                time.sleep(0.05)
                self._look()
            self._look()
            failed = [(address, future) for address, future in self._asked.items() if future.status == "error"]
            if failed and not self._workers:
                address, future = failed[0]
                raise InputError(f"the worker {address} cannot run int8kit: {future.exception()}")

    def _local(self) -> Any:
        from distributed import Client, Nanny, Scheduler, SpecCluster

        def worker(devices: str, memory_limit: Any) -> dict[str, Any]:
            env = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices}
            options = {"nthreads": 1, "host": "127.0.0.1", "dashboard": False, "preload": _PRELOAD, "env": env,
                       "memory_limit": memory_limit, "silence_logs": logging.CRITICAL}  # fmt: skip
            return {"cls": Nanny, "options": options}

        spec = {f"core-{i}": worker("", "auto") for i in range(self.processes)}
        spec |= {f"card-{device}": worker(device, 0) for device in _devices()}
        # any port: a second run's scheduler would warn that the usual one is taken
        options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        scheduler = {"cls": Scheduler, "options": options}
        cluster = SpecCluster(spec, scheduler=scheduler, silence_logs=logging.CRITICAL)
        client = self._stack.enter_context(Client(self._stack.enter_context(cluster), set_as_default=False))
        client.wait_for_workers(len(spec))
        return client

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
        return client


def outcome(result: Any) -> Outcome:
    """What `tasks.compile_kernel` came to, also where it came to nothing."""
    return str(result) if isinstance(result, Ended) else result


def _devices() -> list[str]:
    """This machine's cards as CUDA_VISIBLE_DEVICES names them; asks the driver without making a context."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return names if torch.cuda.is_available() else []
