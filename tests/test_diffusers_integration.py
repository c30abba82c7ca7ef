"""integrations/: INT8 models by from_pretrained and save_pretrained of diffusers and transformers."""

import copy
import json
import pickle
import re
import shutil
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, Ideogram4Pipeline, Ideogram4Transformer2DModel, PipelineQuantizationConfig
from diffusers.quantizers import auto
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.quantizers import auto as transformers_auto

import int8kit
from int8kit import Int8Linear, models, ops, reference
from int8kit.errors import FileError, InputError
from int8kit.integrations import config as configuration
from int8kit.integrations import loader
from int8kit.integrations.diffusers import Int8KitConfig, Int8KitQuantizer, register

pytestmark = pytest.mark.xdist_group("diffusers")
LAYER = "layers.1.attention.to_q"
WEIGHT, SCALE = f"{LAYER}.weight", f"{LAYER}.weight_scale"
PAGE = Path(__file__).parent.parent / "docs" / "diffusers.md"


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A saved tiny pipeline in bf16."""
    folder = tmp_path_factory.mktemp("float")
    models.tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def floats(pipeline_folder):
    """The folder of its transformer."""
    return pipeline_folder / "transformer"


@pytest.fixture(scope="module")
def loaded(floats):
    """The transformer with INT8 layers, for tests that do not change it."""
    return load(floats, quantization_config=Int8KitConfig())


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    """The folder in which it is saved."""
    folder = tmp_path_factory.mktemp("int8")
    loaded.save_pretrained(folder)
    return folder


def load(folder, **settings):
    return Ideogram4Transformer2DModel.from_pretrained(folder, **settings)


def tensors_of(folder):
    [path] = folder.glob("*.safetensors")
    return load_file(path)


def changed(folder, target, change, name="diffusion_pytorch_model"):
    """A copy of a model's folder whose tensors `change` has edited in place, or replaced."""
    shutil.copytree(folder, target)
    [path] = target.glob("*.safetensors")
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return target


def sharded(folder, target, parts):
    """A copy of a model's folder whose tensors are in several files."""
    shutil.copytree(folder, target, ignore=lambda *_: ["diffusion_pytorch_model.safetensors"])
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for name, tensors in zip(names, parts, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / name, {"format": "pt"})
    weight_map = {key: name for name, tensors in zip(names, parts, strict=True) for key in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (target / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return target


def assert_equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype is not b[name].dtype or not torch.equal(a[name], b[name])] == []


def output(transformer):
    torch.manual_seed(0)
    inputs = models.get("tiny").inputs(transformer, models.Case(64, 64, text_tokens=9))
    with torch.no_grad():
        return transformer(**inputs).sample


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 1, "guidance_schedule": [3.0], "max_sequence_length": 32, "output_type": "pt"}
    return pipe("a cat", height=32, width=32, generator=torch.Generator().manual_seed(0), **settings).images


def int8_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def assert_one_line(caught):
    assert "\n" not in str(caught.value)


# ---- from float, and the round trip


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


# ---- configuration


def test_registration_is_idempotent():
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    register()
    assert before == auto.AUTO_QUANTIZER_MAPPING
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["int8kit"] is Int8KitConfig
    assert transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING["int8kit"] is Int8KitConfig


def test_without_the_import_the_quantizer_is_unknown(saved, monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "int8kit")
    with pytest.raises(ValueError, match="Unknown quantization type, got int8kit"):
        load(saved)


