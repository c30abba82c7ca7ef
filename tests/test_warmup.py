"""runtime/warmup.py: every kernel of a model's fused forward, ahead of `run`."""

import json

import pytest
import torch

from int8kit import Int8Linear, gpus, models
from int8kit.database import store
from int8kit.errors import InputError, UnknownName
from int8kit.kernels import gemm
from int8kit.runtime import warmup

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@needs_no_gpu
def test_the_tiny_model(quiet_interpreter, verb):
    document = json.loads(verb("warmup", "tiny", "--gpu", "rtx3090", "--json")[0])
    names = [kernel["name"] for kernel in document["kernels"]]
    assert {name.partition(":")[0] for name in names} == {
        "[512, 512]", "[512, 1024]", "[1024, 512]", "[512, 416], bias", "[1536, 512]", "[2048, 512], SwiGLU",
        "one block",
    }  # fmt: skip
    assert all(kernel["seconds"] > 0 for kernel in document["kernels"])
    assert document["seconds"] == pytest.approx(sum(k["seconds"] for k in document["kernels"]), abs=0.01)


@pytest.mark.parametrize("alias", ["h200", "rtx3090"])
def test_every_configuration_that_a_plan_can_choose(alias, monkeypatch):
    """Those of the full model, for every number of rows, where kernels are compiled."""
    monkeypatch.setattr(gemm, "interpreted", lambda: False)
    model, database = models.get("ideogram4"), store.load_database(alias)
    with torch.device("meta"):
        block = model.build()
    block.layers = block.layers[:1]
    for name, linear in list(block.named_modules()):
        if isinstance(linear, torch.nn.Linear) and model.quantizes(name):
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            block.set_submodule(name, Int8Linear(*sizes, device="meta"))
    weights = warmup._weights(block, model)
    assert {(n, k) for n, k, *_ in weights} == {
        (4608, 4608), (12288, 4608), (4608, 12288), (4608, 53248), (13824, 4608), (24576, 4608),
    }  # fmt: skip
    names = [name for name, _ in warmup._products(block, model, database, torch.device("cpu"))]
    assert len(names) == len(set(names))
    for n, k, swiglu, _ in weights:
        plan = database.plan(n, k, gemm.toolchain())
        for m in (1, 100, 2304, 4296, 5000, 20000, 70000):
            config = plan.choose(gemm.GemmShape(m, n, k))
            assert any(
                name.startswith(f"[{n}, {k}]{', SwiGLU' * swiglu}") and name.endswith(f": {config}") for name in names
            )


@needs_no_gpu
def test_bad_calls():
    with pytest.raises(InputError, match="no CUDA device for the model 'ideogram4': nothing is compiled without one"):
        warmup.warm_up()
    with pytest.raises(UnknownName, match="unknown model 'sdxl'"):
        warmup.warm_up("sdxl")
    with pytest.raises(UnknownName, match="unknown GPU 'rtx1'"):
        warmup.warm_up("tiny", gpu="rtx1")
    assert gpus.present() is None
