"""LoRA on INT8 layers: diffusers' loaders on an optimized pipeline, and the layouts of files."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from int8kit import models, optimize, reference, restore
from int8kit.adapters import peft_layers
from int8kit.errors import InputError
from int8kit.integrations import lora

BLOCK = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2",
    "feed_forward.w3", "adaln_modulation",
)  # fmt: skip
NAMES = [f"layers.{i}.{name}" for i in range(2) for name in BLOCK]
MORE = ["input_proj", "adaln_proj", "final_layer.linear"]  # float linears outside the blocks
pytestmark = [  # remarks of peft on a second adapter
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:Adapter y was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]


@pytest.fixture(scope="module")
def stock():
    pipe = models.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    optimize(pipe, keep_float="cpu")
    return pipe


@pytest.fixture
def pipe(stock):
    """A pipeline whose transformer is its own; the loaders follow it into the copy."""
    fresh = type(stock)(**{**stock.components, "transformer": copy.deepcopy(stock.transformer)})
    fresh.set_progress_bar_config(disable=True)
    lora.prepare(fresh)
    return fresh


def latents(pipe):
    return pipe(
        "a red bicycle", height=32, width=32, num_inference_steps=1, guidance_schedule=[7.0], output_type="latent",
        max_sequence_length=32, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def before(stock):
    return latents(stock)


def factors(out, width, rank=4, dtype=torch.bfloat16):
    return (torch.randn(rank, width) * 0.3).to(dtype), (torch.randn(out, rank) * 0.3).to(dtype)


def file_of(model, names=NAMES, dtype=torch.bfloat16, seed=0):
    """A LoRA in the layout of diffusers."""
    torch.manual_seed(seed)
    state = {}
    for name in names:
        linear = model.get_submodule(name)
        a, b = factors(linear.out_features, linear.in_features, dtype=dtype)
        state |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return state


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_through_the_pipeline(pipe, before, tmp_path):
    """Load, several adapters with weights, disable, delete, hotswap, unload."""
    clean = tensors(pipe.transformer)
    save_file(file_of(pipe.transformer), tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors", adapter_name="x")
    x = latents(pipe)
    assert 0.01 < (x - before).norm() / before.norm() < 1
    pipe.load_lora_weights(file_of(pipe.transformer, seed=1), adapter_name="y")
    pipe.set_adapters(["x", "y"], [0.5, 0.7])
    both = latents(pipe)
    pipe.set_adapters("y")
    y = latents(pipe)
    assert len({out.numpy().tobytes() for out in (before, x, both, y)}) == 4
    pipe.disable_lora()
    assert torch.equal(latents(pipe), before)
    pipe.enable_lora()
    assert torch.equal(latents(pipe), y)
    pipe.delete_adapters("y")
    pipe.set_adapters("x")
    assert torch.equal(latents(pipe), x)
    pipe.load_lora_weights(file_of(pipe.transformer, seed=1), adapter_name="x", hotswap=True)
    assert torch.equal(latents(pipe), y)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), before)
    assert equal(tensors(pipe.transformer), clean)
    assert not any("lora" in name for name, _ in pipe.unconditional_transformer.named_modules())


@pytest.mark.parametrize("safe", [False, True])
def test_fuse_and_unfuse(pipe, before, safe):
    clean = tensors(pipe.transformer)
    pipe.load_lora_weights(file_of(pipe.transformer), adapter_name="x")
    beside = latents(pipe)
    pipe.fuse_lora(safe_fusing=safe)
    fused = latents(pipe)
    assert pipe.fused_loras == {"x"}
    assert 0 < (fused - beside).norm() < 0.1 * (beside - before).norm()  # a lost LoRA gives 1
    pipe.unfuse_lora()
    assert torch.equal(latents(pipe), beside)
    assert pipe.fused_loras == set()
    pipe.unload_lora_weights()
    assert equal(tensors(pipe.transformer), clean)


def test_a_fused_weight_is_quantized_once(pipe):
    """Two adapters, folded in float32 from the former weight, also when the calls are two."""
    layer = pipe.transformer.layers[0].attention.to_q
    weight = layer.weight.float() * layer.weight_scale[:, None]
    first, second = (file_of(pipe.transformer, seed=seed) for seed in (0, 1))
    pipe.load_lora_weights(first, adapter_name="x")
    pipe.load_lora_weights(second, adapter_name="y")
    pipe.set_adapters(["x", "y"], [0.5, 2.0])
    for file, scale in ((first, 0.5), (second, 2.0)):
        a, b = (file[f"transformer.layers.0.attention.to_q.lora_{part}.weight"].float() for part in "AB")
        weight = weight + (b @ a) * scale
    wq, sw = reference.quantize(weight)
    for calls in ([["x", "y"]], [["x"], ["y"]]):
        for names in calls:
            pipe.fuse_lora(adapter_names=names)
        assert torch.equal(layer.weight, wq)
        assert torch.equal(layer.weight_scale, sw)
        pipe.unfuse_lora()


def test_disabling_a_fused_adapter_unfuses_it(pipe, before):
    pipe.load_lora_weights(file_of(pipe.transformer), adapter_name="x")
    pipe.fuse_lora()
    pipe.disable_lora()
    assert torch.equal(latents(pipe), before)


def test_deleting_a_fused_adapter_and_unfusing(pipe, before):
    pipe.load_lora_weights(file_of(pipe.transformer), adapter_name="x")
    pipe.fuse_lora()
    pipe.delete_adapters("x")
    pipe.unfuse_lora()
    assert torch.equal(latents(pipe), before)


def test_a_fused_adapter_stays_when_its_factors_are_unloaded(pipe):
    """diffusers' way to run a LoRA at no cost."""
    pipe.load_lora_weights(file_of(pipe.transformer), adapter_name="x")
    pipe.fuse_lora()
    fused = latents(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), fused)