def test_the_method_is_an_enum_after_json():
    made = Int8KitConfig.from_dict(json.loads(json.dumps(Int8KitConfig(policy=["a"]).to_dict())))
    assert made.quant_method.value == "int8kit"
    assert made == Int8KitConfig(policy=["a"])
    assert made != Int8KitConfig(policy=["b"])
    assert '"policy"' in made.to_json_string()
    assert Int8KitConfig(quant_method="int8kit").quant_method.value == "int8kit"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": torch.bfloat16}, r"dtype = torch\.bfloat16; expected one of bfloat16, float16, float32, as a text"),
        ({"dtype": "int8"}, "dtype = 'int8'; expected one of"),
        ({"modules_to_not_convert": [Path("a")]}, r"modules_to_not_convert = \[.*Path\('a'\)\]; expected a list of"),
        ({"modules_to_not_convert": "adaln"}, "modules_to_not_convert = 'adaln'; expected a list of texts"),
        ({"policy": {"a"}}, r"policy = \{'a'\}; expected a list of texts"),
    ],
)
def test_a_config_holds_texts_only(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        Int8KitConfig(**settings)
    assert_one_line(caught)


def test_a_config_of_a_later_version_is_one_error():
    with pytest.raises(FileError, match=r"unknown keys rotation; expected quant_method, .*; update int8kit"):
        Int8KitConfig.from_dict({"quant_method": "int8kit", "rotation": 256})


def test_names_select_linears(floats):
    def names(**settings):
        return int8_names(load(floats, quantization_config=Int8KitConfig(**settings)))

    blocks = ["layers.0", "layers.1"]
    assert names(policy=["layers.*.attention.to_[qk]"]) == {f"{b}.attention.to_{x}" for b in blocks for x in "qk"}
    assert names(policy=["*to_q"], modules_to_not_convert=["layers.1"]) == {"layers.0.attention.to_q"}
    assert names(policy=["*adaln_proj", "*.w1"], modules_to_not_convert=["w1"]) == {"adaln_proj"}
    assert not any("attention" in name for name in names(modules_to_not_convert=["attention"]))
    with pytest.raises(InputError, match=r"policy \['blocks\.\*'\] selects no linear of Ideogram4Transformer2DModel"):
        names(policy=["blocks.*"])


def test_a_saved_model_keeps_its_selection(floats, tmp_path, monkeypatch):
    """A later default changes nothing for a folder."""
    made = load(floats, quantization_config=Int8KitConfig(modules_to_not_convert=["layers.1.attention", "w2"]))
    made.save_pretrained(tmp_path)
    monkeypatch.setattr(configuration, "default_policy", lambda model: [])
    assert int8_names(load(tmp_path)) == int8_names(made)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["modules_to_not_convert"] == ["layers.1.attention", "w2"]
    assert "layers.*.feed_forward.w1" in written["policy"]


def test_patterns_select_the_names_and_no_others():
    every = ["proj", "a.0.q", "a.1.q", "a.0.k", "a.1.k", "b.proj", "a.10.q"]
    for names in (every, ["a.0.q", "a.1.q", "a.10.q"], ["a.1.q", "proj"], ["a.1.k", "a.0.q", "a.1.q"], []):
        patterns = configuration.as_patterns(names, every)
        config = Int8KitConfig(policy=patterns)
        model = torch.nn.Module()
        for name in every:
            parent = model
            for part in name.split(".")[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.add_module(name.split(".")[-1], torch.nn.Linear(2, 2))
        assert set(configuration.select(model, config)) == set(names)
    assert configuration.as_patterns(["a.0.q", "a.1.q", "a.10.q"], every) == ["a.*.q"]


def test_the_default_of_another_model():
    layers = [torch.nn.Linear(*widths) for widths in ((64, 64), (64, 128), (128, 72), (72, 64), (32, 64), (64, 64))]
    assert configuration.default_policy(torch.nn.Sequential(*layers)) == ["1"]


def test_a_layer_under_two_names_is_replaced_under_both():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)})
    model["b"] = model["a"]
    loader.replace(model, ["a"])
    assert model["a"] is model["b"]
    assert isinstance(model["a"], Int8Linear)


# ---- traps of the loader


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


@pytest.mark.parametrize("name", [WEIGHT, SCALE, "layers.0.attention_norm1.weight", "adaln_proj.bias"])
def test_a_missing_tensor_is_named(saved, tmp_path, name):
    folder = changed(saved, tmp_path / "broken", lambda t: {k: v for k, v in t.items() if k != name})
    for settings in ({}, {"device_map": "cpu"}):
        with pytest.raises(FileError, match=rf"the files lack {re.escape(name)}; expected") as caught:
            load(folder, **settings)
        assert_one_line(caught)


