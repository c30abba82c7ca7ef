"""Code of torch users that would damage a layer in silence, or fail in words of torch: the right bits or one line."""

import copy
import pickle

import accelerate
import pytest
import torch
from torch import nn

from int8kit import InputError, Int8Linear, ShapeError
from int8kit.layer_state import Int8Weight

X = torch.linspace(-1, 1, 3 * 16).reshape(3, 16)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Int8Linear.from_linear(nn.Linear(16, 8))


def assert_refused(kind, words, call, *args):
    with pytest.raises(kind, match=words) as end:
        call(*args)
    assert "\n" not in str(end.value)


def _parameters_to_vector(layer):
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector, layer.parameters())


def _half_data(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data.half()


def _half_buffers(layer):
    for buffer in layer.buffers():
        buffer.data = buffer.data.half()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_parameters_to_vector, "weight is torch.float32: expected torch.int8; .*load its state dict"),
        (_half_data, "weight is torch.float16: expected torch.int8"),
        (_half_buffers, "weight_scale is torch.float16: expected torch.float32; .*load"),
    ],
)
def test_a_cast_outside_of_the_layer_is_named(layer, damage, words):
    damage(layer)
    assert_refused(ShapeError, words, layer, X)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda weight: weight.copy_(torch.randn(8, 16)), "torch.float32 copied into an int8 weight: .*from_linear"),
        (lambda weight: nn.init.constant_(weight, 0.02), "0.02 filled into an int8 weight"),
    ],
)
def test_floats_written_into_the_weight_are_refused(layer, write, words):
    before = layer.weight.clone()
    with torch.no_grad():
        assert_refused(InputError, words, write, layer.weight)
    assert torch.equal(layer.weight, before)


def test_integers_written_into_the_weight(layer):
    other = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
    with torch.no_grad():
        layer.weight.copy_(other)
        assert torch.equal(layer.weight, other)
        nn.init.zeros_(layer.weight)
    assert not layer.weight.any()


def test_a_gradient_that_is_set_by_assignment_is_refused_with_a_warning(layer):
    layer.bias.requires_grad = True
    with pytest.warns(UserWarning, match="stays frozen"):
        layer.weight.requires_grad = True
    layer(X).sum().backward()
    assert layer.bias.grad is not None
    assert layer.weight.grad is None


def test_to_empty_of_a_layer_on_meta_gives_nan_until_a_state_dict_is_loaded(layer):
    empty = Int8Linear(16, 8, device="meta").to_empty(device="cpu")
    nn.init.zeros_(empty.bias)
    assert empty(X).isnan().all()
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(X), layer(X))


def test_tied_weights_stay_tied_in_a_pickle(layer):
    other = Int8Linear(16, 8)
    other.weight = layer.weight
    for again in (
        pickle.loads(pickle.dumps(nn.ModuleList([layer, other]))),
        copy.deepcopy(nn.ModuleList([layer, other])),
    ):
        assert again[0].weight is again[1].weight
        assert type(again[0].weight) is Int8Weight


def test_an_int8_parameter_keeps_its_identity(layer):
    given = nn.Parameter(torch.ones(8, 16, dtype=torch.int8), requires_grad=False)
    layer.weight = given
    assert layer.weight is given
    assert type(given) is Int8Weight


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_scales_that_are_not_finite_are_refused(layer, value):
    state = copy.deepcopy(layer.state_dict())
    state["weight_scale"][3] = value
    words = "weight_scale: 1 of 8 scales are not finite"
    assert_refused(InputError, words, Int8Linear(16, 8).load_state_dict, state)
    assert_refused(InputError, words, Int8Linear.from_int8, state["weight"], state["weight_scale"])


def test_a_negative_scale_negates_its_row(layer):
    turned = Int8Linear.from_int8(layer.weight, -layer.weight_scale)
    plain = Int8Linear.from_int8(layer.weight, layer.weight_scale)
    assert torch.equal(turned(X), -plain(X))
    loaded = Int8Linear(16, 8, bias=False)
    loaded.load_state_dict(turned.state_dict())
    assert torch.equal(loaded(X), turned(X))


def test_script_names_the_other_ways(layer):
    assert_refused(InputError, "torch.jit.trace, torch.export", torch.jit.script, nn.Sequential(layer))


@pytest.mark.parametrize("buffers", [False, True])
def test_a_disk_offload_of_accelerate_that_drops_the_scales_is_refused(layer, tmp_path, buffers):
    torch.save({f"0.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "model.bin")
    with accelerate.init_empty_weights():
        empty = nn.Sequential(Int8Linear(16, 8))

    def load():
        where = {"checkpoint": str(tmp_path / "model.bin"), "device_map": {"0": "disk"}, "offload_folder": tmp_path}
        return accelerate.load_checkpoint_and_dispatch(empty, **where, offload_buffers=buffers)

    if buffers:
        assert torch.equal(load()(X), layer(X))
    else:
        assert_refused(InputError, "offload_buffers=True", load)
