"""The parameter of an int8 weight where torch makes another one: casts by flags of torch, parametrizations."""

import copy

import pytest
import torch
from torch import nn

from int8kit import Int8Linear, Int8SwiGLU
from int8kit.layer_state import Int8Weight

X = torch.linspace(-1, 1, 3 * 16).reshape(3, 16)


@pytest.fixture(params=["plain", "swiglu"])
def either(request):
    if request.param == "plain":
        return Int8Linear.from_linear(nn.Linear(16, 8))
    return Int8SwiGLU.from_linears(nn.Linear(16, 8), nn.Linear(16, 8))


@pytest.mark.parametrize("way", ["overwrite", "swap"])
def test_a_cast_that_makes_new_parameters(either, way):
    flags, weight = torch.__future__, either.weight.clone()
    switch = {
        "overwrite": flags.set_overwrite_module_params_on_conversion,
        "swap": flags.set_swap_module_params_on_conversion,
    }
    switch[way](True)
    try:
        either.half().load_state_dict(either.state_dict())
    finally:
        switch[way](False)
    assert isinstance(either.weight, Int8Weight)
    assert torch.equal(either.weight, weight)
    assert (either.weight_scale.dtype, either.bias.dtype) == (torch.float32, torch.float16)


class _Negated(nn.Module):
    def forward(self, weight):
        return -weight


def test_a_parametrized_weight(either):
    layer = type(either).from_int8(-either.weight, either.weight_scale, either.bias)
    nn.utils.parametrize.register_parametrization(layer, "weight", _Negated())
    want = type(either).from_int8(either.weight, either.weight_scale, either.bias)
    assert torch.equal(copy.deepcopy(layer)(X), want(X))
    assert torch.equal(layer.half()(X), want.half()(X))