def test_a_missing_float_weight_is_named(floats, tmp_path):
    folder = changed(floats, tmp_path / "broken", lambda t: {k: v for k, v in t.items() if ".w3." not in k})
    with pytest.raises(FileError, match=r"the files lack layers\.0\.feed_forward\.w3\.weight, layers\.1\.feed_for"):
        load(folder, quantization_config=Int8KitConfig())


def test_an_int8_weight_stored_as_float_is_named(saved, tmp_path):
    folder = changed(saved, tmp_path / "broken", lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}))
    with pytest.raises(FileError, match=rf"INT8 weights are stored as torch.bfloat16: {WEIGHT}; expected") as caught:
        load(folder)
    assert_one_line(caught)


def test_scales_in_another_dtype_are_named(saved, tmp_path):
    folder = changed(saved, tmp_path / "broken", lambda t: t.update({SCALE: t[SCALE].bfloat16()}))
    with pytest.raises(FileError, match=rf"{SCALE} is torch.bfloat16; expected torch.float32"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{LAYER}.input_scale", torch.ones(1), rf"tensors of another layout: {LAYER}\.input_scale; expected"),
        (f"{LAYER}.weight_scale_inv", torch.ones(4, 4), "another layout"),
        (f"{LAYER}.weight.absmax", torch.ones(4), "another layout"),
        ("t_embedding.smooth", torch.ones(4), "another layout"),
        ("layers.0.attention_norm1.weight_scale", torch.ones(512), "another layout"),
        (f"{LAYER}.weight_scale", torch.ones(512), "weights are torch.bfloat16 with a scale"),
        (f"{LAYER}.weight", torch.ones(512, 512, dtype=torch.int8), "weights are torch.int8 without a scale"),
        ("adaln_proj.weight", torch.ones(32, 512, dtype=torch.uint8), "weights are torch.uint8 without a scale"),
    ],
)
def test_a_scale_that_nothing_reads_is_named(floats, tmp_path, name, tensor, message):
    folder = changed(floats, tmp_path / "foreign", lambda t: t.update({name: tensor}))
    with pytest.raises(FileError, match=message) as caught:
        load(folder, quantization_config=Int8KitConfig())
    assert_one_line(caught)


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


# ---- foreign layouts


