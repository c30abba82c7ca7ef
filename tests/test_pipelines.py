"""pipelines.py: INT8 in a pipeline in memory, and its undoing."""

import copy
from contextlib import nullcontext
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from test_documents import blocks

import int8kit
import int8kit.integrations.diffusers
from int8kit import Int8Linear, models, optimize, pipelines, reference, restore
from int8kit.errors import InputError, ShapeError
from int8kit.runtime import fuse

BRANCHES = ("transformer", "unconditional_transformer")


@pytest.fixture(scope="module")
def stock():
    pipe = models.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(stock):
    fresh = type(stock)(**{**stock.components, **{name: copy.deepcopy(getattr(stock, name)) for name in BRANCHES}})
    fresh.set_progress_bar_config(disable=True)
    return fresh


def latents(pipe, prompt="a red bicycle", **options):
    settings = {
        "height": 32, "width": 32, "num_inference_steps": 1, "guidance_schedule": [7.0], "output_type": "latent",
        "max_sequence_length": 32, "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    return pipe(prompt, **{**settings, **options}).images


def kinds(model):
    return {name: type(child) for name, child in model.named_modules() if isinstance(child, torch.nn.Linear)}


@pytest.fixture(scope="module")
def before(stock):
    return latents(stock)


def test_optimize_quantizes_each_denoiser_and_restore_undoes_it(pipe, before):
    encoder = kinds(pipe.text_encoder)
    report = optimize(pipe, keep_float="cpu")
    assert list(report.components) == list(BRANCHES)
    for name in BRANCHES:
        part, model = report.components[name], getattr(pipe, name)
        assert len(part.replaced) == 2 * 7 + 1
        assert len(part.left) == 8
        assert all(model.get_submodule(layer) is made for layer, made in part.replaced.items())
        assert all(type(model.get_submodule(layer)) is torch.nn.Linear for layer in part.left)
        assert part.fused
    assert kinds(pipe.text_encoder) == encoder
    noise = ((latents(pipe) - before).norm() / before.norm()).item()
    assert 0 < noise < 0.1  # 8 bits, two blocks deep; a misplaced layer gives more than 1
    assert restore(pipe) is None
    assert not any(Int8Linear in kinds(getattr(pipe, name)).values() for name in BRANCHES)
    assert torch.equal(latents(pipe), before)
    with pytest.raises(InputError, match="nothing to restore"):
        restore(pipe)


def test_int8_weights_are_those_of_the_reference(pipe, stock):
    optimize(pipe)
    layer, linear = (one.transformer.layers[1].attention.to_q for one in (pipe, stock))
    wq, sw = reference.quantize(linear.weight.detach())
    assert torch.equal(layer.weight, wq)
    assert torch.equal(layer.weight_scale, sw)


def test_the_report_names_every_linear(pipe):
    text = str(optimize(pipe)).splitlines()
    assert text[0] == "transformer: 15 linears in INT8, 8 in float, fused"
    assert "  layers.0.feed_forward.w2: INT8, 1024 -> 512" in text
    assert any(line.startswith("  final_layer.linear: float, ") for line in text)
    assert len(text) == 2 * (1 + 15 + 8)


def test_the_policy_chooses(pipe):
    report = optimize(pipe, lambda name, linear: "too wide" if linear.in_features > 512 else name.endswith("to_q"))
    part = report.components["transformer"]
    assert list(part.replaced) == ["layers.0.attention.to_q", "layers.1.attention.to_q"]
    assert part.left["layers.0.feed_forward.w2"] == "too wide"


def test_a_gpu_gives_its_configurations(pipe):
    report = optimize(pipe, lambda name, linear: name == "layers.0.attention.to_q", gpu="rtx3090")
    [layer] = report.components["transformer"].replaced.values()
    assert layer.plan == int8kit.load_plans("rtx3090")(512, 512)


def test_a_second_call_changes_nothing(pipe):
    first = optimize(pipe, keep_float="cpu")
    second = optimize(pipe)
    assert second == first
    restore(pipe)  # the float linears of the first call are still there
    assert Int8Linear not in kinds(pipe.transformer).values()


def test_an_optimized_model_is_saved_and_loaded_in_int8(pipe, tmp_path):
    optimize(pipe, ["layers.0.*"], keep_float="cpu")
    optimize(pipe, ["llm_cond_proj"], keep_float="cpu")
    pipe.transformer.save_pretrained(tmp_path / "int8")
    loaded = type(pipe.transformer).from_pretrained(tmp_path / "int8")
    assert kinds(loaded) == kinds(pipe.transformer)
    assert loaded.dtype is pipe.transformer.dtype
    saved = pipe.transformer.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(one, saved[name]) for name, one in loaded.state_dict().items())
    restore(pipe)
    assert "quantization_config" not in pipe.transformer.config
    pipe.transformer.save_pretrained(tmp_path / "float")
    assert Int8Linear not in kinds(type(pipe.transformer).from_pretrained(tmp_path / "float")).values()


