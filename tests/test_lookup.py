"""lookup.py: the levels of the lookup, the same for every caller; and the text form of a plan."""

import random
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_spec import CONFIGS

from int8kit import files, gpus, lookup, ops
from int8kit.bench import contestants
from int8kit.cost_model import Needs, machine_of
from int8kit.database import store
from int8kit.errors import ConfigError
from int8kit.kernels import gemm
from int8kit.lookup import Candidate, Level, Plan
from int8kit.ranking import Evidence, Ranked, Ranking
from int8kit.spec import (
    GemmShape,
    Kernel,
    Operation,
    Schedule,
    TileConfig,
    default_config,
    kernels_of,
    legal_configs,
    why_illegal,
)
from int8kit.toolchain import ANY_TOOLCHAIN, Toolchain

LOW, HIGH = TileConfig(64, 64, 64, 4, 3), TileConfig(128, 128, 64, 8, 3)
SHAPES = st.builds(GemmShape, st.integers(1, 70000), st.integers(1, 70000), st.integers(1, 131071))
CANDIDATES = st.lists(st.builds(Candidate, SHAPES, CONFIGS, st.sampled_from(Operation)), max_size=5)
DATABASES = sorted(files.shipped("tuning_db").glob("*.json"))


MACHINE = "machine 90,132,232448,233472,2048,52428800,4800,5500,1980,1979"
H200 = machine_of(gpus.get("h200"))
NEEDS = st.builds(Needs, st.integers(0, 255), st.integers(0, 99), st.integers(0, 232448))
RANKINGS = st.builds(
    Ranking,
    st.builds(H200._replace, sms=st.integers(1, 200), dram_gb_s=st.sampled_from((936, 939.25))),
    st.lists(st.builds(Ranked, CONFIGS, NEEDS, st.booleans()), max_size=4).map(tuple),
    st.sampled_from((None, H200)),
    st.lists(st.builds(Evidence, SHAPES, CONFIGS), max_size=2).map(tuple),
)


@given(CANDIDATES, st.integers(1, 200), st.none() | RANKINGS)
def test_plan_round_trips_through_its_text(candidates, sms, ranking):
    plan = Plan(tuple(candidates), sms, ranking)
    assert Plan.from_text(plan.text) == plan
    assert Plan.from_text(plan.text).text == plan.text


def test_text_of_a_plan_names_kernels():
    """Exported graphs contain the text, so a new kernel must not change the meaning of an old text."""
    config = TileConfig(256, 128, 128, 8, 4, 12, Kernel.WGMMA, 1)
    plan = Plan((Candidate(GemmShape(4296, 12288, 4608), config),), 132)
    assert plan.text == "int8kit.plan/2;132;gemm 4296x12288x4608 wgmma 256,128,128,8,4,12,1"
    unusual = Plan((Candidate(GemmShape(4296, 12288, 4608), UNUSUAL),), 132)
    assert unusual.text == "int8kit.plan/2;132;gemm 4296x12288x4608 wgmma 256,64,128,8,4,8,0 pingpong"


UNUSUAL = TileConfig(256, 64, 128, 8, 4, kernel=Kernel.WGMMA, schedule=Schedule.PINGPONG)


@pytest.mark.parametrize(("arch", "shared_memory"), [(86, 101376), (90, 232448)])
def test_every_legal_configuration_survives_the_text(arch, shared_memory):
    legal = legal_configs(arch, shared_memory)
    scheduled = [replace(c, schedule=s) for c in legal if c.kernel is Kernel.WGMMA for s in Schedule]
    both = {*legal, *(c for c in scheduled if why_illegal(c, arch=arch, shared_memory=shared_memory) is None)}
    assert {c.kernel for c in both} == set(kernels_of(arch))
    assert (UNUSUAL in both) is (arch == 90)
    plan = Plan(tuple(Candidate(GemmShape(1, 1, 1), config) for config in sorted(both, key=str)), 132)
    assert Plan.from_text(plan.text) == plan


OTHER = {"kernel": Kernel.MMA_SYNC, "schedule": Schedule.COOPERATIVE}


