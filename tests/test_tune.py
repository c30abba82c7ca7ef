"""tune/: the space, a card that is absent, the model, the choice, and the processes that compile."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
from distributed import LocalCluster

from int8kit import gpus
from int8kit.schema import Resources
from int8kit.spec import (
    CheckFailed,
    ConfigError,
    GemmShape,
    InputError,
    Kernel,
    Source,
    TileConfig,
    default_config,
    shared_memory_bound,
    why_illegal,
)
from int8kit.tune import offline, search, space, workers

RTX3090 = gpus.get("rtx3090")
SHAPE = GemmShape(4296, 4608, 4608)
FREE = Resources(registers=128, spill_bytes=0, shared_bytes=49152)


@pytest.mark.parametrize("gpu", gpus.GPUS.values(), ids=lambda g: g.alias)
def test_space_is_legal_unique_and_holds_the_default(gpu):
    configs = space.configs(gpu)
    assert len(configs) == len(set(configs)) > 30
    assert all(why_illegal(c, arch=gpu.arch, shared_memory=gpu.shared_memory) is None for c in configs)
    for m in (1, 16, 64, 100, 4096):
        assert default_config(GemmShape(m, 4608, 4608)) in space.candidates(GemmShape(m, 4608, 4608), gpu)


SAMPLE = [
    TileConfig(16, 64, 128, 4, 4),
    TileConfig(64, 64, 128, 4, 5),
    TileConfig(64, 256, 64, 4, 3),
    TileConfig(128, 128, 64, 8, 4),
    TileConfig(128, 128, 128, 8, 4),
    TileConfig(256, 128, 64, 8, 3),
]


AMPERE = [
    TileConfig(128, 128, 128, 4, 3, kernel=Kernel.AMPERE, stream_k=2),
    TileConfig(128, 256, 64, 8, 4, kernel=Kernel.AMPERE),
    TileConfig(16, 64, 128, 4, 4, kernel=Kernel.AMPERE, stream_k=4),
]
HOPPER = [
    TileConfig(128, 128, 128, 8, 6, kernel=Kernel.HOPPER),
    TileConfig(256, 128, 128, 8, 4, kernel=Kernel.HOPPER, stream_k=1),
    TileConfig(64, 64, 128, 8, 10, kernel=Kernel.HOPPER),
]


@pytest.fixture(scope="module", params=[80, 86, 89, 90])
def compiled(request):
    jobs = [(c, even) for c in SAMPLE for even in (True, False)]
    jobs += [(c, True) for c in (HOPPER if request.param == 90 else AMPERE)]
    with workers.Workers() as pool:
        return request.param, dict(pool.compile_all(request.param, jobs))


def test_compiles_for_absent_cards(compiled):
    arch, outcomes = compiled
    assert len(outcomes) == 2 * len(SAMPLE) + 3
    for (config, _), resources in outcomes.items():
        assert isinstance(resources, Resources), resources
        assert 16 <= resources.registers <= 255
        assert resources.spill_bytes == 0
        # the filter may be too strict, never too lax
        assert resources.shared_bytes <= shared_memory_bound(config, arch=arch)


def _instructions(arch, config):
    from int8kit.verify.foreign import tensor_core_instructions

    ptx = offline.assemble(arch, config).asm["ptx"]
    return tensor_core_instructions(ptx), "fma.rn.f32" in ptx, ".ftz" in ptx


@pytest.mark.parametrize(
    ("arch", "config", "instruction"),
    [
        (86, TileConfig(128, 128, 64, 8, 3), "mma.sync"),
        (90, TileConfig(128, 128, 64, 8, 3), "wgmma.mma_async"),
        (86, AMPERE[0], "mma.sync"),
        (90, HOPPER[1], "wgmma.mma_async"),
    ],
    ids=str,
)
def test_runs_on_integer_tensor_cores_and_contracts_nothing(monkeypatch, arch, config, instruction):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # for the child
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found, fma, ftz = pool.apply(_instructions, (arch, config))
    assert found == {instruction}
    assert not fma
    assert not ftz


def test_interpreter_has_no_compiler():
    from int8kit.kernels import gemm

    if gemm.interpreted():
        with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
            offline.compile_for(86, SAMPLE[0])
        assert os.environ["TRITON_INTERPRET"] == "1"


def test_occupancy():
    config = TileConfig(128, 128, 64, 8, 4)
    assert offline.blocks_per_sm(config, FREE, RTX3090) == 2
    assert offline.blocks_per_sm(config, FREE.model_copy(update={"registers": 129}), RTX3090) == 1
    assert offline.blocks_per_sm(config, FREE.model_copy(update={"shared_bytes": 60000}), RTX3090) == 1
    assert offline.blocks_per_sm(config, FREE.model_copy(update={"shared_bytes": 200000}), RTX3090) == 0


def test_model_knows_its_physics():
    config = TileConfig(128, 128, 64, 8, 4)
    us = offline.estimate(SHAPE, config, FREE, RTX3090)
    assert us > SHAPE.ops / RTX3090.int8_tops / 1e6  # never past the card's peak
    assert offline.estimate(GemmShape(2 * 4296, 4608, 4608), config, FREE, RTX3090) > 1.7 * us
    spilling = FREE.model_copy(update={"spill_bytes": 500})
    assert offline.estimate(SHAPE, config, spilling, RTX3090) > us
    # one tile more than fills the card costs a whole round
    full, over = GemmShape(128 * 82, 128, 4608), GemmShape(128 * 82 + 1, 128, 4608)
    rounds = [offline.estimate(s, config, FREE, RTX3090) for s in (full, over)]
    assert rounds[1] > 1.5 * rounds[0]
    no_fit = FREE.model_copy(update={"shared_bytes": 200000})
    assert offline.estimate(SHAPE, config, no_fit, RTX3090) == float("inf")


def test_how_without_a_card(monkeypatch):
    monkeypatch.setattr(search, "present", lambda: None)
    assert search.how(RTX3090) is Source.MODELLED
    monkeypatch.setattr(search, "present", lambda: RTX3090)
    assert search.how(RTX3090) is Source.MEASURED
    monkeypatch.setattr(search, "present", lambda: gpus.get("h200"))
    assert search.how(RTX3090) is Source.PROXY
    assert search.how(gpus.get("rtx5090")) is Source.MODELLED  # sm_120 code does not run on sm_90
    monkeypatch.setattr(search, "present", lambda: gpus.get("a100"))
    assert search.how(RTX3090) is Source.MODELLED  # sm_86 code on sm_80


def _space(**over):
    found = search.Space()
    for config in space.candidates(SHAPE, RTX3090):
        found.resources[config, True] = FREE
    found.total = len(found.resources)
    found.resources.update(over.get("resources", {}))
    return found


def test_choice_is_the_models_first_without_spills(monkeypatch):
    best = search.rank(SHAPE, RTX3090, _space())[0][1]
    entry = search.choose(SHAPE, RTX3090, _space(), Source.MODELLED)
    assert (entry.config, entry.source) == (best, Source.MODELLED)
    assert entry.time_us is None
    spilled = FREE.model_copy(update={"spill_bytes": 8})
    entry = search.choose(SHAPE, RTX3090, _space(resources={(best, True): spilled}), Source.MODELLED)
    assert entry.config != best


def test_choice_without_anything_compiled():
    with pytest.raises(CheckFailed, match=r"no configuration for 4296x4608x4608.*compile: boom"):
        search.choose(SHAPE, RTX3090, search.Space(failed={(SAMPLE[0], True): "compile: boom"}), Source.MODELLED)


def test_odd_k_is_compiled_apart():
    jobs = search.jobs([SHAPE, GemmShape(4296, 4608, 4600)], RTX3090)
    assert {even for _, even in jobs} == {True, False}
    assert len(jobs) == len(set(jobs))


def _compile_or_die(arch, config, even_k):
    if config.block_k == 32:
        os.abort()
    if config.num_stages == 6:
        time.sleep(60)
    if config.block_k == 256:
        return "compile: no"
    return FREE


def test_a_compiler_that_aborts_or_hangs_costs_one_configuration(monkeypatch):
    monkeypatch.setattr(workers, "_compile", _compile_or_die)
    good = [(TileConfig(64, 64, 64, 4, s), True) for s in (2, 3, 4)]
    jobs = [*good, (TileConfig(64, 64, 32, 4, 3), True), (TileConfig(64, 64, 256, 4, 3), True)]
    jobs.append((TileConfig(64, 64, 64, 4, 6), True))
    with workers.Workers(processes=2, limit_s=2) as pool:
        outcomes = dict(pool.compile_all(86, jobs))
    assert [outcomes[job] for job in good] == [FREE] * 3
    assert outcomes[jobs[3]] == "crash: the compiler ended its process"
    assert outcomes[jobs[4]] == "compile: no"
    assert outcomes[jobs[5]] == "timeout: not compiled in 2 s"


def _version_of_the_parent():
    return "parent" if multiprocessing.parent_process() is None else "worker"


def test_a_cluster_of_somebody_elses_compiles_and_is_compared(monkeypatch):
    with LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=None, env={"TRITON_INTERPRET": "0"}
    ) as other:
        with workers.Workers(other.scheduler_address) as pool:
            ((job, outcome),) = pool.compile_all(86, [(SAMPLE[0], True)])
        assert job == (SAMPLE[0], True)
        assert isinstance(outcome, Resources)
        monkeypatch.setattr(workers, "toolchain", _version_of_the_parent)
        with (
            workers.Workers(other.scheduler_address) as pool,
            pytest.raises(InputError, match="has worker; legal is what runs here, parent"),
        ):
            list(pool.compile_all(86, [(SAMPLE[0], True)]))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "carrier://pigeon"])
def test_no_scheduler_is_one_clear_error(monkeypatch, address):
    monkeypatch.setattr(workers, "CONNECT_S", 1)
    with (
        workers.Workers(address) as pool,
        pytest.raises(InputError, match=f"no scheduler with workers at '{address}'.*tcp://host:8786"),
    ):
        list(pool.compile_all(86, [(SAMPLE[0], True)]))


def _slow(arch, config, even_k):
    time.sleep(0.2)
    return FREE


def test_an_interrupt_keeps_what_is_compiled(monkeypatch):
    monkeypatch.setattr(workers, "_compile", _slow)
    steps = []

    def step(job, outcome):
        steps.append(1)
        if len(steps) == 3:
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()

    with workers.Workers(processes=2) as pool:
        found = search.compile_space([SHAPE], RTX3090, pool, on_outcome=step)
    assert not found.complete
    assert 3 <= len(found.resources) < found.total
    entry = search.choose(SHAPE, RTX3090, found, Source.MODELLED)
    assert entry.tried == len(found.resources)