def test_restore_without_the_float_weights(pipe):
    optimize(pipe)
    optimized = kinds(pipe.transformer)
    with pytest.raises(InputError, match="keep_float='cpu'"):
        restore(pipe)
    assert kinds(pipe.transformer) == optimized
    with pytest.raises(InputError, match=r"'gpu'.*'cpu' or False"):
        optimize(pipe, keep_float="gpu")


def test_all_or_nothing(pipe, before):
    """The last linear of the second denoiser cannot be quantized."""
    linear = torch.nn.Linear(131072, 1, bias=False, dtype=torch.bfloat16)
    pipe.unconditional_transformer.layers[1].last = linear
    with pytest.raises(ShapeError, match="131072"):
        optimize(pipe)
    assert not any(Int8Linear in kinds(getattr(pipe, name)).values() for name in BRANCHES)
    assert torch.equal(latents(pipe), before)
    assert "load_lora_adapter" not in vars(pipe.transformer)


def test_the_call_of_the_pipeline_is_unchanged(pipe):
    """Batch, callback, output type, tuple, and several sizes in turn."""
    optimize(pipe)
    seen = []

    def callback(pipe, step, time, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return tensors

    batch = latents(pipe, ["a red bicycle", "a cat"], callback_on_step_end=callback, num_images_per_prompt=1)
    assert batch.shape[0] == 2
    assert seen == [(0, (2, 4, 128))]
    image = latents(pipe, height=48, output_type="np")
    assert image.shape == (1, 48, 32, 3)
    first = latents(pipe)
    assert torch.equal(pipe_tuple(pipe), first)


def pipe_tuple(pipe):
    return pipe(
        "a red bicycle", height=32, width=32, num_inference_steps=1, guidance_schedule=[7.0], output_type="latent",
        max_sequence_length=32, generator=torch.Generator().manual_seed(0), return_dict=False,
    )[0]  # fmt: skip


def test_a_pipeline_without_a_denoiser():
    class Other:
        components = {"vae": torch.nn.Identity()}  # noqa: RUF012

    with pytest.raises(InputError, match=r"the components vae; expected one of transformer, "):
        optimize(Other())
    with pytest.raises(InputError, match="int: expected a diffusers pipeline"):
        optimize(3)


def test_one_model_under_two_names(pipe):
    pipe.unconditional_transformer = pipe.transformer
    report = optimize(pipe, keep_float="cpu")
    assert list(report.components) == ["transformer"]
    restore(pipe)
    assert Int8Linear not in kinds(pipe.transformer).values()


def test_a_shared_linear_comes_back_in_all_its_places(pipe):
    layers = pipe.transformer.layers
    layers[1].attention.to_k = linear = layers[0].attention.to_k
    optimize(pipe, keep_float="cpu")
    restore(pipe)
    assert layers[0].attention.to_k is layers[1].attention.to_k is linear


OFFLOADS = {
    "model": lambda model: accelerate.cpu_offload_with_hook(model, execution_device="cpu"),
    "sequential": lambda model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "group": lambda model: apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
    ),
}
"""The hooks that pipelines install, with the CPU for the GPU."""


@pytest.mark.parametrize("kind", OFFLOADS)
def test_offloading_after_optimize(pipe, kind):
    optimize(pipe)
    if kind != "model":  # their hooks are on layers that the fused forward does not call
        fuse.undo(pipe.transformer)
    expected = latents(pipe)
    fuse.fuse(pipe.transformer)
    OFFLOADS[kind](pipe.transformer)
    if kind == "sequential":
        assert pipe.transformer.layers[0].attention.to_q.weight.is_meta
    with nullcontext() if kind == "model" else pytest.warns(fuse.NotFused, match="has a hook, of an offload"):
        assert torch.equal(latents(pipe), expected)


