"""tune/workers.py: processes that compile and time, that abort or hang, and workers of another cluster."""

import itertools
import os
import signal
import threading
import time

import pytest
from distributed import LocalCluster

from int8kit import gpus
from int8kit.database.schema import Resources
from int8kit.errors import CheckFailed, InputError
from int8kit.spec import TileConfig
from int8kit.tune import tasks, workers
from int8kit.tune.space import KernelVariant

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("workers-pool")]
FREE = Resources(registers=128, spill_bytes=0, shared_bytes=49152)
KERNEL = KernelVariant(TileConfig(16, 64, 128, 4, 4), True)
DEVICE = "7"


def _describe():
    """A worker that has a device has an H200."""
    return tasks.versions(), gpus.get("h200") if os.environ["CUDA_VISIBLE_DEVICES"] else None


def _where(number, fate):
    if fate == "abort":
        os.abort()
    if fate == "once" and not os.path.exists(number):
        open(number, "w").close()
        os.abort()
    return os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def _as_if_here(patch):
    patch.setattr("int8kit.tune.cluster._devices", lambda: [DEVICE])
    patch.setattr(tasks, "describe", _describe)


@pytest.fixture(scope="module")
def cluster():
    """Two workers that compile and one with a GPU, for all tests, since each start pays the imports."""
    with pytest.MonkeyPatch.context() as patch, workers.Workers(processes=2) as pool:
        _as_if_here(patch)
        pool.gpus()
        patch.undo()
        yield pool


@pytest.fixture
def pool(cluster, monkeypatch):
    """The cluster, after processes that another test ended have been replaced."""
    _as_if_here(monkeypatch)
    deadline = time.monotonic() + 60
    cluster._check_workers()
    while len(cluster._workers) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
        cluster._check_workers()
    return cluster


def _compile_or_die(arch, kernel, launch_code):
    config = kernel.config
    if config.block_k == 32:
        os.abort()
    if config.num_stages == 6:
        time.sleep(60)
    if config.block_k == 256:
        return "compile: no"
    return FREE


def test_a_compiler_that_aborts_or_hangs_costs_one_configuration(pool, monkeypatch):
    monkeypatch.setattr(tasks, "compile_kernel", _compile_or_die)
    monkeypatch.setattr(workers, "LIMIT_S", 2)
    good = [KernelVariant(TileConfig(64, 64, 64, 4, s), True) for s in (2, 3, 4)]
    bad = [KernelVariant(TileConfig(64, 64, k, 4, s), True) for k, s in ((32, 3), (256, 3), (64, 6))]
    compilations = pool.compile_all(86, [*good, *bad])
    assert [compilations[kernel] for kernel in good] == [FREE] * 3
    assert compilations[bad[0]] == "crash: it ended its process"
    assert compilations[bad[1]] == "compile: no"
    assert compilations[bad[2]] == "timeout: not done in 2 s"


def test_workers_of_another_cluster_compile_and_must_have_the_same_toolchain(monkeypatch):
    with LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", env={"TRITON_INTERPRET": "0"}
    ) as other:
        with workers.Workers(other.scheduler_address) as pool:
            ((kernel, compilation),) = pool.compile_all(86, [KERNEL]).items()
        assert kernel == KERNEL
        assert isinstance(compilation, Resources)
        monkeypatch.setattr(tasks, "versions", lambda: "another Triton")
        with (
            workers.Workers(other.scheduler_address) as pool,
            pytest.raises(InputError, match=r"has int8kit .*, but this process has another Triton: install the same"),
        ):
            pool.compile_all(86, [KERNEL])


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "carrier://pigeon"])
def test_no_scheduler_is_one_clear_error(monkeypatch, address):
    monkeypatch.setattr("int8kit.tune.cluster.CONNECT_S", 1)
    with (
        workers.Workers(address) as pool,
        pytest.raises(InputError, match=f"no scheduler with workers at '{address}'.*tcp://host:8786"),
    ):
        pool.compile_all(86, [KERNEL])


def test_calls_for_a_gpu_go_to_its_worker_and_others_elsewhere(pool):
    assert pool.gpus() == [gpus.get("h200")]

    def program(gpu):
        results = yield workers.Batch(_where, [(i, "") for i in range(6)], gpu=gpu)
        more = yield workers.Batch(_where, [], gpu=gpu)
        assert more == {}
        return results

    timed, compiled = pool.drive([program("h200"), program(None)])
    assert {device for device, _ in timed.values()} == {DEVICE}
    assert {device for device, _ in compiled.values()} == {""}
    assert len({pid for _, pid in timed.values()}) == 1
    assert list(map(len, (timed, compiled))) == [6, 6]