def fused(tensors):
    """Tensors under the official names: q, k and v are one linear, and the output projection is `o`."""
    found = {}
    for name, tensor in tensors.items():
        if ".to_q." in name:
            parts = [tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            found[name.replace("to_out.0", "o")] = tensor
    return found


def official_fp8(tensors, scale=lambda weight: weight.abs().amax(1) / 448):
    """The official layout: e4m3 weights and a float32 scale for each row, in all linears."""
    found = fused(tensors)
    for name in [name for name in found if found[name].dim() == 2 and not name.startswith("embed")]:
        weight = found[name].float()
        scales = scale(weight)
        found[f"{name}_scale"] = scales
        found[name] = (weight / scales.reshape(-1, 1)).to(torch.float8_e4m3fn)
    return found


def assert_official(model, tensors):
    """The model equals weight x scale, taken from the file by hand."""
    for layer, row in (("layers.0.attention.to_q", 0), ("layers.1.attention.to_k", 1), ("layers.1.attention.to_v", 2)):
        name = f"{layer.rpartition('.')[0]}.qkv.weight"
        full = tensors[name].float() * tensors[f"{name}_scale"].reshape(-1, 1)
        wq, sw = reference.quantize(full[512 * row : 512 * (row + 1)].contiguous())
        assert torch.equal(model.get_submodule(layer).weight, wq)
        assert torch.equal(model.get_submodule(layer).weight_scale, sw)
    for name, layer in (("layers.0.attention.o", "layers.0.attention.to_out.0"), ("llm_cond_proj",) * 2):
        wq, sw = reference.quantize(tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"].reshape(-1, 1))
        assert torch.equal(model.get_submodule(layer).weight, wq)
        assert torch.equal(model.get_submodule(layer).weight_scale, sw)
    name = "layers.1.adaln_modulation.weight"
    full = tensors[name].float() * tensors[f"{name}_scale"].reshape(-1, 1)
    assert torch.equal(model.get_parameter(name), full.bfloat16())
    assert torch.equal(model.get_parameter("adaln_proj.bias"), tensors["adaln_proj.bias"])


@pytest.mark.parametrize("scale", ["row", "column", "tensor"])
def test_official_fp8_files_load(floats, tmp_path, scale):
    scales = {
        "row": lambda weight: weight.abs().amax(1) / 448,
        "column": lambda weight: weight.abs().amax(1, keepdim=True) / 448,
        "tensor": lambda weight: weight.abs().amax() / 448,
    }
    folder = changed(floats, tmp_path / "fp8", lambda tensors: official_fp8(tensors, scales[scale]))
    model = load(folder, quantization_config=Int8KitConfig())
    assert_official(model, tensors_of(folder))
    source = load(floats, dtype=torch.bfloat16)
    assert (output(model) - output(source)).norm() < 0.1 * output(source).norm()
    model.save_pretrained(tmp_path / "int8")
    assert_equal_states(load(tmp_path / "int8"), model)


@pytest.mark.parametrize("scales_first", [True, False])
def test_weights_and_scales_in_different_files(floats, tmp_path, scales_first):
    tensors = official_fp8(tensors_of(floats))
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale")}
    weights = {name: tensor for name, tensor in tensors.items() if name not in scales}
    parts = [scales, weights] if scales_first else [weights, scales]
    model = load(sharded(floats, tmp_path / "fp8", parts), quantization_config=Int8KitConfig())
    assert_official(model, tensors)


def test_no_warning_about_names_that_are_read(floats, tmp_path, caplog):
    folder = changed(floats, tmp_path / "fp8", official_fp8)
    diffusers.utils.logging.enable_propagation()
    try:
        load(folder, quantization_config=Int8KitConfig())
    finally:
        diffusers.utils.logging.disable_propagation()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_fp8_files_with_a_missing_tensor(floats, tmp_path):
    tensors = official_fp8(tensors_of(floats))
    for i, (name, message) in enumerate(
        [
            ("layers.0.attention.qkv.weight", r"the files lack layers\.0\.attention\.to_k\.weight, .*to_q\.weight"),
            ("layers.1.attention.o.weight", r"the files lack layers\.1\.attention\.to_out\.0\.weight"),
        ]
    ):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(FileError, match=message) as caught:
            load(sharded(floats, tmp_path / str(i), [left]), quantization_config=Int8KitConfig())
        assert_one_line(caught)


def test_an_index_that_names_more_than_its_files_hold(floats, tmp_path):
    """The index promises a scale and a bias that no file has."""
    tensors = official_fp8(tensors_of(floats))
    lost = ["llm_cond_proj.weight_scale", "adaln_proj.bias"]
    folder = sharded(floats, tmp_path / "fp8", [tensors])
    [path] = folder.glob("*.safetensors")
    save_file({key: t.contiguous() for key, t in tensors.items() if key not in lost}, path, {"format": "pt"})
    with pytest.raises(
        FileError, match=r"not set: adaln_proj\.bias, llm_cond_proj\.weight, .*; expected files"
    ) as caught:
        load(folder, quantization_config=Int8KitConfig())
    assert_one_line(caught)


def test_weights_that_the_loader_puts_aside_are_named(floats):
    """diffusers writes them to a folder that it does not read again."""
    with pytest.raises(FileError, match=r"tensors were not set: .* and .* more; expected .* no offload_state_dict"):
        load(floats, quantization_config=Int8KitConfig(), offload_state_dict=True)


def test_plain_fp8_weights_are_floats(floats, tmp_path):
    folder = changed(floats, tmp_path / "fp8", lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)}))
    layer = load(folder, quantization_config=Int8KitConfig()).get_submodule(LAYER)
    wq, sw = reference.quantize(tensors_of(folder)[WEIGHT].float())
    assert torch.equal(layer.weight, wq)
    assert torch.equal(layer.weight_scale, sw)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.attention.qkv.weight", torch.ones(1024, 512), r"qkv\.weight has shape \[1024, 512\]; expected 1536"),
        ("adaln_proj.weight_scale", torch.ones(4, 8), r"weight_scale has shape \[4, 8\]; expected one scale, or 32"),
        ("adaln_proj.weight_scale", torch.ones(16), r"weight_scale has shape \[16\]; expected one scale"),
        ("adaln_proj.weight_scale", torch.ones(32).int(), r"weight_scale is torch\.int32; expected torch\.float32"),
        ("adaln_proj.input_scale", torch.ones(1), r"another layout: adaln_proj\.input_scale"),
        (
            "layers.0.attention.qkv.scale_input",
            torch.ones(1),
            r"tensors of another layout: layers\.0\.attention\.to_",
        ),
    ],
)
def test_fp8_files_of_other_shapes_are_one_error(floats, tmp_path, name, tensor, message):
    folder = changed(floats, tmp_path / "fp8", lambda tensors: {**official_fp8(tensors), name: tensor})
    with pytest.raises(FileError, match=message) as caught:
        load(folder, quantization_config=Int8KitConfig())
    assert_one_line(caught)