@pytest.mark.parametrize("name", [field.name for field in fields(TileConfig)])
def test_every_field_of_a_configuration_is_in_the_text(name):
    changed = replace(UNUSUAL, **{name: OTHER.get(name, 3)})
    one, other = (Plan((Candidate(GemmShape(1, 1, 1), config),)) for config in (UNUSUAL, changed))
    assert one.text != other.text
    assert Plan.from_text(other.text) == other


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "format ''.*expected 'int8kit.plan/3'"),
        ("int8kit.plan/4;82", "format 'int8kit.plan/4'"),
        ("int8kit.plan/3;82", "damaged plan"),
        (f"int8kit.plan/3;82;{MACHINE};own 1,2 triton 64,64,64,4,3,8,0", "damaged plan"),
        (f"int8kit.plan/3;82;{MACHINE};rent 1,2,3 triton 64,64,64,4,3,8,0", "damaged plan"),
        (f"int8kit.plan/3;82;{MACHINE},7", "damaged plan"),
        ("int8kit.plan/2", "damaged plan"),
        ("int8kit.plan/2;82;gemm 4x4x4 triton 1,2,3", "damaged plan"),
        ("int8kit.plan/2;82;gemm 4x4x4 cublas 64,64,64,4,3,8,0", "damaged plan"),
        ("int8kit.plan/2;82;gemm 0x4x4 triton 64,64,64,4,3,8,0", "damaged plan"),
        ("int8kit.plan/2;82;gemm 4x4x4 wgmma 256,64,128,8,4,8,0 serial", "damaged plan"),
        ("int8kit.plan/2;82;gemm 4x4x4 wgmma 256,64,128,8,4,8,0 pingpong pingpong", "damaged plan"),
    ],
)
def test_damaged_plan_gives_a_one_line_error(text, reason):
    with pytest.raises(ConfigError, match=reason):
        Plan.from_text(text)


def test_plan_chooses_the_nearest_m_by_log_distance():
    plan = Plan.fixed((GemmShape(1000, 8, 8), LOW), (GemmShape(9000, 8, 8), HIGH))
    assert plan.choose(GemmShape(1000, 8, 8)) == LOW
    assert plan.choose(GemmShape(2000, 8, 8)) == LOW
    assert plan.choose(GemmShape(4000, 8, 8)) == HIGH
    for far in (1, 249, 36001):
        assert plan.choose(GemmShape(far, 8, 8)) == default_config(GemmShape(far, 8, 8))
    assert Plan().choose(GemmShape(5, 8, 8)) == default_config(GemmShape(5, 8, 8))


def test_waves_decide_between_equal_distances():
    """On 10 multiprocessors, tiles of 128 rows need one wave for 1000 rows and two waves for 1300 rows."""
    tall = TileConfig(128, 128, 64, 8, 3)
    below, above = GemmShape(1000, 128, 64), GemmShape(1690, 128, 64)
    candidates = (Candidate(below, tall), Candidate(above, replace(tall, num_stages=4)))
    assert lookup.lookup(GemmShape(1300, 128, 64), candidates, sms=10).candidate.shape == above
    assert lookup.lookup(GemmShape(1280, 128, 64), candidates, sms=10).candidate.shape == below


def test_operation_prefers_its_own_entries_to_those_of_gemm():
    shape = GemmShape(1000, 512, 512)
    both = (Candidate(shape, LOW), Candidate(shape, HIGH, Operation.SWIGLU))
    assert lookup.lookup(shape, both, sms=82).config == LOW
    assert lookup.lookup(shape, both, sms=82, operation=Operation.SWIGLU).config == HIGH
    assert lookup.lookup(shape, both[:1], sms=82, operation=Operation.SWIGLU).config == LOW
    assert lookup.lookup(shape, both[1:], sms=82).level == lookup.DEFAULT


def test_added_level_serves_every_caller(monkeypatch):
    """For example one between the nearest shape and the cost model."""
    added = Level("added", lambda request: HIGH if request.shape.m > 100 else None)
    monkeypatch.setattr(lookup, "LEVELS", (*lookup.LEVELS[:3], added, *lookup.LEVELS[3:]))
    far = GemmShape(70000, 16, 16)
    base = store.load(DATABASES[0])
    assert base.resolve(far, ANY_TOOLCHAIN).level == "added"
    assert base.plan(16, 16, ANY_TOOLCHAIN).choose(far) == HIGH
    assert base.resolve(GemmShape(3, 16, 16), ANY_TOOLCHAIN).level in ("model", "default")


