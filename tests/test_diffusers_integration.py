"""integrations/diffusers.py: INT8 models by from_pretrained and save_pretrained, and the traps of diffusers' loader."""

import copy
import pickle
import re
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, Ideogram4Pipeline, Ideogram4Transformer2DModel, PipelineQuantizationConfig
from diffusers_helpers import (
    LAYER,
    SCALE,
    WEIGHT,
    assert_equal_states,
    assert_one_line,
    changed,
    image,
    int8_names,
    load,
    output,
)

import int8kit
from int8kit import models, ops, reference
from int8kit.errors import InputError
from int8kit.integrations import config as configuration
from int8kit.integrations import loader
from int8kit.integrations.diffusers import Int8KitConfig, Int8KitQuantizer

pytestmark = pytest.mark.xdist_group("diffusers")
PAGE = Path(__file__).parent.parent / "docs" / "diffusers.md"


def test_float_weights_are_quantized_on_loading(floats, loaded):
    source = load(floats, dtype=torch.bfloat16)
    wanted = {name for name in configuration.linears(source) if models.get("ideogram4").quantizes(name)}
    assert int8_names(loaded) == wanted
    assert len(wanted) == 15
    for name in wanted:
        wq, sw = reference.quantize(source.get_submodule(name).weight.detach())
        assert torch.equal(loaded.get_submodule(name).weight, wq)
        assert torch.equal(loaded.get_submodule(name).weight_scale, sw)
    left = {name: p for name, p in source.named_parameters() if name.removesuffix(".weight") not in wanted}
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in left.items())
    noise = (output(loaded) - output(source)).norm() / output(source).norm()
    assert 0 < noise < 0.1


@pytest.mark.parametrize("size", ["10GB", "200KB"])
def test_a_saved_model_has_the_same_bits(loaded, tmp_path, size):
    loaded.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if size == "10GB" else 21)
    again = load(tmp_path)
    assert_equal_states(loaded, again)
    assert torch.equal(output(loaded), output(again))
    assert load(tmp_path).config.quantization_config == loaded.config.quantization_config
    assert_equal_states(loaded, diffusers.AutoModel.from_pretrained(str(tmp_path)))


def test_bin_files_work_too(loaded, tmp_path):
    loaded.save_pretrained(tmp_path, safe_serialization=False)
    assert_equal_states(loaded, load(tmp_path, use_safetensors=False))


def test_a_pipeline_round_trip_gives_the_same_image(pipeline_folder, tmp_path):
    """Both transformers and the text encoder. Without a dtype, diffusers loads the VAE in float32."""
    configs = dict(int8kit.pipeline_config().quant_mapping)
    configs["text_encoder"] = Int8KitConfig(policy=["language_model.*.mlp.*"])
    pipe = Ideogram4Pipeline.from_pretrained(
        pipeline_folder, dtype=torch.bfloat16, quantization_config=PipelineQuantizationConfig(quant_mapping=configs)
    )
    assert len(int8_names(pipe.transformer)) == len(int8_names(pipe.unconditional_transformer)) == 15
    assert len(int8_names(pipe.text_encoder)) == 3 * 36
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    for name in configs:
        assert_equal_states(getattr(again, name), getattr(pipe, name))
    assert image(again).shape == (1, 3, 32, 32)
    assert torch.equal(image(DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)), image(pipe))


