"""integrations/config.py: the configuration, its names of linears, and the registration."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.quantizers import auto
from diffusers_helpers import assert_one_line, int8_names, load
from transformers.quantizers import auto as transformers_auto

from int8kit import Int8Linear, quantization
from int8kit.errors import FileError, InputError
from int8kit.integrations import config as configuration
from int8kit.integrations import loader
from int8kit.integrations.diffusers import Int8KitConfig, register

pytestmark = pytest.mark.xdist_group("diffusers")


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
    monkeypatch.setattr(quantization, "chosen", lambda model: [])
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


def test_a_layer_under_two_names_is_replaced_under_both():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)})
    model["b"] = model["a"]
    loader.replace(model, ["a"])
    assert model["a"] is model["b"]
    assert isinstance(model["a"], Int8Linear)
