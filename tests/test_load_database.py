"""The tuning database for Python: load_database, load_plans, and layers that use them."""

import contextlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import int8kit
from int8kit import GemmShape, TileConfig, UnknownName, gpus, ops
from int8kit.database import store
from int8kit.kernels import gemm
from int8kit.spec import Kernel, default_config

SHAPE = GemmShape(4296, 12288, 4608)


def test_the_database_of_a_gpu_by_its_alias():
    base = int8kit.load_database("rtx3090")
    assert base.gpu.alias == "rtx3090"
    assert base.resolve(SHAPE, gemm.toolchain()).level == "exact"
    with pytest.raises(UnknownName, match="rtx9"):
        int8kit.load_database("rtx9")


def test_without_an_alias_the_present_gpu_decides(monkeypatch):
    monkeypatch.setattr(gpus, "present", lambda: None)
    assert int8kit.load_database().gpu.alias == "rtx3090"
    monkeypatch.setattr(gpus, "present", lambda: gpus.get("h200"))
    assert int8kit.load_database().gpu.alias == "h200"


def test_entries_of_the_user_serve_first():
    shipped = int8kit.load_database("rtx3090")
    [own] = [e for e in shipped.entries if e.shape == SHAPE and not e.is_other_triton(gemm.toolchain())]
    config = TileConfig(64, 64, 64, 4, 3)
    assert own.config != config
    store.update(store.user_path("rtx3090"), shipped.gpu, [own.model_copy(update={"config": config, "id": None})])
    assert int8kit.load_plans("rtx3090")(SHAPE.n, SHAPE.k).choose(SHAPE) == own.config  # of a stale kernel: not served
    fresh = {"config": config, "id": None, "kernel": gemm.kernel_hash(config.kernel), "runners_up": None}
    store.update(store.user_path("rtx3090"), shipped.gpu, [own.model_copy(update=fresh)])
    assert int8kit.load_plans("rtx3090")(SHAPE.n, SHAPE.k).choose(SHAPE) == config


def test_plans_choose_as_the_database_does():
    base, plan = int8kit.load_database("h200"), int8kit.load_plans("h200")
    for shape in (SHAPE, GemmShape(3000, 4608, 12288), GemmShape(7, 4608, 4608), GemmShape(4096, 96, 64)):
        assert plan(shape.n, shape.k).choose(shape) == base.resolve(shape, gemm.toolchain()).config
    assert plan(SHAPE.n, SHAPE.k).choose(SHAPE) != default_config(SHAPE)


def test_replaced_linears_carry_their_plan():
    model = torch.nn.Sequential(torch.nn.Linear(4608, 64, bias=False), torch.nn.GELU(), torch.nn.Linear(64, 4608))
    plan = int8kit.load_plans("h200")
    replaced = int8kit.replace_linears(model, wanted=lambda name: name == "2", plan=plan)
    assert list(replaced) == ["2"]
    assert isinstance(model[2], int8kit.Int8Linear)
    assert model[2].plan == plan(4608, 64)
    assert type(model[0]) is torch.nn.Linear


@pytest.fixture
def fake_gpu(monkeypatch):
    """Fake tensors of a CUDA device, whose GPU is the RTX 3090."""
    monkeypatch.setattr(gpus, "present", lambda: gpus.get("rtx3090"))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    store.forget_plans()
    with FakeTensorMode():
        yield
    store.forget_plans()


@pytest.fixture
def on_gpu(fake_gpu, monkeypatch):
    """A fake GPU -> the list of plans that layers run with."""
    used = []

    def int8_linear(x, wq, sw, bias=None, *, plan):
        used.append(plan)
        return torch.ops.int8kit.linear(x, wq, sw, bias, plan.text)

    monkeypatch.setattr(ops, "int8_linear", int8_linear)
    return used


def test_a_layer_without_a_plan_finds_it_on_a_gpu(on_gpu, monkeypatch):
    layer = int8kit.Int8Linear(4608, 12288, bias=False, device="cuda", dtype=torch.bfloat16)
    read = []
    merged_view = store.merged_view
    monkeypatch.setattr(store, "merged_view", lambda *args: read.append(args) or merged_view(*args))
    for _ in range(3):
        assert layer(torch.empty(2, 9, 4608, device="cuda")).shape == (2, 9, 12288)
    expected = int8kit.load_plans("rtx3090")(12288, 4608)
    assert on_gpu == [expected] * 3
    assert on_gpu[0] is on_gpu[2]
    assert len(read) == 2  # by the layer once, and by this test
    assert layer.plan is None  # so that a copy of the layer on another GPU finds another plan
    assert "plan=1x12288x4608, 8x12288x4608, 64x12288x4608 and 14 more of rtx3090)" in repr(layer)