def test_a_sharded_float_model_loads(floats, loaded, tmp_path):
    load(floats, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 10
    assert_equal_states(load(tmp_path, quantization_config=Int8KitConfig()), loaded)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(floats, saved, loaded, device_map):
    for folder, settings in ((floats, {"quantization_config": Int8KitConfig()}), (saved, {})):
        model = load(folder, device_map=device_map, **settings)
        assert_equal_states(model, loaded)
        assert torch.equal(output(model), output(loaded))


def test_float32_weights_are_quantized_before_they_are_cast(floats, tmp_path):
    """The dtype of the other parameters has no influence on the int8 weights."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    folder = changed(floats, tmp_path / "wide", lambda t: t.update({WEIGHT: weight}))
    wq, sw = reference.quantize(weight)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = load(folder, dtype=dtype, quantization_config=Int8KitConfig()).get_submodule(LAYER)
        assert torch.equal(layer.weight, wq)
        assert torch.equal(layer.weight_scale, sw)


def test_one_expanded_weight_is_in_memory(floats, tmp_path, monkeypatch):
    def to_fp8(tensors):
        for name in [name for name in tensors if tensors[name].dim() == 2]:
            if not name.startswith("embed"):
                tensors[f"{name}_scale"] = torch.ones(len(tensors[name]))
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    alive, most, quantize = [], [], ops.quantize

    def spy(weight):
        alive.append(weakref.ref(weight))
        most.append(sum(one() is not None for one in alive))
        return quantize(weight)

    monkeypatch.setattr(ops, "quantize", spy)
    load(changed(floats, tmp_path / "fp8", to_fp8), quantization_config=Int8KitConfig())
    assert most == [1] * 15


def test_rows_are_quantized_in_parts(floats, loaded, monkeypatch):
    monkeypatch.setattr(loader, "AT_A_TIME", 100_000)
    assert_equal_states(load(floats, quantization_config=Int8KitConfig()), loaded)


def test_scales_stay_float32(loaded, saved):
    for dtype in (torch.bfloat16, torch.float16, None):
        model = load(saved, dtype=dtype)
        assert model.get_buffer(SCALE).dtype is torch.float32
        assert torch.equal(model.get_buffer(SCALE), loaded.get_buffer(SCALE))
        assert model.get_parameter("adaln_proj.weight").dtype is (dtype or torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_a_dtype_a_folder_has_the_dtype_of_its_model(floats, tmp_path, dtype):
    assert load(floats, quantization_config=Int8KitConfig()).dtype is torch.bfloat16
    model = load(floats, dtype=dtype, quantization_config=Int8KitConfig())
    model.save_pretrained(tmp_path)
    assert_equal_states(model, load(tmp_path))


def test_another_dtype_is_one_error(floats):
    with pytest.raises(InputError, match=r"dtype = torch\.float64; expected one of torch\.bfloat16"):
        load(floats, dtype=torch.float64, quantization_config=Int8KitConfig())


def test_a_config_for_a_saved_model_gives_way_to_the_file(saved, loaded):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(saved, quantization_config=Int8KitConfig(policy=["*to_q"]))
    assert_equal_states(model, loaded)


def test_a_dtype_cast_raises_or_keeps_the_scales(saved, loaded):
    model = load(saved)
    for cast in (lambda: model.to(torch.float16), model.half, model.float, lambda: model.to("cpu", torch.float16)):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    assert_equal_states(model, loaded)
    assert_equal_states(model.bfloat16(), loaded)
    assert torch.equal(model.cpu().get_buffer(SCALE), loaded.get_buffer(SCALE))


def test_low_cpu_mem_usage(floats, loaded):
    assert_equal_states(load(floats, low_cpu_mem_usage=True, quantization_config=Int8KitConfig()), loaded)
    with pytest.raises(ValueError, match="`low_cpu_mem_usage` cannot be False"):
        load(floats, low_cpu_mem_usage=False, quantization_config=Int8KitConfig())


def test_a_pipeline_refuses_a_cast_and_the_int8_layers_are_intact(pipeline_folder, loaded):
    pipe = Ideogram4Pipeline.from_pretrained(
        pipeline_folder, dtype=torch.bfloat16, quantization_config=int8kit.pipeline_config(), text_encoder=None
    )
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipe.to(torch.float16)
    assert_equal_states(pipe.transformer, loaded)


def test_pipeline_configs(pipeline_folder):
    def names(config):
        pipe = Ideogram4Pipeline.from_pretrained(
            pipeline_folder, dtype=torch.bfloat16, quantization_config=config, text_encoder=None, vae=None
        )
        return int8_names(pipe.transformer), int8_names(pipe.unconditional_transformer)

    made = int8kit.pipeline_config(policy=("*to_q", "*to_k"), modules_to_not_convert=("to_k",))
    assert set(made.quant_mapping) == {"transformer", "unconditional_transformer"}
    expected = {f"layers.{i}.attention.to_q" for i in (0, 1)}
    assert names(made) == (expected, expected)
    by_name = PipelineQuantizationConfig(
        quant_backend="int8kit", quant_kwargs={"policy": ["*to_q"]}, components_to_quantize=list(made.quant_mapping)
    )
    assert names(by_name) == (expected, expected)
    assert names(int8kit.pipeline_config(["*to_q"], components=["transformer"])) == (expected, set())
    with pytest.raises(ValueError, match="must be an instance of `PipelineQuantizationConfig`"):
        names(Int8KitConfig())
    with pytest.raises(InputError, match="components = 'transformer'; expected a list of names"):
        int8kit.pipeline_config(components="transformer")
    with pytest.raises(InputError, match="policy = 'all'; expected a list of texts"):
        int8kit.pipeline_config("all")


def test_a_folder_holds_no_other_files(saved):
    """A pipeline's download takes config.json and the weights only."""
    assert {path.name for path in saved.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_sizes(floats, loaded):
    source = load(floats, dtype=torch.bfloat16)
    assert loaded.num_parameters() == source.num_parameters()
    int8 = sum(loaded.get_submodule(name).weight.numel() for name in int8_names(loaded))
    rows = sum(loaded.get_submodule(name).out_features for name in int8_names(loaded))
    assert loaded.get_memory_footprint() == source.get_memory_footprint() - int8 + 4 * rows


def test_properties(loaded):
    quantizer = loaded.hf_quantizer
    assert isinstance(quantizer, Int8KitQuantizer)
    assert quantizer.is_serializable
    assert quantizer.is_trainable
    assert quantizer.is_compileable
    assert loaded.is_quantized
    assert not any(p.requires_grad for p in loaded.parameters() if p.dtype is torch.int8)
    assert loaded.dtype is torch.bfloat16


def test_dequantize(saved, tmp_path):
    model = load(saved)
    scale, weight = model.get_buffer(SCALE), model.get_parameter(WEIGHT)
    plain = model.dequantize()
    assert int8_names(plain) == set()
    assert torch.equal(plain.get_parameter(WEIGHT), (weight.float() * scale[:, None]).bfloat16())
    assert plain.dtype is torch.bfloat16
    plain.to(torch.float32)
    plain.save_pretrained(tmp_path)
    assert_equal_states(load(tmp_path), plain)


def test_from_single_file_is_refused_by_diffusers(saved):
    with pytest.raises(ValueError, match="FromOriginalModelMixin is currently only compatible with"):
        Ideogram4Transformer2DModel.from_single_file(str(saved / "diffusion_pytorch_model.safetensors"))


def test_an_automatic_device_map_counts_int8_bytes(floats, loaded):
    room = int(loaded.get_memory_footprint() * 1.25)
    assert room < load(floats, dtype=torch.bfloat16).get_memory_footprint()
    settings = {"quantization_config": Int8KitConfig(), "device_map": "auto"}
    assert_equal_states(load(floats, max_memory={"cpu": room}, **settings), loaded)
    with pytest.raises(InputError, match="device_map places layers on 'disk'; expected devices and 'cpu'") as caught:
        load(floats, max_memory={"cpu": room // 3}, **settings)
    assert_one_line(caught)


def test_copies_of_a_loaded_model(loaded, tmp_path):
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert_equal_states(other, loaded)
        other.save_pretrained(tmp_path, max_shard_size="10GB")
        assert_equal_states(load(tmp_path), loaded)


def test_the_callers_config_is_not_changed(floats):
    config = Int8KitConfig()
    first = load(floats, dtype=torch.float16, quantization_config=config)
    assert config == Int8KitConfig()
    assert first.config.quantization_config.dtype == "float16"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) >= 6
    names = {}
    for block in found:
        exec(block, names)
    assert len(int8_names(names["pipe"].text_encoder)) == 3 * 36


@pytest.mark.parametrize("policy", [None, ["layers.*.attention.to_q"]])
def test_a_model_of_quantize_loads_as_it_was_saved(floats, tmp_path, policy):
    model = load(floats)
    int8kit.quantize_(model, policy)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert int8_names(again) == int8_names(model)
    assert_equal_states(again, model)
