"""The dask cluster whose workers compile and time: one of this machine, or one that is there already.

    client = local(processes, stack)        # or remote("tcp://host:8786", stack)

The cluster lives until the caller closes the `ExitStack`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from multiprocessing import resource_tracker
from typing import Any

from int8kit.errors import InputError

CONNECT_S = 10

_CONFIG = {
    "distributed.scheduler.allowed-failures": 0,  # `Workers` itself tries a call again that ended its worker
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.scheduler.active-memory-manager.start": False,
    # a nanny restarts a worker; by default the cluster gives up a worker that is down 15 s after an earlier end
    "distributed.deploy.lost-worker-timeout": "1000 days",
}
# Ctrl-C reaches the whole process group; only the parent handles it. `_deaf_loop` covers the time before the preload
_PRELOAD = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


def configure(stack: contextlib.ExitStack) -> None:
    """Set dask's options until `stack` closes."""
    import dask
    import distributed  # noqa: F401  imported before _CONFIG is set: leaving _CONFIG would undo its defaults

    stack.enter_context(dask.config.set(_CONFIG))
    logging.getLogger("distributed").setLevel(logging.CRITICAL)


def local(processes: int, stack: contextlib.ExitStack) -> Any:
    """A client of a new cluster: `processes` workers that compile, and one that times for each GPU of this machine."""
    from distributed import Client, Nanny, Scheduler, SpecCluster

    def worker(devices: str, memory_limit: Any) -> dict[str, Any]:
        env = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices}
        options = {"nthreads": 1, "host": "127.0.0.1", "dashboard": False, "preload": _PRELOAD, "env": env,
                   "memory_limit": memory_limit, "silence_logs": logging.CRITICAL}  # fmt: skip
        return {"cls": Nanny, "options": options}

    spec = {f"core-{i}": worker("", "auto") for i in range(processes)}
    spec |= {f"gpu-{device}": worker(device, 0) for device in _devices()}
    # any free port: a second run's scheduler would warn that the usual one is taken
    options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    scheduler = {"cls": Scheduler, "options": options}
    loop = _deaf_loop()
    stack.callback(loop.stop)
    cluster = SpecCluster(spec, scheduler=scheduler, silence_logs=logging.CRITICAL, loop=loop.loop)
    client = stack.enter_context(Client(stack.enter_context(cluster), set_as_default=False))
    client.wait_for_workers(len(spec))
    return client


def remote(address: str, stack: contextlib.ExitStack) -> Any:
    """A client of the cluster whose scheduler has this address. Raises InputError if none answers."""
    from distributed import Client

    try:
        client = stack.enter_context(Client(address, timeout=CONNECT_S, set_as_default=False))
        client.wait_for_workers(1, timeout=CONNECT_S)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"no scheduler with workers at {address!r} ({reason}): expected the address that `dask scheduler` "
            "prints, such as tcp://host:8786"
        ) from None
    return client


def _deaf_loop() -> Any:
    """A running event loop in a thread with Ctrl-C blocked. The processes that it starts inherit that from the thread.

    A process would else print a traceback if Ctrl-C arrived before its preload. multiprocessing starts its resource
    tracker with the first process and then unblocks Ctrl-C in that thread, so the tracker starts before.
    """
    from distributed.utils import LoopRunner

    runner = LoopRunner()
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        runner.start()
        return runner
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return runner


def _devices() -> list[str]:
    """This machine's GPUs as CUDA_VISIBLE_DEVICES names them; asks the driver without creating a context."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return names if torch.cuda.is_available() else []
