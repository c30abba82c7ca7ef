"""The tuning database for Python: load_database, load_plans, and layers that use them."""

import subprocess
import sys

import pytest
import torch

import int8kit
from int8kit import GemmShape, TileConfig, UnknownName, gpus
from int8kit.database import store
from int8kit.kernels import gemm
from int8kit.spec import default_config

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


@pytest.mark.process
def test_without_triton_the_database_can_be_read():
    code = "import sys; sys.modules['triton'] = None; import int8kit; print(int8kit.load_database('h200').gpu.name); "
    code += "print(int8kit.load_plans('h200')(12288, 4608).choose(int8kit.GemmShape(4296, 12288, 4608)).kernel)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "NVIDIA H200\nwgmma\n", done.stderr
