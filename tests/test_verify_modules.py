"""verify/properties/modules.py: every kind of module holds, and faults of the exchange are caught."""

from dataclasses import replace

import pytest
import torch
from kernel_helpers import EXECUTOR

from int8kit import foreign_weights, quantization
from int8kit.layers import Int8Linear
from int8kit.verify.examples.encoding import from_json, to_json
from int8kit.verify.properties import choices, modules
from int8kit.verify.properties.choices import ChoiceCase
from int8kit.verify.properties.modules import ModuleCase

CASES = list(modules.always())
FP32 = torch.float32


def test_every_module_holds():
    assert [f"{c}: {why}" for c in CASES if (why := modules.check(c, EXECUTOR))] == []
    assert len(set(CASES)) == len(CASES)
    for call in modules.CALLS:
        own = [c for c in CASES if c.call == call]
        assert {c.kind for c in own} == {*modules.KINDS, *modules.SCALED}
        assert {c.stored for c in own} == {None, *modules.STORED}
        assert {c.name for c in own} == set(foreign_weights.SCALES)
    assert from_json(to_json(CASES[-1])) == CASES[-1]
    assert str(CASES[0]) == "quantize_ of linears [24, 40], plain, x in float32, None biases, seed 0"


@pytest.mark.parametrize("hook", quantization._HOOKS)
def test_a_hook_that_is_lost_is_caught(monkeypatch, hook):
    monkeypatch.setattr(quantization, "_HOOKS", [name for name in quantization._HOOKS if name != hook])
    try:
        why = modules.check(ModuleCase("hooks", FP32), EXECUTOR)
    except TypeError as error:  # a hook is called without the keyword arguments that it takes
        why = str(error)
    assert why


def _shared_weight(one, first, plan, device):
    return Int8Linear.from_linear(one.linear)


def _loses(name, *, of_vars=False):
    def carry(linear, layer):
        whole(linear, layer)
        if of_vars:
            vars(layer).pop(name, None)
        else:
            layer._parameters.pop(name, None)
            layer._buffers.pop(name, None)

    whole = quantization._carry
    return carry


@pytest.mark.parametrize(
    ("name", "broken", "kind", "words"),
    [
        ("_layer_of", _shared_weight, "tied", "two weights, expected the opposite"),
        ("_carry", _loses("factor"), "attributes", "lacks the linear's own factor"),
        ("_carry", _loses("table"), "attributes", "lacks the linear's own table"),
        ("_carry", _loses("note", of_vars=True), "attributes", "lacks the linear's own note"),
        ("_carry", lambda linear, layer: layer.eval(), "plain", "training is False, expected True"),
        ("_leave_half_tied", lambda found: None, "half tied", "exchanged ['first'], expected []"),
    ],
)
def test_a_wrong_exchange_is_caught(monkeypatch, name, broken, kind, words):
    monkeypatch.setattr(quantization, name, broken)
    assert words in modules.check(ModuleCase(kind, FP32, FP32), EXECUTOR)


def test_a_wrong_scale_is_caught(monkeypatch):
    whole = foreign_weights._with_scale
    monkeypatch.setattr(foreign_weights, "_with_scale", lambda linear, weight, scale: whole(linear, weight, 2 * scale))
    for c in CASES:
        if c.stored is not None and c.call == "quantize_" and c.bias is None:
            assert "differ" in modules.check(c, EXECUTOR)
            assert modules.check(replace(c, kind="plain", stored=None), EXECUTOR) is None


CHOICES = [c for c in choices.always() if isinstance(c, ChoiceCase)]


def test_the_policy_holds():
    assert [f"{c}: {why}" for c in CHOICES if (why := choices.check(c, EXECUTOR))] == []
    assert {choices._expected(c) for c in CHOICES} == {False, True}
    assert from_json(to_json(CHOICES[-1])) == CHOICES[-1]
    assert str(CHOICES[0]) == "the default policy for 'to_q' [16, 16], inside"


@pytest.mark.parametrize(
    ("field", "value"),
    [("smallest", 257), ("smallest", 240), ("multiple", 8), ("multiple", 32), ("few_rows", None),
     ("inner_only", False), ("force", ["*"]), ("skip", ["*"])],
)  # fmt: skip
def test_another_default_policy_is_caught(monkeypatch, field, value):
    monkeypatch.setitem(choices._POLICIES, "default", replace(quantization.Policy(), **{field: value}))
    assert any(choices.check(c, EXECUTOR) for c in CHOICES if c.policy == "default")