def test_a_plan_that_was_given_serves_on_a_gpu(on_gpu):
    plan = int8kit.load_plans("h200")(12288, 4608)
    layer = int8kit.Int8Linear(4608, 12288, device="cuda", plan=plan)
    layer(torch.empty(9, 4608, device="cuda"))
    assert on_gpu == [plan]


def test_on_a_cpu_nothing_is_looked_up(monkeypatch):
    monkeypatch.setattr(store, "found_plan", lambda *_: pytest.fail("looked up"))
    layer = int8kit.Int8Linear.from_linear(torch.nn.Linear(64, 32))
    layer(torch.ones(2, 64))
    assert "plan" not in repr(layer)


def test_the_first_layer_without_a_known_configuration_warns_once(on_gpu, monkeypatch):
    """No file is there to borrow either."""
    monkeypatch.setattr(store, "find", lambda alias: None)
    layers = [int8kit.Int8Linear(64, n, device="cuda") for n in (32, 48)]
    x = torch.empty(9, 64, device="cuda")
    with pytest.warns(int8kit.NotTuned, match=r"rtx3090 is near a weight \[32, 64\].*--shape 4096x32x64`"):
        layers[0](x)
    for layer in layers:
        layer(x)  # a second warning would be an error
    assert not any(plan.configs for plan in on_gpu)
    assert "plan=default" in repr(layers[0])


def test_a_layer_far_from_every_entry_is_ranked(on_gpu):
    layer = int8kit.Int8Linear(64, 32, device="cuda")
    layer(torch.empty(9, 64, device="cuda"))  # a warning would be an error
    [plan] = on_gpu
    assert not plan.candidates
    assert f"plan=best of {len(plan.configs)} by the cost model" in repr(layer)
    assert plan.choose(GemmShape(9, 32, 64)).kernel is not Kernel.TRITON


def test_a_damaged_database_costs_speed_only(on_gpu):
    path = store.user_path("rtx3090")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    layer, x = int8kit.Int8Linear(4608, 12288, device="cuda"), torch.empty(9, 4608, device="cuda")
    with pytest.warns(int8kit.NotTuned) as caught:
        layer(x)
    [warning] = caught
    assert "until then default configurations serve" in str(warning.message)
    layer(x)
    assert not on_gpu[1].candidates


def test_many_threads_read_the_database_once(fake_gpu, monkeypatch):
    read = []

    def slowly(gpu, toolchain):
        read.append(gpu)
        time.sleep(0.05)
        return int8kit.load_database("h200"), ()

    monkeypatch.setattr(store, "merged_view", slowly)
    monkeypatch.setattr(int8kit, "load_database", lambda alias: store.load(store.find(alias)))
    with ThreadPoolExecutor(8) as pool:
        plans = list(pool.map(lambda _: store.found_plan(0, 12288, 4608), range(16)))
    assert len(read) == 1
    assert all(plan is plans[0] for plan in plans)
    assert plans[0].candidates


def test_a_compiled_layer_has_its_plan_as_a_constant(fake_gpu, monkeypatch):
    layer, graphs = int8kit.Int8Linear(4608, 12288, device="cuda", dtype=torch.bfloat16), []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph)
    x = torch.empty(2, 9, 4608, device="cuda", dtype=torch.bfloat16)
    assert compiled(x).shape == (2, 9, 12288)
    monkeypatch.setattr(store, "found_plan", lambda *_: pytest.fail("looked up again"))
    compiled(x)
    [code] = graphs
    assert int8kit.load_plans("rtx3090")(12288, 4608).text in code


def test_an_entry_is_described():
    plan = int8kit.load_plans("h200")(12288, 4608)
    assert store.described(int8kit.Plan(), 8, 8) == "default"
    few = int8kit.Plan(plan.candidates[:1])
    [shape] = {candidate.shape for candidate in few.candidates}
    assert store.described(few, shape.n, shape.k) == str(shape)
    assert store.described(few, shape.n + 16, shape.k) == f"near {shape}"


@pytest.mark.process
def test_without_triton_the_database_can_be_read():
    code = "import sys; sys.modules['triton'] = None; import int8kit; print(int8kit.load_database('h200').gpu.name); "
    code += "print(int8kit.load_plans('h200')(12288, 4608).choose(int8kit.GemmShape(4296, 12288, 4608)).kernel)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "NVIDIA H200\nwgmma\n", done.stderr
