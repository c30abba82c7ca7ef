import json
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from int8kit import models
from int8kit.errors import FileError, InputError, UnknownName
from int8kit.models import Case


@pytest.mark.parametrize(("height", "width"), [(1000, 1024), (1024, 17), (0, 16), (-16, 16)])
def test_sizes_are_multiples_of_16(height, width):
    with pytest.raises(InputError, match="positive multiple of 16; the nearest are"):
        Case(height, width)


def test_slots_hold_the_text():
    assert Case(64, 64, text_tokens=5).text_slots == 5
    assert Case(64, 64, text_tokens=5, slots=9).text_slots == 9
    assert Case(64, 64, text_tokens=5, slots=9, branch="uncond").text_slots == 0
    with pytest.raises(InputError, match="4 text slots: expected at least 5"):
        Case(64, 64, text_tokens=5, slots=4)


def test_inputs_are_those_of_the_pipeline():
    """Layout against diffusers' own `_prepare_ids`, padded and not."""
    from diffusers import Ideogram4Pipeline

    model = models.get("tiny")
    module = model.build()
    for slots in (7, 12):
        case = Case(48, 32, text_tokens=7, slots=slots)
        inputs = model.inputs(module, case)
        positions, segments, indicator = Ideogram4Pipeline._prepare_ids([7], 3, 2, slots, torch.device("cpu"))
        assert torch.equal(inputs["position_ids"], positions)
        assert torch.equal(inputs["segment_ids"], segments)
        assert torch.equal(inputs["indicator"], indicator)
        with torch.no_grad():
            assert module(**inputs).sample.shape == (1, slots + 6, 128)


def test_a_folder_is_a_model(tmp_path):
    config = {"_class_name": "Ideogram4Transformer2DModel", **models.TINY_TRANSFORMER, "num_layers": 1}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    assert len(models.get(str(tmp_path)).build().layers) == 1
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(UnknownName, match="unknown transformer class 'FluxTransformer2DModel'"):
        models.get(str(tmp_path))
    (tmp_path / "transformer" / "config.json").write_text("{")
    with pytest.raises(FileError, match=r"damaged JSON in .*transformer/config\.json"):
        models.get(str(tmp_path))


def test_a_file_that_is_no_config_is_one_error(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileError, match=r"holds no transformer/config\.json; name a folder"):
        models.get(str(tmp_path))
    path.write_text("[1]")
    with pytest.raises(FileError, match="holds no JSON object"):
        models.get(str(tmp_path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileError, match="it is a FIFO"):
        models.get(str(tmp_path))
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(FileError, match="loop of symbolic links"):
        models.get(str(tmp_path))


def described(folder, **settings):
    """The model of a folder whose config has these settings beside tiny's."""
    config = {"_class_name": "Ideogram4Transformer2DModel", **models.TINY_TRANSFORMER, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return models.get(str(folder))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_layers": "x"}, "num_layers = 'x'; expected a whole number from 1 to 1024"),
        ({"num_layers": None}, "num_layers = None; expected a whole number"),
        ({"num_layers": True}, "num_layers = True; expected a whole number"),
        ({"num_layers": 0}, "num_layers = 0; expected"),
        ({"num_layers": 10**6}, "num_layers = 1000000; expected"),
        ({"attention_head_dim": 1e300}, r"attention_head_dim = 1e\+300; expected a whole number"),
        ({"norm_eps": 0}, "norm_eps = 0; expected a number above 0"),
        ({"mrope_section": [24, 20]}, r"mrope_section = \[24, 20\]; expected 3 whole numbers"),
        ({"mrope_section": [24, 20, -1]}, "expected 3 whole numbers"),
        ({"mrope_section": 24}, "expected 3 whole numbers"),
        ({"attention_head_dim": 1 << 24, "num_attention_heads": 1 << 24}, r"do not fit together \(.*compare them"),
    ],
)
def test_a_setting_of_another_type_is_one_error(tmp_path, settings, reason):
    with FakeTensorMode(), pytest.raises(FileError, match=rf"config\.json': .*{reason}") as caught:
        described(tmp_path, **settings).build()
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_left_out_with_a_note(tmp_path, recwarn):
    model = described(tmp_path, quantization_config={"quant_method": "bitsandbytes"}, num_layers=1.0)
    with FakeTensorMode():
        assert len(model.build().layers) == 1
    assert not [one for one in recwarn if one.category is models.UnusedSetting]
    with FakeTensorMode(), pytest.warns(models.UnusedSetting, match="left out 'bogus', 'rope_kind', which this"):
        described(tmp_path, rope_kind=3, bogus=None).build()


def test_a_pipeline_is_checked_without_imports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "md").mkdir()
    index = tmp_path / "md" / "model_index.json"

    def refused(name, reason):
        with pytest.raises(InputError, match=reason):
            models.check_pipeline(name)

    for name in ("./nofolder", "../x", "a/b/c/d", "~/x", "/x", "md/config.json", "a/-b", "a--b/c", "a/..", "a/b.", "."):
        refused(name, r"no folder '|holds no model_index\.json")
    refused("md", r"'md': it holds no model_index\.json; expected a folder")
    index.write_text("{")
    refused("md", "damaged JSON")
    refused("md/model_index.json", "cannot load 'md/model_index.json': it is a file; expected tiny")
    index.write_text('{"_class_name": "FluxPipeline"}')
    refused("md", "describes the pipeline 'FluxPipeline'; expected Ideogram4Pipeline")
    index.unlink()
    index.symlink_to(index)
    refused("md", "loop of symbolic links")
    index.unlink()
    os.mkfifo(index)
    refused("md", "it is a FIFO")
    refused("x" * 5000, "unknown model")
    refused("ideogram4", "no weights here")
    index.unlink()
    index.write_text('{"_class_name": "Ideogram4Pipeline"}')
    for name in ("tiny", "md", models.HUB_ID, "a/b"):
        models.check_pipeline(name)


def test_unknown_model():
    with pytest.raises(UnknownName, match="unknown model 'sdxl'; expected ideogram4, tiny"):
        models.get("sdxl")


def test_what_stays_in_bf16():
    model = models.get("ideogram4")
    assert model.quantizes("layers.3.attention.to_q")
    assert model.quantizes("llm_cond_proj")
    for name in ("layers.3.adaln_modulation", "adaln_proj", "t_embedding.mlp_in", "input_proj", "final_layer.linear"):
        assert not model.quantizes(name)


def test_tiny_pipeline_is_reproducible_and_leaves_no_trace():
    torch.manual_seed(5)
    before, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    first, second = models.tiny_pipeline(), models.tiny_pipeline()
    weight = "layers.0.attention.to_q.weight"
    assert torch.equal(first.transformer.state_dict()[weight], second.transformer.state_dict()[weight])
    assert not torch.equal(first.transformer.state_dict()[weight], first.unconditional_transformer.state_dict()[weight])
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_default_dtype() is dtype
