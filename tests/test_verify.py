"""verify/: broken kernels must be caught with a small example, and sound kernels must pass."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from int8kit import gpus, reference
from int8kit.database.database import Database
from int8kit.database.schema import Entry, Resources
from int8kit.errors import InputError
from int8kit.kernels import gemm, quantize
from int8kit.spec import GemmShape, Kernel, Operation, Source, TileConfig, legal_configs
from int8kit.verify import executors, process_pool, property_runs, runner, verify_kernels
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples import fixed, strategies
from int8kit.verify.gpu_memory import TRIES, with_memory
from int8kit.verify.properties import entries
from int8kit.verify.properties.budget import Share

CONFIGS = (TileConfig(64, 32, 64, 4, 3),)
EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]


def entry(config=CONFIGS[0], **shape):
    return Entry(
        **shape, config=config, source=Source.MODELLED, triton="3.7.1", kernel="k", tried=1,
        resources=Resources(registers=1, spill_bytes=0, shared_bytes=0),
    )  # fmt: skip


GOOD, BAD = entry(m=100, n=40, k=200), entry(m=100, n=48, k=200)
BASE = Database(gpus.get("rtx3090"), (GOOD, BAD))


def verdict(name, examples=40):
    """The failure of a property of int8kit's kernels, or None."""
    result = verify_kernels.run(name, EXECUTOR, BASE, examples=examples)[0]
    assert result.raised is None, result.failure  # an exception is no difference, and may be a mistake of the test
    return result.failure


def _swapped(xq, wq, sx, sw, bias=None, *, config, out, arch=None, out_dtype=None):
    y = (reference.accumulate(xq, wq).float() * sw) * sx[:, None]
    return out.copy_(y if bias is None else y + bias.float())


def _fused(xq, wq, sx, sw, bias=None, *, config, out, arch=None, out_dtype=None):
    y = (reference.accumulate(xq, wq).float() * sx[:, None]).double() * sw.double()
    return out.copy_((y if bias is None else y + bias.double()).float())


def _past_the_edge(xq, wq, sx, sw, bias=None, *, config, out, arch=None, out_dtype=None):
    out.copy_(reference.scaled_mm(xq, wq, sx, sw, bias, out_dtype=out.dtype))
    m, n = out.shape
    out.as_strided((m + 1, n), out.stride())[m] = 0
    return out


@pytest.mark.parametrize("broken", [_swapped, _fused, _past_the_edge])
def test_wrong_epilogue_is_caught(monkeypatch, broken):
    monkeypatch.setattr(gemm, "scaled_mm", broken)
    assert verdict("output")