def comfy_int8(tensors, **settings):
    """ComfyUI's INT8 layout: fused names, int8 weights with scales [N, 1], and a note for each linear."""
    found = fused(tensors)
    note = json.dumps({"format": "int8_tensorwise", **settings}).encode()
    for name in [name for name in found if name.startswith("layers.") and found[name].dim() == 2]:
        found[name], scale = reference.quantize(found[name])
        found[f"{name}_scale"] = scale[:, None]
        found[f"{name.removesuffix('.weight')}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    return found


def test_int8_files_keep_their_weights_and_scales(floats, loaded, tmp_path):
    def altered(tensors):
        found = comfy_int8(tensors)
        found["layers.1.attention.qkv.weight"][0, 0] = -128
        return found

    model = load(changed(floats, tmp_path / "int8", altered), quantization_config=Int8KitConfig())
    assert model.get_parameter(WEIGHT)[0, 0] == -128
    assert torch.equal(model.get_parameter(WEIGHT)[1:], loaded.get_parameter(WEIGHT)[1:])
    assert torch.equal(model.get_buffer(SCALE), loaded.get_buffer(SCALE))
    name = "layers.0.adaln_modulation.weight"  # outside the policy: back to float
    wq, sw = reference.quantize(tensors_of(floats)[name])
    assert torch.equal(model.get_parameter(name), (wq.float() * sw[:, None]).bfloat16())
    model.save_pretrained(tmp_path / "again")
    assert_equal_states(load(tmp_path / "again"), model)


def test_rotated_weights_are_one_error(floats, tmp_path):
    folder = changed(floats, tmp_path / "rotated", lambda t: comfy_int8(t, convrot=True, convrot_groupsize=256))
    with pytest.raises(InputError, match=r"comfy_quant describes a rotated weight \(convrot\); expected") as caught:
        load(folder, quantization_config=Int8KitConfig())
    assert_one_line(caught)


def test_a_damaged_note_is_one_error(floats, tmp_path):
    note = torch.tensor([91, 93], dtype=torch.uint8)  # []
    folder = changed(floats, tmp_path / "damaged", lambda t: {**comfy_int8(t), "adaln_proj.comfy_quant": note})
    with pytest.raises(FileError, match=r"adaln_proj\.comfy_quant holds no JSON object"):
        load(folder, quantization_config=Int8KitConfig())


def test_another_model_of_diffusers(tmp_path):
    """Wan has modules that stay float32, and the default policy of other models."""
    torch.manual_seed(0)
    settings = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    widths = {"text_dim": 64, "freq_dim": 64, "ffn_dim": 128, "num_layers": 1}
    diffusers.WanTransformer3DModel(**settings, **widths).save_pretrained(tmp_path / "source")
    config = Int8KitConfig()
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "source", quantization_config=config)
    assert {"blocks.0.attn1.to_q", "blocks.0.ffn.net.2"} < int8_names(model)
    assert not {name for name in int8_names(model) if "time_embedder" in name or name == "proj_out"}
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype is torch.float32
    model.save_pretrained(tmp_path / "int8")
    assert_equal_states(diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "int8"), model)


# ---- text encoders


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny random Qwen3 with a head, in bf16."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    settings = Qwen3Config(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=96, **heads)
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


# ---- the page


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) >= 6
    names = {}
    for block in found:
        exec(block, names)
    assert len(int8_names(names["pipe"].text_encoder)) == 3 * 36
