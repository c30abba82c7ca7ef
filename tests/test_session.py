"""tune/session.py: whole runs with invented GPUs and times, some of them killed or with crashing kernels."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from measured import exhaustive

from int8kit import cost_model, gpus
from int8kit.database import store
from int8kit.database.database import Database
from int8kit.database.schema import Resources
from int8kit.errors import CheckFailed, FileError
from int8kit.spec import GemmShape, Kernel, Source, default_config, shared_memory_bound
from int8kit.timing.interleave import Times
from int8kit.tune import search, session, space
from int8kit.tune.search import RoundTimes
from int8kit.tune.workers import ProcessEnded

RTX3090, H200 = gpus.get("rtx3090"), gpus.get("h200")
SHAPES = [GemmShape(m, n, k) for m in (512, 4296) for n, k in ((4608, 4608), (12288, 4608), (4608, 12288))]


def taken(config, arch=86):
    shared = shared_memory_bound(config, arch=arch)
    registers = min(255, 60 + config.block_m * config.block_n // (32 * config.num_warps))
    return Resources(registers=registers, spill_bytes=0, shared_bytes=shared)


def truth(shape, config, gpu=RTX3090):
    """Invented microseconds: the model's estimate, changed by a factor for each parameter's value, as on a GPU."""
    us = cost_model.estimate(shape, config, taken(config, gpu.arch), gpu)
    for name in ("block_m", "block_n", "block_k", "num_warps", "num_stages", "stream_k", "group_m", "kernel"):
        value = f"{name} {getattr(config, name)} {shape.n} {shape.k}"
        us *= 1 + 0.08 * (hashlib.sha256(value.encode()).digest()[0] / 255 - 0.5)
    return us


class Pool:
    """Executes calls in this process, at once, by its own functions. gpus: one for each worker.

    lethal: whether a configuration ends its process.
    """

    def __init__(self, *gpus, lethal=lambda shape, config: False):
        self.present, self.lethal, self.calls = list(gpus), lethal, Counter()

    def gpus(self):
        return self.present

    def drive(self, programs):
        running = dict.fromkeys(programs)
        outcomes = {}
        try:
            while running:
                for program, results in list(running.items()):
                    try:
                        batch = program.send(results)
                    except StopIteration as end:
                        outcomes[program] = end.value
                        del running[program]
                        continue
                    assert batch.gpu is None or batch.gpu in {gpu.alias for gpu in self.present}
                    running[program] = {}
                    for call in batch.calls:
                        result = getattr(self, batch.function.__name__)(*call)
                        running[program][call] = result
                        batch.on_result(call, result)
                        if batch.halt and isinstance(result, ProcessEnded):
                            break
        finally:
            for program in running:
                program.close()
        return [outcomes[program] for program in programs]

    def compile_kernel(self, arch, kernel, launch_code):
        self.calls["compile", arch, kernel] += 1
        return taken(kernel.config, arch)

    def health(self, number):
        return 700.0, None

    def time_configs(self, shape, arch, configs, rounds, sustained, bf16):
        if any(self.lethal(shape, config) for config in configs):
            self.calls["ended"] += 1
            return ProcessEnded("crash", 1)
        self.calls["time", shape, arch, rounds, sustained, configs] += 1
        times = {c: Times(us * 0.999, us, us * 1.001) for c in configs for us in [truth(shape, c)]}
        last = Times(900, 900, 900) if bf16 else None
        return RoundTimes(times, {}, last)

    def try_alone(self, shape, arch, config):
        if not self.lethal(shape, config):
            return None
        self.calls["ended alone", space.variant_of(config, shape)] += 1
        return ProcessEnded("timeout", 1)


@pytest.fixture(autouse=True)
def _an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def unknown(monkeypatch):
    """The tuner finds an empty database."""
    monkeypatch.setattr(store, "merged_view", lambda gpu, toolchain: (Database(gpu), ()))


def proxy(path):
    return session.targets_of([RTX3090], [H200], path)


def test_search_finds_a_near_optimum_with_a_tenth_of_the_evaluations(tmp_path, unknown):
    (result,) = session.tune(SHAPES, proxy(tmp_path / "t.json"), Pool(H200))
    assert result.failed == {}
    regrets = []
    for entry in result.entries:
        every = [c for c in space.legal(RTX3090) if space.suits(c, entry.shape)]
        best = min(truth(entry.shape, c) for config in every for c in (config, *swizzled(config)))
        regrets.append(truth(entry.shape, entry.config) / best - 1)
        assert entry.tried <= 0.1 * len(every) * len(space.SWIZZLE_WIDTHS)
        assert entry.time_us == pytest.approx(truth(entry.shape, entry.config), rel=1e-3)
        assert entry.default_us == pytest.approx(truth(entry.shape, default_config(entry.shape)), rel=1e-3)
    assert sorted(regrets)[len(regrets) // 2] < 0.03
    assert max(regrets) < 0.10


def swizzled(config):
    return [replace(config, group_m=width) for width in space.SWIZZLE_WIDTHS]


def test_an_entry_names_its_source_and_its_runners_up(tmp_path):
    (result,) = session.tune(SHAPES[:1], proxy(tmp_path / "t.json"), Pool(H200))
    (entry,) = store.load(tmp_path / "t.json").entries
    assert [entry] == [one.with_id() for one in result.entries]
    assert (entry.source, entry.measured_on, entry.bf16_us) == (Source.PROXY, "NVIDIA H200", 900)
    assert 0 < len(entry.runners_up) <= search.RUNNERS_UP
    times = [entry.time_us, *(o.time_us for o in entry.runners_up)]
    assert entry.time_us <= min(times) * (1 + search.MARGIN)


def test_a_hanging_kernel_is_tried_alone_once_for_all_shapes(tmp_path):
    def lethal(shape, config):
        return config.kernel is Kernel.MMA_SYNC and config.num_stages == 3

    pool = Pool(H200, lethal=lethal)
    (result,) = session.tune(SHAPES, proxy(tmp_path / "t.json"), pool)
    assert result.failed == {}
    assert not any(lethal(e.shape, e.config) for e in result.entries)
    alone = {key[1:]: count for key, count in pool.calls.items() if key[0] == "ended alone"}
    assert alone
    assert set(alone.values()) == {1}
    assert pool.calls["ended"] <= len(alone)


def test_a_configuration_that_ends_its_process_is_never_chosen(tmp_path):
    def lethal(shape, config):
        return shape == SHAPES[0] and config.kernel is Kernel.MMA_SYNC and config.num_stages == 3

    (result,) = session.tune(SHAPES, proxy(tmp_path / "t.json"), Pool(H200, lethal=lethal))
    assert result.failed == {}
    assert len(result.entries) == len(SHAPES)
    assert result.rejected["timeout"] > 1
    first = next(e for e in result.entries if e.shape == SHAPES[0])
    assert not any(lethal(first.shape, c) for c in (first.config, *(o.config for o in first.runners_up)))


def test_a_shape_whose_default_ends_its_process_fails_alone(tmp_path):
    def lethal(shape, config):
        return shape == SHAPES[2] and config == default_config(shape)

    (result,) = session.tune(SHAPES, proxy(tmp_path / "t.json"), Pool(H200, lethal=lethal))
    assert "the default configuration failed: timeout" in result.failed[SHAPES[2]]
    assert len(store.load(tmp_path / "t.json").entries) == len(SHAPES) - 1


@pytest.mark.parametrize("after", [1, 3, 8, 14, 20])
def test_a_resumed_run_repeats_nothing_and_gives_the_same_database(tmp_path, monkeypatch, after):
    straight = tmp_path / "straight.json"
    session.tune(SHAPES, proxy(straight), Pool(H200))
    pool, path = Pool(H200), tmp_path / "killed.json"
    time_configs = pool.time_configs

    def ending(*call):
        if sum(count for key, count in pool.calls.items() if key[0] == "time") == after:
            raise SystemExit("killed")
        return time_configs(*call)

    monkeypatch.setattr(pool, "time_configs", ending)
    with pytest.raises(SystemExit):
        session.tune(SHAPES, proxy(path), pool)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    notes = []
    session.tune(SHAPES, proxy(path), pool, note=notes.append)
    assert "resuming an interrupted run" in notes[0]
    assert set(pool.calls.values()) == {1}
    assert path.read_text() == straight.read_text()
    assert not path.with_name("killed.json.journal").exists()


def test_each_target_has_its_own_file(tmp_path):
    rtx4090, rtx5090 = gpus.get("rtx4090"), gpus.get("rtx5090")
    targets = session.targets_of([RTX3090, H200, rtx4090, rtx5090], [H200])
    assert [t.code_arch for t in targets] == ["sm86", None, "sm89", None]
    pool = Pool(H200)
    results = session.tune(SHAPES[:2], targets, pool)
    assert [r.target.source for r in results] == [Source.PROXY, Source.MEASURED, Source.PROXY, Source.MODELLED]
    for result in results:
        found = store.load(store.user_path(result.target.gpu.alias))
        assert len(found.entries) == 2
        assert {e.source for e in found.entries} == {result.target.source}
    assert {key[1] for key in pool.calls if key[0] == "compile"} == {86, 89, 90, 120}


def test_a_locked_target_stops_the_run_before_anything_is_timed(tmp_path):
    from int8kit.tune.journal import Journal

    targets = session.targets_of([RTX3090, H200], [H200])
    (tmp_path / "tuning_db").mkdir()
    pool = Pool(H200)
    with Journal(targets[1].path, {}), pytest.raises(FileError, match="another tuner is writing"):
        session.tune(SHAPES, targets, pool)
    assert not any(key[0] == "time" for key in pool.calls)
    with Journal(targets[0].path, {}):  # its lock is free again
        pass


def test_an_unhealthy_gpu_stops_the_run(monkeypatch):
    notes = []
    session.check_health(Pool(H200, H200), notes.append)
    assert notes == ["NVIDIA H200: 700 bf16 TFLOP/s, healthy"] * 2
    monkeypatch.setattr(Pool, "health", lambda self, number: (8.0, "NVIDIA H200 reaches 8"))
    with pytest.raises(CheckFailed, match="reaches 8"):
        session.check_health(Pool(H200))


def test_the_entries_of_the_file_are_sorted(tmp_path):
    session.tune(SHAPES, proxy(tmp_path / "t.json"), Pool(H200))
    document = json.loads((tmp_path / "t.json").read_text())
    keys = [(e["n"], e["k"], e["m"]) for e in document["entries"]]
    assert keys == sorted(keys)


def test_only_the_triton_kernel_is_compiled_apart_for_an_odd_k(tmp_path, unknown):
    pool = Pool(H200)
    shapes = [GemmShape(512, 4608, 4608), GemmShape(512, 4608, 4624)]  # 4624 is a multiple of 16 and not of 64
    session.tune(shapes, proxy(tmp_path / "t.json"), pool)
    variants = Counter(key[2].config for key in pool.calls if key[0] == "compile")
    assert {count for config, count in variants.items() if config.kernel is Kernel.MMA_SYNC} == {1}
    assert 2 in {count for config, count in variants.items() if config.kernel is Kernel.TRITON}


MEASURED = exhaustive("2026-11-23-h200-exhaustive-rtx3090.json")


class Replayed(Pool):
    """The times of an exhaustive run, which had one L2 swizzle width, with 1 % of noise."""

    def __init__(self, *gpus):
        super().__init__(*gpus)
        self.noise = random.Random(0)

    def compile_kernel(self, arch, kernel, launch_code):
        return next((m[kernel.config][1] for m in MEASURED.values() if kernel.config in m), "compile: spills")

    def time_configs(self, shape, arch, configs, rounds, sustained, bf16):
        us = {c: MEASURED[shape][replace(c, group_m=8)][0] * self.noise.gauss(1, 0.01) for c in configs}
        return RoundTimes(
            {c: Times(t * 0.99, t, t * 1.01) for c, t in us.items()}, {}, Times(1, 1, 1) if bf16 else None
        )


@pytest.mark.parametrize("shape", list(MEASURED), ids=str)
def test_search_finds_the_best_of_measured_times(tmp_path, unknown, shape):
    (result,) = session.tune([shape], proxy(tmp_path / "t.json"), Replayed(H200))
    (entry,) = result.entries
    best = min(us for us, _ in MEASURED[shape].values())
    assert MEASURED[shape][replace(entry.config, group_m=8)][0] <= best * 1.01
    assert entry.tried <= 0.01 * len(MEASURED[shape]) * len(space.SWIZZLE_WIDTHS)