def _tail(xq, wq, *, config, out, arch=None):
    k = max(1, xq.shape[1] // config.block_k) * config.block_k
    return out.copy_(reference.accumulate(xq[:, :k], wq[:, :k]))


def _short(xq, wq, *, config, out, arch=None):
    return out.copy_(reference.accumulate(xq, wq).to(torch.float16).to(torch.int32))


def _single(xq, wq, *, config, out, arch=None):
    return out.copy_(reference.accumulate(xq, wq).float().to(torch.int32))


def _toward_zero(xq, wq, sx, sw, bias=None, *, config, out, arch=None, out_dtype=None):
    acc = reference.accumulate(xq, wq)
    single = acc.float()
    over = single.double() > acc.double()  # rounded up; all sums are positive
    single = torch.where(over, (single.view(torch.int32) - 1).view(torch.float32), single)
    y = (single * sx[:, None]) * sw
    return out.copy_(y if bias is None else y + bias.float())


@pytest.mark.slow
def test_sums_beyond_float32_are_caught(monkeypatch):
    monkeypatch.setattr(gemm, "accumulate", _single)
    monkeypatch.setattr(gemm, "scaled_mm", _toward_zero)
    assert verdict("accumulator")
    assert verdict("output")


@pytest.mark.parametrize("broken", [_tail, _short])
def test_wrong_sum_is_caught_by_a_small_example(monkeypatch, broken):
    monkeypatch.setattr(gemm, "accumulate", broken)
    failure = verdict("accumulator")
    assert failure
    shape = GemmShape(*map(int, failure.split(",")[0].split("x")))
    assert shape.m == shape.n == 1  # shrunk


def _drops_nan(x, out=None, tile=None):
    q, s = reference.quantize(x.nan_to_num(0.0))
    return q, s


def _reciprocal(x, out=None, tile=None):
    _, s = reference.quantize(x)
    q = (x.float() * (1 / s)[:, None]).round().clamp(-127, 127)
    return torch.where((s > 0)[:, None], q, 0.0).to(torch.int8), s


def _first_chunk(x, out=None, tile=None):
    q, _ = reference.quantize(x)
    return q, reference.quantize(x[:, : quantize.LONG_CHUNK])[1]


@pytest.mark.parametrize("broken", [_drops_nan, _reciprocal, _first_chunk])
def test_wrong_quantization_is_caught(monkeypatch, broken):
    monkeypatch.setattr(quantize, "quantize", broken)
    assert verdict("quantize", examples=100)


def test_exception_in_a_kernel_is_a_failure_without_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(gemm, "accumulate", broken)
    result, _ = verify_kernels.run("accumulator", EXECUTOR, BASE, examples=40)
    assert "RuntimeError: no such instruction" in result.failure
    assert result.raised == "RuntimeError"


def test_entries_are_stamped_only_if_they_pass(monkeypatch):
    result, stamps = verify_kernels.run("entries", EXECUTOR, BASE)
    assert result.failure is None
    assert set(stamps) == {GOOD.key, BAD.key}
    assert stamps[GOOD.key][0].kernel == gemm.kernel_hash()

    whole = entries.check_entry
    monkeypatch.setattr(entries, "check_entry", lambda e, x: "differs" if e.n == 48 else whole(e, x))
    result, stamps = verify_kernels.run("entries", EXECUTOR, BASE)
    assert result.failure == "differs"
    assert set(stamps) == {GOOD.key}


def test_an_entry_of_swiglu_is_checked_with_that_epilogue(monkeypatch):
    gated = GOOD.model_copy(update={"operation": Operation.SWIGLU, "n": 64})
    assert entries.check_entry(gated, EXECUTOR) is None
    whole = gemm.scaled_mm_swiglu
    monkeypatch.setattr(gemm, "scaled_mm_swiglu", lambda *args, **options: whole(*args, **options).neg_())
    assert entries.check_entry(GOOD, EXECUTOR) is None
    assert "differ" in entries.check_entry(gated, EXECUTOR)


def test_more_configurations_are_drawn_too():
    more = legal_configs(86, gpus.get("rtx3090").shared_memory)
    seen = []
    verify_kernels.run("batch", EXECUTOR, BASE, examples=150, more=more, on_example=lambda d: seen.append(d.config))
    known = {*CONFIGS, *fixed.SMALL_TILES}
    assert len(set(seen) - known) > 5
    assert all(config.kernel is Kernel.TRITON for config in seen)  # the other kernels need a GPU


def _crashes(run, report):
    report((f"an example of {run.name}", None))
    if run.name == "output":
        os.abort()
    return runner.Result(run.name, str(run.executor), 1), {}


@pytest.mark.process
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_crash_is_a_failure_with_its_example(processes):
    runs = [property_runs.PropertyRun(name, EXECUTOR) for name in ("accumulator", "output", "entries")]
    seen = []
    findings = property_runs.run_all(runs, _crashes, processes=processes, on_example=lambda: seen.append(1))
    assert [r.name for r, _ in findings] == ["accumulator", "output", "entries"]
    assert [r.failure for r, _ in findings] == [
        None, "an example of output: the kernel ended its process (SIGABRT)", None,
    ]  # fmt: skip
    assert len(seen) == 3


def _hangs(run, report):
    report((f"an example of {run.name}", None))
    if run.name == "output":
        while True:
            time.sleep(60)
    return runner.Result(run.name, str(run.executor), 1), {}


@pytest.mark.process
def test_hang_is_a_failure_with_its_example(monkeypatch):
    """The other properties run meanwhile. Then the limit is set to a second, because no further child has to start."""
    seen = []

    def on_example():
        seen.append(1)
        if len(seen) == 3:
            monkeypatch.setattr(process_pool, "SILENCE_S", 1.0)

    runs = [property_runs.PropertyRun(name, EXECUTOR) for name in ("output", "accumulator", "entries")]
    findings = property_runs.run_all(runs, _hangs, processes=2, on_example=on_example)
    assert [r.failure for r, _ in findings] == ["an example of output: no end in 1 s", None, None]


def _work(how, report):
    report(how)
    if how == "raise":
        raise ValueError("planted")
    if how == "exit":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    return os.getpid()


@pytest.mark.process
def test_process_pool_reports_how_each_call_ended():
    calls = [process_pool.Call(_work, how) for how in ("return", "raise", "return", "exit", "return")]
    endings = process_pool.run_all(calls, processes=1)
    assert [(e.kind, e.detail) for e in endings] == [
        ("done", ""), ("raised", "ValueError: planted"), ("done", ""), ("exited", "last words"), ("done", ""),
    ]  # fmt: skip
    assert [e.reports for e in endings] == [(call.argument,) for call in calls]
    assert endings[0].result == endings[2].result  # an exception does not end the child
    assert endings[4].result != endings[0].result


@pytest.mark.process
def test_process_pool_ends_its_children_if_a_callback_raises():
    """As an interrupt does: the child that is inside a call is gone, and so is its place."""
    seen, closed = [], []

    @contextlib.contextmanager
    def open_place(index):
        yield process_pool.Place()
        closed.append(index)

    def on_report(index, pid):
        seen.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process_pool.run_all([process_pool.Call(_wait, None)], open_place=open_place, on_report=on_report)
    assert closed == [0]
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


def _wait(_, report):
    report(os.getpid())
    time.sleep(60)


def _report_for_ever(_, report):
    while True:
        with contextlib.suppress(Exception):  # as a property does with the exceptions of a kernel
            report(0)


@pytest.mark.process
def test_child_exits_if_its_parent_is_gone():
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        command = [*process_pool.COMMAND, str(theirs.fileno())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    with ours:
        ours.send((_report_for_ever, None))
        assert ours.recv() == ("report", 0)
    assert child.wait(timeout=60) == 1


def _raises(run, report):
    raise ImportError("no such library")


@pytest.mark.process
def test_exception_outside_of_an_example_is_a_failure():
    [(result, stamps)] = property_runs.run_all([property_runs.PropertyRun("output", EXECUTOR)], _raises)
    assert result.failure == "before its first example: ImportError: no such library"
    assert stamps == {}


@pytest.mark.process
def test_result_from_a_child_process_is_the_same():
    runs = [property_runs.PropertyRun("batch", EXECUTOR)]
    [(result, _)] = property_runs.run_all(runs, property_runs.VerifyKernels(BASE, examples=20))
    assert result.failure is None
    assert result == verify_kernels.run("batch", EXECUTOR, BASE, examples=20)[0]


def test_shares_try_every_example_once():
    shares = [Share(number, 3) for number in range(3)]
    assert sorted(one for share in shares for one in share.pick(range(8))) == list(range(8))
    assert [share.count(8) for share in shares] == [3, 3, 2]
    assert [share.count(1) for share in shares] == [1, 1, 1]


def test_shares_of_entries_check_every_entry(monkeypatch):
    other = entry(TileConfig(32, 32, 64, 4, 3), m=100, n=56, k=200)
    base = Database(gpus.get("rtx3090"), (GOOD, BAD, other))
    monkeypatch.setattr(Database, "usable_entries", lambda self, toolchain: self.entries)
    monkeypatch.setattr(entries, "check_entry", lambda one, executor: None)
    seen = [len(entries.run(EXECUTOR, base, share=Share(number, 2))[1]) for number in range(2)]
    assert sorted(seen) == [1, 2]  # by configuration


def test_a_gpu_shares_the_properties_that_compile_most():
    native = executors.Executor("native", "cuda", "a GPU", code=90)
    runs = [property_runs.PropertyRun(name, native) for name in ("output", "batch", "entries")]
    assert [run.name for run in property_runs.divided(runs)] == [*["output"] * 6, "batch", *["entries"] * 4]
    assert property_runs.divided([property_runs.PropertyRun("output", EXECUTOR)]) == [
        property_runs.PropertyRun("output", EXECUTOR)
    ]


def _fails_in_the_second_share(run, report):
    failure = f"share {run.share.number}" if run.share.number else None
    return runner.Result(run.name, str(run.executor), 5, failure), {run.share.number: []}


@pytest.mark.process
def test_findings_of_shares_are_joined():
    runs = [property_runs.PropertyRun("output", EXECUTOR, Share(number, 3)) for number in range(3)]
    [(result, stamps)] = property_runs.run_all(runs, _fails_in_the_second_share)
    assert result == runner.Result("output", str(EXECUTOR), 15, "share 1")
    assert set(stamps) == {0, 1, 2}


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 4296, 16584])
def test_reduced_keeps_the_tails(size):
    config = CONFIGS[0]
    small = entries.reduced(GemmShape(size, size, size), config)
    assert small.m <= 2 * 64
    assert small.k <= 3 * 64
    for extent, block in ((small.m, 64), (small.n, 32), (small.k, 64)):
        assert extent % block == size % block
        assert extent <= size


