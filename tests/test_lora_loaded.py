"""LoRA files for a pipeline that was loaded in INT8, by the pipeline's own methods and no call of int8kit."""

import copy

import pytest
import torch
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from safetensors.torch import save_file

from int8kit import FileError, InputError, models, quantize_
from int8kit.integrations.diffusers import Int8KitConfig

QKV = "layers.0.attention.qkv"
FLAT = QKV.replace(".", "_")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A pipeline whose transformer was loaded with `quantization_config`."""
    folder = tmp_path_factory.mktemp("source")
    pipe = models.tiny_pipeline()
    pipe.transformer.save_pretrained(folder)
    model = Ideogram4Transformer2DModel.from_pretrained(folder, quantization_config=Int8KitConfig())
    return Ideogram4Pipeline(**{**pipe.components, "transformer": model})


@pytest.fixture
def pipe(stock):
    return Ideogram4Pipeline(**{**stock.components, "transformer": copy.deepcopy(stock.transformer)})


@pytest.fixture(scope="module")
def factors():
    torch.manual_seed(0)
    return torch.randn(4, 512, dtype=torch.bfloat16), torch.randn(1536, 4, dtype=torch.bfloat16)


def test_a_file_of_kohya_loads(pipe, factors, tmp_path):
    """A power of two as alpha over rank, so that folding it is exact."""
    a, b = factors
    state = {f"lora_unet_{FLAT}.lora_down.weight": a * 2, f"lora_unet_{FLAT}.lora_up.weight": b}
    save_file({**state, f"lora_unet_{FLAT}.alpha": torch.tensor(2.0)}, tmp_path / "kohya.safetensors")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(tmp_path / "kohya.safetensors", adapter_name="x")
    for part, third in zip("qkv", b.chunk(3), strict=True):
        layer = pipe.transformer.get_submodule(f"layers.0.attention.to_{part}")
        assert torch.equal(layer.lora_A["x"].weight, a)
        assert torch.equal(layer.lora_B["x"].weight, third)
        assert layer.scaling["x"] == 1
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_transformer_"])
def test_other_layouts_load(pipe, factors, prefix):
    a, b = factors
    name = f"{prefix}{FLAT}" if prefix.endswith("_") else f"{prefix}{QKV}"
    pipe.load_lora_weights({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, adapter_name="x")
    assert torch.equal(pipe.transformer.layers[0].attention.to_v.lora_B["x"].weight, b[1024:])


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_layers_0_attn_qkv",
        "base_model.model.layers.0.attention.to_q",
        "transformer.layers.7.attention.to_q",
    ],
)
def test_the_first_key_that_means_no_linear_is_named(pipe, factors, name):
    good = "transformer.layers.0.attention.to_k.lora"  # a part that would load
    state = {f"{good}_A.weight": torch.ones(4, 512), f"{good}_B.weight": torch.ones(512, 4)}
    state = state if name.startswith("transformer.") else {}
    state |= {f"{name}.lora_A.weight": factors[0], f"{name}.lora_B.weight": factors[1][:512]}
    with pytest.raises(InputError, match=f"^LoRA key '{name}.lora_A.weight' means no linear") as end:
        pipe.load_lora_weights(state)
    assert "\n" not in str(end.value)
    assert not hasattr(pipe.transformer, "peft_config")


def test_factors_of_another_size_are_refused(pipe, factors):
    a, b = factors
    name = "transformer.layers.0.attention.to_q.lora"
    for wrong, words in ((a[:, :8], r"shape \[4, 8\]; expected \[r, 512\]"), (a, r"\[1536, 4\]; expected \[512, r\]")):
        with pytest.raises(InputError, match=words):
            pipe.load_lora_weights({f"{name}_A.weight": wrong, f"{name}_B.weight": b})
    assert not hasattr(pipe.transformer, "peft_config")


def _with_lora(pipe, factors):
    a, b = factors
    pipe.load_lora_weights({f"diffusion_model.{QKV}.lora_A.weight": a, f"diffusion_model.{QKV}.lora_B.weight": b})
    return pipe.transformer


def test_a_model_with_a_lora_is_not_saved(pipe, factors, tmp_path):
    with pytest.raises(InputError, match=r"over 'layers.0.attention.to_q': .*unload_lora_weights\(\)"):
        _with_lora(pipe, factors).save_pretrained(tmp_path)


def test_files_that_were_saved_under_a_lora_are_refused_with_the_remedy(factors, tmp_path):
    """`quantize_` leaves save_pretrained as it is, so that loading must tell."""
    pipe = models.tiny_pipeline()
    quantize_(pipe.transformer)
    _with_lora(pipe, factors).save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"saved under a LoRA: .*unload_lora_weights\(\)") as end:
        Ideogram4Transformer2DModel.from_pretrained(tmp_path)
    assert "\n" not in str(end.value)
