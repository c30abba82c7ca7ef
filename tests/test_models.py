import json

import pytest
import torch

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
    with pytest.raises(FileError, match=r"no readable transformer/config\.json"):
        models.get(str(tmp_path))


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