def test_restore_with_adapters():
    pipe = models.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(file_of(pipe.transformer), adapter_name="x")  # before optimize
    beside = latents(pipe)
    report = optimize(pipe, keep_float="cpu")
    assert "layers.0.attention.to_q.base_layer" in report.components["transformer"].replaced
    assert (latents(pipe) - beside).norm() / beside.norm() < 0.1
    pipe.fuse_lora(safe_fusing=True)
    with pytest.raises(InputError, match=r"^transformer: a LoRA is fused; call pipe.unfuse_lora\(\) first"):
        restore(pipe)
    with pytest.raises(InputError, match="a LoRA is fused"):
        optimize(pipe)
    pipe.unfuse_lora()
    restore(pipe)
    assert torch.equal(latents(pipe), beside)
    optimize(pipe, keep_float="cpu")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(InputError, match="the LoRA x is fused"):
        restore(pipe)


def test_factors_take_the_dtype_of_the_model(pipe):
    pipe.load_lora_weights(file_of(pipe.transformer, dtype=torch.float32), adapter_name="x")
    parts = [parameter for name, parameter in pipe.transformer.named_parameters() if ".lora_" in name]
    assert len(parts) == 2 * len(NAMES)
    assert {part.dtype for part in parts} == {torch.bfloat16}


