"""verify/: the property `layers`, and versions of Triton in the property `stamps`."""

from dataclasses import replace

import pytest
import torch
from kernel_helpers import EXECUTOR

from int8kit import toolchain
from int8kit.errors import ShapeError
from int8kit.layers import Int8Linear
from int8kit.verify.examples.encoding import from_json, to_json
from int8kit.verify.examples.strategies import OUT_DTYPES
from int8kit.verify.properties import layers, stamps
from int8kit.verify.properties.layers import LayerCase

FP32, BF16 = torch.float32, torch.bfloat16
CASES = list(layers.always())
BASE = LayerCase("joined", (FP32, None), (3, 2), 40, 24, FP32)


def test_every_way_to_make_a_layer_is_tried():
    for made in layers.MADE:
        own = [c for c in CASES if c.made == made]
        assert {c.dtype for c in own} == set(OUT_DTYPES)
        assert {c.step for c in own} == set(layers.STEPS)
        assert {any(c.biases) for c in own} == {False, True}
    mixed = {c.made for c in CASES if None in c.biases and any(c.biases)}
    assert mixed == {"joined", "from_linears"}
    assert from_json(to_json(BASE)) == BASE
    assert "joined of parts with biases (float32, None)" in str(BASE)


@pytest.mark.parametrize("step", layers.STEPS)
@pytest.mark.parametrize("made", layers.MADE)
def test_layers_hold(made, step):
    biases = (BF16,) if made in ("from_linear", "from_int8") else (BF16, None)
    assert layers.check(LayerCase(made, biases, (3,), 40, 24, BF16, step), EXECUTOR) is None


@pytest.mark.parametrize(
    ("name", "broken", "words"),
    [
        ("bias", lambda layer: None, "the layer has no bias"),
        ("out_features", lambda layer: layer.out_features + 1, "40 to 50 features, expected 40 to 49"),
        ("weight_scale", lambda layer: layer.weight_scale.flip(0), "differ, first"),
        ("plan", lambda layer: None, None),
    ],
)
def test_wrong_layer_is_caught(monkeypatch, name, broken, words):
    whole = Int8Linear.joined.__func__

    def joined(cls, linears):
        layer = whole(cls, linears)
        setattr(layer, name, broken(layer))
        return layer

    monkeypatch.setattr(Int8Linear, "joined", classmethod(joined))
    found = layers.check(BASE, EXECUTOR)
    assert found is None if words is None else words in found


@pytest.mark.parametrize("step", layers.UNLOADED)
def test_a_layer_that_was_not_loaded_and_gives_numbers_is_caught(monkeypatch, step):
    whole = layers._loaded

    def filled(c, layer, device):
        made = whole(c, layer, device)
        made.weight_scale.fill_(1.0)
        return made

    monkeypatch.setattr(layers, "_loaded", filled)
    assert "want nan" in layers.check(replace(BASE, step=step), EXECUTOR)


def test_a_state_of_an_earlier_version_that_is_lost_is_caught(monkeypatch):
    monkeypatch.setattr(layers.Int8Linear, "_load_from_state_dict", torch.nn.Module._load_from_state_dict)
    with pytest.raises(RuntimeError, match="Missing key"):
        layers.check(replace(BASE, step="old names"), EXECUTOR)


def test_cast_that_changes_the_scales_is_caught(monkeypatch):
    monkeypatch.setattr(Int8Linear, "_apply", torch.nn.Module._apply)
    with pytest.raises(ShapeError, match=r"weight_scale is torch\.float16"):
        layers.check(replace(BASE, step="cast"), EXECUTOR)


def test_versions_of_triton(monkeypatch):
    case = stamps.StampCase(stamps.Kernel.TRITON, "native", spelt="3.7.1.0")
    assert stamps.check(case, EXECUTOR) is None
    assert str(case).endswith(", Triton 3.7.1.0")
    monkeypatch.setattr(toolchain, "generation", lambda version: "3.8" if version >= "3.8" else "3.6")
    assert stamps._generations() == "Triton 3.10.0 beside 3.6.0: expected another generation"
    monkeypatch.undo()
    whole = toolchain.Toolchain.proves

    def by_text(self, kernel, *, triton, **more):
        return triton == self.triton and whole(self, kernel, triton=triton, **more)

    monkeypatch.setattr(toolchain.Toolchain, "proves", by_text)
    assert stamps.check(case, EXECUTOR) == "Entry.stamps: refused, expected the opposite"
