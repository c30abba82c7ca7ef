"""layers.py: INT8 layers against the reference, and replacement of a model's linears."""

import copy
import math

import bitsandbytes
import pytest
import torch

from int8kit import Int8Linear, Int8SwiGLU, models, reference
from int8kit.errors import ShapeError
from int8kit.lookup import Plan
from int8kit.quantization import replace_linears


def test_linear_equals_the_reference():
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24).bfloat16()
    layer = Int8Linear.from_linear(linear)
    x = torch.randn(2, 7, 40).bfloat16()
    wq, sw = reference.quantize(linear.weight.detach())
    assert torch.equal(layer(x), reference.linear(x, wq, sw, linear.bias.detach()))
    # bound on the quantization error: half a step per operand, summed over K independent errors
    exact = linear(x).float()
    step = x.abs().amax() / 254 * linear.weight.abs().amax()
    assert (layer(x) - exact).abs().max() < 6 * step * math.sqrt(40)


def test_nf4_layer_is_dequantized_first():
    """The released diffusers checkpoint has NF4 layers of bitsandbytes: nn.Linear subclasses with packed weights."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
    nf4 = bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    nf4.load_state_dict(linear.state_dict())
    nf4 = nf4.to("cpu")
    assert nf4.weight.shape != (64, 128)
    weight = bitsandbytes.functional.dequantize_4bit(nf4.weight, nf4.weight.quant_state)
    layer = Int8Linear.from_linear(nf4)
    wq, sw = reference.quantize(weight)
    x = torch.randn(5, 128).bfloat16()
    assert torch.equal(layer(x), reference.linear(x, wq, sw, linear.bias.detach()))


def test_casting_a_model_keeps_the_scales():
    layer = Int8Linear.from_linear(torch.nn.Linear(16, 8))
    scales = layer.weight_scale.clone()
    cast = layer.to(torch.bfloat16)
    assert cast.weight_scale.dtype is torch.float32
    assert torch.equal(cast.weight_scale, scales)
    assert cast.bias.dtype is torch.bfloat16
    assert cast.weight.dtype is torch.int8
    assert torch.equal(layer.half().weight_scale, scales)


def test_joined_linears_give_the_same_bits():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(48, n, bias=n != 8) for n in (16, 8, 24)]
    x = torch.randn(3, 5, 48).bfloat16()
    got = Int8Linear.joined(layers)(x)
    for part, layer in zip(got.split([16, 8, 24], dim=-1), layers, strict=True):
        assert torch.equal(part, Int8Linear.from_linear(layer)(x))
    with pytest.raises(ShapeError, match="inputs of 48, 47 features"):
        Int8Linear.joined([layers[0], torch.nn.Linear(47, 16)])


def test_swiglu_layer_equals_its_two_linears():
    torch.manual_seed(0)
    gate, up = torch.nn.Linear(48, 24, bias=False), torch.nn.Linear(48, 24)
    x = torch.randn(3, 5, 48)
    g, u = (Int8Linear.from_linear(layer)(x) for layer in (gate, up))
    assert torch.equal(Int8SwiGLU.from_linears(gate, up)(x), reference.silu(g) * u)
    assert torch.allclose(Int8SwiGLU.from_linears(gate, up)(x), torch.nn.functional.silu(g) * u)
    with pytest.raises(ShapeError, match=r"gate \[24, 48\] and up \[16, 48\]"):
        Int8SwiGLU.from_linears(gate, torch.nn.Linear(48, 16))


def test_state_dict_round_trip():
    first, second = (Int8Linear.from_linear(torch.nn.Linear(16, 8)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(first(x), second(x))


def test_refuses_k_beyond_int32():
    with pytest.raises(ShapeError, match="131072"):
        Int8Linear(131072, 1)


def test_replaces_the_selected_linears():
    model = models.get("tiny")
    module = model.build()
    asked = []

    def plan(n, k):
        asked.append((n, k))
        return Plan()

    done = replace_linears(module, model.quantizes, plan)
    assert len(done) == 2 * 7 + 1
    assert all(isinstance(module.get_submodule(name), Int8Linear) for name in done)
    left = [name for name, child in module.named_modules() if type(child) is torch.nn.Linear]
    assert left
    assert not any(model.quantizes(name) for name in left)
    assert (512, 416) in asked


def test_int8_transformer_is_near_the_original():
    model = models.get("tiny")
    torch.manual_seed(0)
    module = model.build()
    int8 = copy.deepcopy(module)
    replace_linears(int8, model.quantizes, lambda n, k: Plan())
    inputs = model.inputs(module, models.Case(64, 64, text_tokens=9))
    with torch.no_grad():
        a, b = module(**inputs).sample.float(), int8(**inputs).sample.float()
    noise = ((a - b).norm() / a.norm()).item()
    assert 0 < noise < 0.1  # 8 bits, two blocks deep; a misplaced layer gives more than 1
