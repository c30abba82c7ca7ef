"""integrations/transformers.py: INT8 text encoders."""

import copy

import pytest
import torch
from diffusers_helpers import (
    assert_equal_states,
    assert_one_line,
    changed,
    int8_names,
)
from transformers import AutoModel, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, T5Config, T5EncoderModel

import int8kit
from int8kit import reference
from int8kit.errors import FileError
from int8kit.integrations import config as configuration
from int8kit.integrations.diffusers import Int8KitConfig

pytestmark = pytest.mark.xdist_group("diffusers")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny random Qwen3 with a head, in bf16."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}
    settings = Qwen3Config(hidden_size=256, num_hidden_layers=2, intermediate_size=512, vocab_size=96, **heads)
    settings.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("qwen")
    Qwen3ForCausalLM(settings).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(encoder_folder):
    """The same with INT8 layers, for tests that do not change it."""
    return AutoModelForCausalLM.from_pretrained(encoder_folder, quantization_config=Int8KitConfig())


TOKENS = torch.arange(9)[None]


def test_a_text_encoder_is_quantized_on_loading(encoder_folder, encoder):
    source = AutoModelForCausalLM.from_pretrained(encoder_folder)
    inner = {name for name in configuration.linears(source) if name != "lm_head"}
    assert int8_names(encoder) == inner
    assert len(inner) == 14
    for name in inner:
        wq, sw = reference.quantize(source.get_submodule(name).weight.detach())
        assert torch.equal(encoder.get_submodule(name).weight, wq)
        assert torch.equal(encoder.get_submodule(name).weight_scale, sw)
    with torch.no_grad():
        a, b = source(TOKENS).logits, encoder(TOKENS).logits
    assert 0 < (a - b).norm() < 0.1 * a.norm()
    assert encoder.num_parameters() == source.num_parameters()
    assert encoder.get_memory_footprint() < source.get_memory_footprint()
    assert encoder.hf_quantizer.is_serializable()
    assert encoder.hf_quantizer.is_trainable
    assert encoder.hf_quantizer.is_compileable


@pytest.mark.parametrize("settings", [{}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}])
@pytest.mark.parametrize("size", ["10GB", "50KB"])
def test_a_saved_text_encoder_has_the_same_bits(encoder, tmp_path, size, settings):
    encoder.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) is (size == "10GB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    assert_equal_states(encoder, again)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, encoder(TOKENS).logits)


def test_a_part_of_a_saved_text_encoder_loads(encoder, tmp_path, caplog):
    """AutoModel leaves the head out, and its names lack the prefix `model`."""
    encoder.save_pretrained(tmp_path)
    assert_equal_states(AutoModel.from_pretrained(tmp_path), encoder.model)


def test_casts_of_a_text_encoder(encoder):
    model = copy.deepcopy(encoder)
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()
    name = "model.layers.0.mlp.up_proj.weight_scale"
    for cast in (model.bfloat16(), model.to(torch.float16)):
        assert cast.get_buffer(name).dtype is torch.float32
        assert torch.equal(cast.get_buffer(name), encoder.get_buffer(name))


def test_dequantize_a_text_encoder(encoder, tmp_path):
    model = copy.deepcopy(encoder).dequantize()
    layer = encoder.model.layers[1].mlp.up_proj
    expected = (layer.weight.float() * layer.weight_scale[:, None]).bfloat16()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)
    model.save_pretrained(tmp_path)
    assert_equal_states(AutoModelForCausalLM.from_pretrained(tmp_path), model)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != UP}, rf"the files lack {UP}; expected all"),
        (lambda t: {k: v for k, v in t.items() if k != f"{UP}_scale"}, rf"the files lack {UP}_scale; expected"),
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, r"the files lack model\.norm\.weight"),
        (lambda t: t.update({UP: t[UP].bfloat16()}), rf"tensors of another layout: {UP}; expected int8"),
        (lambda t: t.update({f"{UP}_scale": t[f"{UP}_scale"].half()}), rf"another layout: {UP}_scale; expected int8"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}),
            "another layout: .*input_scale",
        ),
    ],
)
def test_a_damaged_text_encoder_is_one_error(encoder, tmp_path, change, message):
    encoder.save_pretrained(tmp_path / "int8")
    with pytest.raises(FileError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(changed(tmp_path / "int8", tmp_path / "broken", change))
    assert_one_line(caught)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != UP}, rf"the files lack {UP}, {UP}_scale; expected all"),
        (
            lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn), f"{UP}_scale": torch.ones(128)}),
            rf"tensors of another layout: {UP}, {UP}_scale; expected float weights without scales",
        ),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), rf"another layout: {UP}; expected float weights"),
    ],
)
def test_a_foreign_text_encoder_is_one_error(encoder_folder, tmp_path, change, message):
    folder = changed(encoder_folder, tmp_path / "foreign", change)
    with pytest.raises(FileError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=Int8KitConfig())
    assert_one_line(caught)


def test_a_text_encoder_of_quantize_loads_as_it_was_saved(tmp_path):
    """T5 keeps one linear of each layer in float32 where a loader quantizes; `quantize_` may take it."""
    torch.manual_seed(0)
    settings = T5Config(vocab_size=96, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4)
    model = T5EncoderModel(settings).eval()
    int8kit.quantize_(model)
    assert any(name.endswith(".wo") for name in int8_names(model))
    with torch.no_grad():
        want = model(TOKENS).last_hidden_state
    model.save_pretrained(tmp_path)
    again = T5EncoderModel.from_pretrained(tmp_path)
    assert int8_names(again) == int8_names(model)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).last_hidden_state, want)