def test_a_damaged_adapter_is_not_fused(pipe):
    file = file_of(pipe.transformer, ["layers.0.attention.to_q"])
    file["transformer.layers.0.attention.to_q.lora_B.weight"][0, 0] = torch.nan
    clean = tensors(pipe.transformer)
    pipe.load_lora_weights(file, adapter_name="x")
    with pytest.raises(InputError, match="merging 'x': the sum is not finite"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert equal(tensors(pipe.transformer), clean)


# Layouts of files


def joined_file(model, names=("layers.0.attention.qkv", "layers.1.attention.o", "layers.1.feed_forward.w2")):
    """Factors by the module names of Ideogram's checkpoint."""
    torch.manual_seed(0)
    shapes = {"qkv": (1536, 512), "o": (512, 512), "w2": (512, 1024), "adaln_modulation": (2048, 32)}
    return {name: factors(*shapes[name.rpartition(".")[2]]) for name in names}


LAYOUTS = {
    "ai-toolkit": lambda name, a, b: {
        f"diffusion_model.{name}.lora_A.weight": a, f"diffusion_model.{name}.lora_B.weight": b,
    },
    "conditional": lambda name, a, b: {
        f"conditional_transformer.{name}.lora_A.weight": a, f"conditional_transformer.{name}.lora_B.weight": b,
    },
    "down and up": lambda name, a, b: {
        f"diffusion_model.{name}.lora_down.weight": a * 2, f"diffusion_model.{name}.lora_up.weight": b,
        f"diffusion_model.{name}.alpha": torch.tensor(2.0),
    },
    "kohya": lambda name, a, b: {
        f"lora_unet_{name.replace('.', '_')}.lora_down.weight": a * 2,
        f"lora_unet_{name.replace('.', '_')}.lora_up.weight": b,
        f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(2.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_with_the_same_bits(pipe, layout):
    """A power of two as alpha over rank, so that folding it is exact."""
    file = joined_file(pipe.transformer)
    state = {}
    for name, (a, b) in file.items():
        state |= LAYOUTS[layout](name, a, b)
    pipe.load_lora_weights(state, adapter_name="x")
    for part, third in zip("qkv", file["layers.0.attention.qkv"][1].chunk(3), strict=True):
        layer = pipe.transformer.get_submodule(f"layers.0.attention.to_{part}")
        assert torch.equal(layer.lora_A["x"].weight, file["layers.0.attention.qkv"][0])
        assert torch.equal(layer.lora_B["x"].weight, third)
        assert layer.scaling["x"] == 1
    for ours, theirs in (("attention.to_out.0", "attention.o"), ("feed_forward.w2", "feed_forward.w2")):
        layer = pipe.transformer.get_submodule(f"layers.1.{ours}")
        assert torch.equal(layer.lora_A["x"].weight, file[f"layers.1.{theirs}"][0])
        assert torch.equal(layer.lora_B["x"].weight, file[f"layers.1.{theirs}"][1])
    assert sum(hasattr(child, "lora_A") for child in pipe.transformer.modules()) == 5


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_files_of_onetrainer_load(pipe, prefix):
    """Split projections, and linears outside the blocks, which diffusers refuses under the second prefix."""
    names = [*NAMES, *MORE]
    state = {
        key.replace("transformer.", prefix, 1).replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for key, tensor in file_of(pipe.transformer, names).items()
    }
    pipe.load_lora_weights(state, adapter_name="x")
    assert sum(hasattr(child, "lora_A") for child in pipe.transformer.modules()) == len(names)
    first = pipe.transformer.input_proj.lora_B["x"].weight
    assert torch.equal(first, state[f"{prefix}input_proj.lora_up.weight"])


A, B = torch.ones(4, 512, dtype=torch.bfloat16), torch.ones(512, 4, dtype=torch.bfloat16)
GOOD = {"transformer.layers.0.attention.to_k.lora_A.weight": A, "transformer.layers.0.attention.to_k.lora_B.weight": B}
REFUSED = {
    "transformer.layers.7.attention.to_q.lora_A.weight": "means no linear of Ideogram4Transformer2DModel",
    "lora_unet_layers_0_attention_qvk.lora_down.weight": "means no linear",
    "lora_te_layers_0.lora_down.weight": "means no linear",
    "unconditional_transformer.layers.0.attention.to_q.lora_A.weight": "means no linear",
    "base_model.model.layers.0.attention.to_q.lora_A.weight": "means no linear",  # its alpha is in another file
    "transformer.layers.0.attention.to_q.dora_scale": "belongs to a DoRA",
    "transformer.layers.0.attention.to_q.lora_A.weight": "lacks A or B",
    "transformer.layers.0.attention.to_q.lora_mid.weight": "means no linear",
}


@pytest.mark.parametrize("key", REFUSED)
def test_the_first_key_that_means_no_linear_is_named(pipe, key):
    with pytest.raises(InputError, match=f"^LoRA key '{key}'.*{REFUSED[key]}"):
        pipe.load_lora_weights({**GOOD, key: A})
    assert not any("lora" in name for name, _ in pipe.transformer.named_modules())
    assert not hasattr(pipe.transformer, "peft_config")


def test_factors_of_another_size_are_refused(pipe):
    key = "transformer.layers.0.feed_forward.w1.lora_A.weight"
    with pytest.raises(InputError, match=rf"{key}.*\[4, 512\] and B \[512, 4\]; expected \[r, 512\] and \[1024, r\]"):
        pipe.load_lora_weights({key: A, key.replace("_A", "_B"): B})


def test_models_check_by_themselves(pipe):
    """transformer.load_lora_adapter, which pipelines of other models call with converted keys."""
    model = pipe.transformer
    model.load_lora_adapter(GOOD, adapter_name="x")
    with pytest.raises(InputError, match=r"'transformer\.nothing\.lora_A\.weight' means no linear"):
        model.load_lora_adapter({"transformer.nothing.lora_A.weight": A}, adapter_name="y")
    with pytest.raises(InputError, match=r"lora_te1_x\.lora_down\.weight|no key for Ideogram4Transformer2DModel"):
        model.load_lora_adapter({"lora_te1_x.lora_down.weight": A}, adapter_name="y")
    kohya = {
        "lora_unet_layers_0_attention_to_q.lora_down.weight": A,
        "lora_unet_layers_0_attention_to_q.lora_up.weight": B,
    }
    model.load_lora_adapter(kohya, adapter_name="y")
    assert torch.equal(model.layers[0].attention.to_q.lora_B["y"].weight, B)


def test_release_gives_the_loaders_back(pipe):
    lora.release(pipe)
    assert not {lora.LOADER, lora.READER} & {*vars(pipe), *vars(pipe.transformer)}
    lora.release(pipe)
    pipe.load_lora_weights(dict(GOOD), adapter_name="x")
    assert type(pipe.transformer.layers[0].attention.to_k) is peft_layers.Int8LoraLinear


def test_a_lora_for_text_encoders_alone_leaves_the_denoiser_as_it_is(pipe):
    kept = tensors(pipe.transformer)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    state = {f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(64, 4)}
    assert lora._load_adapter(pipe.transformer, state, prefix="transformer") is None
    assert not lora.has_adapters(pipe.transformer)
    assert equal(tensors(pipe.transformer), kept)
    with pytest.raises(InputError, match=r"layers\.0\.nothing"):
        lora._load_adapter(
            pipe.transformer, {**state, "transformer.layers.0.nothing.lora_A.weight": torch.zeros(4, 64)}
        )
