"""integrations/loader.py: damaged files and files of other layouts."""

import json
import re

import diffusers
import pytest
import torch
from diffusers_helpers import (
    LAYER,
    SCALE,
    WEIGHT,
    assert_equal_states,
    assert_one_line,
    changed,
    int8_names,
    load,
    output,
    sharded,
    tensors_of,
)
from safetensors.torch import save_file

from int8kit import reference
from int8kit.errors import FileError, InputError
from int8kit.integrations.diffusers import Int8KitConfig

pytestmark = pytest.mark.xdist_group("diffusers")


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
    settings = {"num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4}
    widths = {"text_dim": 64, "freq_dim": 64, "ffn_dim": 512, "num_layers": 1}
    diffusers.WanTransformer3DModel(**settings, **widths).save_pretrained(tmp_path / "source")
    config = Int8KitConfig()
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "source", quantization_config=config)
    assert {"blocks.0.attn1.to_q", "blocks.0.ffn.net.2"} < int8_names(model)
    assert not {name for name in int8_names(model) if "time_embedder" in name or name == "proj_out"}
    assert model.condition_embedder.time_embedder.linear_1.weight.dtype is torch.float32
    model.save_pretrained(tmp_path / "int8")
    assert_equal_states(diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "int8"), model)