def test_bitwise_diff():
    a = torch.tensor([0.0, 1.0, torch.nan])
    assert bitwise_diff(a, a.clone()) is None
    assert bitwise_diff(-a, a.abs()) == "2 of 3 differ, first [0]: got -0.0, want 0.0"
    assert "got -0.0, want 0.0" in bitwise_diff(torch.tensor([-0.0]), torch.tensor([0.0]))
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert bitwise_diff(nan, torch.tensor([torch.nan])) is None
    assert bitwise_diff(torch.tensor([1.0]), torch.tensor([torch.nan]))


def test_data_kinds():
    kinds = {k: strategies.int8_matrix(9, 50, k, 0, "cpu") for k in strategies.INT8_KINDS}
    assert set(kinds["extremes"].unique().tolist()) == {-128, -127, 127}
    assert (kinds["all minus 128"] == -128).all()
    assert kinds["normal"].abs().max() <= 127
    for kind in ("nan", "inf"):
        special = ~strategies.float_matrix(4, 9, kind, 0, torch.bfloat16, "cpu").isfinite()
        assert special.any(dim=1).tolist() == [False, True, False, True]
    subnormal = strategies.float_matrix(4, 200, "subnormal", 0, torch.float32, "cpu")
    assert 0 < subnormal.abs().max() < 2**-126
    assert subnormal.min() < 0