@pytest.mark.parametrize(("kind", "remedy"), [("sequential", "remove_all_hooks"), ("group", "before you enable it")])
def test_offloading_by_layer_before_optimize(pipe, kind, remedy):
    OFFLOADS[kind](pipe.transformer)
    with pytest.raises(InputError, match=f"^transformer: .*{remedy}"):
        optimize(pipe)
    assert Int8Linear not in kinds(pipe.transformer).values()


def test_offloading_by_model_before_optimize(pipe, before):
    OFFLOADS["model"](pipe.transformer)
    optimize(pipe, keep_float="cpu")
    assert Int8Linear in kinds(pipe.transformer).values()
    assert hasattr(pipe.transformer, "_hf_hook")
    assert not torch.equal(latents(pipe), before)
    restore(pipe)
    assert torch.equal(latents(pipe), before)


@pytest.fixture
def fusion(monkeypatch):
    """A fusion that joins q, k and v of the first block by name only."""
    calls = []

    def join(model, gpu):
        attention = model.layers[0].attention
        attention.qkv = Int8Linear.joined([torch.nn.Linear(8, 8)] * 3)
        calls.append("fuse")

        def undo():
            del attention.qkv
            calls.append("undo")

        return undo

    monkeypatch.setattr(fuse, "BUILT_IN", {})
    unregister = fuse.register("Ideogram4Transformer2DModel", join)
    yield calls
    unregister()


def test_models_that_the_runtime_knows_are_fused(pipe, fusion):
    report = optimize(pipe, keep_float="cpu")
    assert [part.fused for part in report.components.values()] == [True, True]
    assert str(report).startswith("transformer: 15 linears in INT8, 8 in float, fused\n")
    assert fuse.fused(pipe.transformer)
    assert optimize(pipe).components["transformer"].fused
    restore(pipe)
    assert fusion == ["fuse", "fuse", "undo", "undo"]
    assert not hasattr(pipe.transformer.layers[0].attention, "qkv")
    assert not fuse.fused(pipe.transformer)


def test_a_fusion_that_fails_leaves_the_pipeline(pipe, before, monkeypatch):
    def fails(model, gpu):
        if model is pipe.unconditional_transformer:
            raise InputError("no fusion")
        return lambda: done.append(model)

    done = []
    monkeypatch.setattr(fuse, "BUILT_IN", {})
    unregister = fuse.register("Ideogram4Transformer2DModel", fails)
    try:
        with pytest.raises(InputError, match="no fusion"):
            optimize(pipe)
    finally:
        unregister()
    assert done == [pipe.transformer]
    assert torch.equal(latents(pipe), before)


def test_the_registry():
    class Known(torch.nn.Module):
        pass

    class Special(Known):
        pass

    model = Special()
    assert not fuse.fuse(model)
    assert not fuse.undo(model)
    unregister = fuse.register("Known", lambda model, gpu: lambda: None)
    with pytest.raises(InputError, match="'Known' has a fusion"):
        fuse.register("Known", lambda model, gpu: lambda: None)
    assert fuse.fuse(model)
    unregister()
    unregister()
    assert fuse.fused(model)  # until it is undone
    assert fuse.undo(model)
    assert not fuse.fuse(model)
    unregister = fuse.register("Known", lambda model, gpu: None)  # it cannot serve this one
    assert not fuse.fuse(model)
    unregister()
    with pytest.raises(InputError, match="'Ideogram4Transformer2DModel' has a fusion"):
        fuse.register("Ideogram4Transformer2DModel", lambda model, gpu: None)


PAGE = Path(__file__).parent.parent / "docs" / "lora.md"
CODE = blocks(PAGE, "python")


@pytest.mark.parametrize("code", CODE)
def test_python_of_the_page_runs(code):
    names = {}
    exec(code, names)
    model = names["merged"] if "merged" in names else names["pipe"].transformer
    assert not any(hasattr(child, "base_layer") for child in model.modules())


def test_the_page_names_the_components():
    assert len(CODE) == 3
    assert all(f"`{name}`" in PAGE.read_text() for name in pipelines.DENOISERS)