def shapes(base, count, seed):
    """Random shapes: near the entries and far from them, half of them of weights without an entry."""
    random_ = random.Random(seed)
    weights = sorted({(e.n, e.k) for e in base.entries})
    for _ in range(count):
        n, k = random_.choice(weights)
        if random_.random() < 0.5:
            n, k = (max(1, min(100_000, round(v * 4 ** random_.uniform(-1.3, 1.3)))) for v in (n, k))
        yield GemmShape(round(2 ** random_.uniform(0, 16)), n, k)


@pytest.mark.parametrize("path", DATABASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("triton", ["3.7.1", "3.9.0"])
def test_every_caller_finds_the_same(path, triton):
    """Layers, `run`, `verify` and `db explain`, for 125 shapes per shipped database and Triton version."""
    base = store.load(path)
    toolchain = Toolchain(triton, gemm.toolchain().kernel_hashes)
    drawn = list(shapes(base, 125, DATABASES.index(path)))
    unlisted = {choice.shape: choice.config for choice in base.choices_without_entry(drawn, toolchain)}  # `verify`
    listed = {e.shape for e in base.entries}
    levels = set()
    for shape in drawn:
        choice = base.resolve(shape, toolchain)  # `run`
        levels.add(choice.level)
        plan = base.plan(shape.n, shape.k, toolchain)
        assert plan.choose(shape) == choice.config
        assert ops._choose(plan.text, Operation.GEMM, shape.m, shape.n, shape.k) == choice.config  # a layer
        explained = next(one for _, one, _ in base.levels(shape, toolchain) if one is not None)  # `db explain`
        assert explained == choice
        assert shape in listed or unlisted[shape] == choice.config
    assert levels >= {"nearest-m", "model"}


@pytest.mark.parametrize("alias", ["h100", "rtx3070"])
def test_every_caller_borrows_the_same(alias):
    """A GPU without a file: a known one, and one that no record names."""
    gpu = gpus.GPUS.get(alias) or replace(gpus.get("rtx3090"), alias=alias, sms=46, l2_bytes=4 << 20)
    toolchain = gemm.toolchain()
    base, paths = store.merged_view(gpu, toolchain)
    assert not paths
    assert base.lender.gpu.alias == {"h100": "h200", "rtx3070": "rtx3090"}[alias]
    levels = set()
    for shape in shapes(base.lender, 100, 1):
        choice = base.resolve(shape, toolchain)
        levels.add(choice.level)
        plan = base.plan(shape.n, shape.k, toolchain)
        assert ops._choose(plan.text, Operation.GEMM, shape.m, shape.n, shape.k) == plan.choose(shape) == choice.config
        assert why_illegal(choice.config, arch=gpu.arch, shared_memory=gpu.shared_memory) is None
    assert "borrowed" in levels <= {"borrowed", "default"}


def test_benchmark_finds_the_same(monkeypatch):
    """Both the configuration of the GEMM that it times alone and the plan of the layer that it times."""
    base, toolchain, plans = store.load(DATABASES[0]), gemm.toolchain(), []
    monkeypatch.setattr(
        contestants.ops, "int8_linear", lambda x, wq, sw, bias, plan: plans.append(plan) or torch.empty(0)
    )
    x = torch.zeros(2, 2)
    for shape in shapes(base, 50, 99):
        o = SimpleNamespace(shape=shape, x=x, xq=x, weights=[x], sx=x, sw=x, bias=x, output=lambda: x)
        alone, layer = (c.prepare(o) for c in contestants.int8kit(base))
        layer.launches[0]()
        wanted = base.resolve(shape, toolchain)
        assert alone.note == layer.note == f"{wanted.config}, {wanted.level}"
        assert alone.launches[0].keywords["config"] == plans[-1].choose(shape) == wanted.config