def test_available_executors(monkeypatch):
    monkeypatch.setattr(gemm, "interpreted", lambda: False)
    monkeypatch.setattr(executors, "present", lambda: None)
    with pytest.raises(InputError, match="no CUDA device"):
        executors.available(gpus.get("rtx3090"))
    monkeypatch.setattr(executors, "present", lambda: gpus.get("h200"))
    assert [e.arch for e in executors.available(gpus.get("rtx3090"))] == ["sm86", None]
    assert [e.on for e in executors.available(gpus.get("rtx3090"))] == ["cross_arch", "native"]
    assert [e.arch for e in executors.available(gpus.get("h200"))] == [None]


def test_hypothesis_keeps_its_files_in_the_cache_folder():
    """Its default, .hypothesis, would be left in every working folder."""
    code = (
        "from int8kit.verify import runner\nfrom hypothesis.configuration import storage_directory\n"
        "print(storage_directory('constants', intent_to_write=False).path)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HYPOTHESIS_STORAGE_DIRECTORY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip().endswith("int8kit/hypothesis/constants")


def test_an_example_waits_for_the_memory_of_other_children():
    tries = iter([torch.OutOfMemoryError("full"), torch.OutOfMemoryError("full"), None])

    def check():
        if error := next(tries):
            raise error
        return "differs"

    assert with_memory(check, pause=0) == "differs"


def test_memory_that_stays_full_is_a_failure():
    seen = []

    def check():
        seen.append(1)
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        with_memory(check, pause=0)
    assert len(seen) == TRIES