def _busy(number):
    """Waits, as the host of a busy GPU does. Returns the device, the start and the end."""
    start = time.time()
    time.sleep(0.5)
    return os.environ["CUDA_VISIBLE_DEVICES"], start, time.time()


@pytest.mark.parametrize("count", [2, 4])
def test_gpus_share_a_batch_evenly_and_at_once(monkeypatch, count):
    monkeypatch.setattr("int8kit.tune.cluster._devices", lambda: [str(i) for i in range(count)])
    monkeypatch.setattr(tasks, "describe", _describe)

    def program():
        return (yield workers.Batch(_busy, [(i,) for i in range(6 * count)], gpu="h200"))

    with workers.Workers(processes=1) as pool:
        assert len(pool.gpus()) == count
        (results,) = pool.drive([program()])
    spans = {}
    for device, start, end in results.values():
        spans.setdefault(device, []).append((start, end))
    assert all(5 <= len(calls) <= 7 for calls in spans.values())
    assert len(spans) == count
    for calls in map(
        sorted, spans.values()
    ):  # a GPU has one call at a time: times of simultaneous calls would be wrong
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(calls))
    wall = max(end for _, _, end in results.values()) - min(start for _, start, _ in results.values())
    speedup = sum(end - start for _, start, end in results.values()) / wall
    assert speedup > 0.75 * count


def test_a_gpu_whose_process_ends_gets_a_new_one(pool, tmp_path):
    seen = []

    def program():
        calls = [("a", "abort"), ("b", ""), (str(tmp_path / "c"), "once"), ("d", "")]
        return (yield workers.Batch(_where, calls, lambda *result: seen.append(result), gpu="h200"))

    (results,) = pool.drive([program()])
    ended = results.pop(("a", "abort"))
    assert str(ended) == "crash: it ended its process"
    assert {device for device, _ in results.values()} == {DEVICE}
    assert len(results) == 3
    assert len(seen) == 4


def test_a_missing_gpu_ends_the_run(pool, monkeypatch):
    monkeypatch.setattr(workers, "NO_WORKER_S", 1)

    def program():
        yield workers.Batch(_where, [(1, "")], gpu="rtx3090")

    with pytest.raises(CheckFailed, match=r"no worker with the GPU 'rtx3090' is left; .* run the same command again"):
        pool.drive([program()])


def test_an_exception_of_a_program_or_a_call_ends_the_run(pool):
    closed = []

    def bad_call():
        try:
            yield workers.Batch(_where, [(1, 2, 3)])
        finally:
            closed.append(1)

    def bad_program():
        yield workers.Batch(_where, [(1, "")])
        raise CheckFailed("no")

    with pytest.raises(TypeError, match="_where"):
        pool.drive([bad_call()])
    with pytest.raises(CheckFailed, match="no"):
        pool.drive([bad_program(), bad_call()])
    assert closed == [1, 1]


def _slow(number):
    time.sleep(0.2)


def test_an_interrupt_ends_the_run_after_reported_results(monkeypatch):
    reported = []

    def on_result(call, result):
        reported.append(call)
        if len(reported) == 3:
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()

    def program():
        yield workers.Batch(_slow, [(i,) for i in range(50)], on_result)

    start = time.monotonic()
    with workers.Workers(processes=2) as pool, pytest.raises(KeyboardInterrupt):
        pool.drive([program()])
    assert 3 <= len(reported) < 50
    assert time.monotonic() - start < 30


def test_a_call_of_a_batch_with_once_is_not_repeated(pool, tmp_path):
    def program():
        return (yield workers.Batch(_where, [(str(tmp_path / "c"), "once")], gpu="h200", once=True))

    ((_, ended),) = pool.drive([program()])[0].items()
    assert isinstance(ended, workers.ProcessEnded)


def test_an_ended_process_halts_its_batch(pool):
    def program():
        calls = [("a", ""), ("b", "abort"), ("c", ""), ("d", "")]
        halted = yield workers.Batch(_where, calls, gpu="h200", once=True, halt=True)
        rest = yield workers.Batch(_where, [call for call in calls if call not in halted], gpu="h200")
        return halted, rest

    halted, rest = pool.drive([program()])[0]
    assert [isinstance(halted[call], workers.ProcessEnded) for call in halted] == [False, True]
    assert [call[0] for call in rest] == ["c", "d"]
