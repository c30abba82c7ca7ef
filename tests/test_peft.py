"""peft without diffusers: adapters on INT8 layers, merged and beside them."""

import copy
import pickle

import peft
import pytest
import torch
from test_lora import equal, tensors

from int8kit import Int8Linear, Int8SwiGLU
from int8kit.adapters import peft_layers
from int8kit.errors import InputError


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = Int8Linear.from_linear(torch.nn.Linear(64, 48))

    def forward(self, x):
        return self.q(x)


def config(kind=peft.LoraConfig, **options):
    return kind(target_modules=["q"], **{"r": 4, "init_lora_weights": False, **options})


@pytest.fixture
def x():
    return torch.randn(3, 64)


@torch.no_grad()
@pytest.mark.parametrize("safe", [False, True])
def test_peft_merges_and_unmerges(x, safe):
    module = Two()
    plain, clean = module(x), tensors(module)
    model = peft.get_peft_model(module, config())
    beside = model(x)
    model.merge_adapter(safe_merge=safe)
    merged = model(x)
    assert (merged - beside).norm() < 0.05 * (beside - plain).norm()
    model.unmerge_adapter()
    assert torch.equal(model(x), beside)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        bare = other.merge_and_unload(safe_merge=safe)
        assert type(bare.q) is Int8Linear
        assert torch.equal(bare(x), merged)
    assert equal(tensors(model.unload()), clean)


@torch.no_grad()
def test_a_bias_of_the_adapter_is_merged(x):
    model = peft.get_peft_model(Two(), config(lora_bias=True))
    layer = model.base_model.model.q
    layer.lora_B["default"].bias.fill_(100)
    beside, bias = model(x), layer.base_layer.bias.clone()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.bias, bias + 100 * layer.scaling["default"])
    assert (model(x) - beside).norm() < 0.01 * beside.norm()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (config(use_dora=True), "DoraLinearVariant on an INT8 layer"),
        (config(init_lora_weights="pissa"), "init_lora_weights='pissa' reads the base weight"),
        (peft.IA3Config(target_modules=["q"], feedforward_modules=[]), "adapter of peft.tuners.ia3.layer"),
    ],
)
def test_adapters_that_read_the_weight_are_refused(config, line):
    with pytest.raises(InputError, match=line):
        peft.get_peft_model(Two(), config)


@pytest.mark.parametrize("kind", [peft.LoKrConfig, peft.LoHaConfig])
def test_other_adapters_work_beside_the_layer_only(x, kind):
    module = Two()
    plain = module(x)
    model = peft.get_peft_model(module, kind(target_modules=["q"], r=4, init_weights=False))
    assert not torch.equal(model(x), plain)
    with pytest.raises(InputError, match="cannot be merged into an INT8 layer"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)


def test_a_joined_layer_takes_no_adapter():
    module = torch.nn.ModuleDict({"q": Int8SwiGLU.from_linears(torch.nn.Linear(64, 48), torch.nn.Linear(64, 48))})
    with pytest.raises(InputError, match="an adapter on Int8SwiGLU, which joins several linears"):
        peft.get_peft_model(module, config())


def test_an_offloaded_weight_is_not_merged():
    model = peft.get_peft_model(Two(), config())
    model.base_model.model.q.base_layer.to("meta")
    with pytest.raises(InputError, match="the weight is offloaded"):
        model.base_model.model.q.merge()


def test_unmerging_a_float_linear_restores_its_bits(x):
    """peft alone subtracts the delta, which gives other bits."""
    module = torch.nn.ModuleDict({"q": torch.nn.Linear(64, 48)})
    clean = tensors(module)
    model = peft.get_peft_model(module, config())
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(module["q"].base_layer.weight, clean["q.weight"])
    module["q"].base_layer.weight.data.copy_(clean["q.weight"])
    peft_layers.make_exact(model)
    assert type(module["q"]) is peft_layers.ExactLoraLinear
    model.merge_adapter()
    delta = module["q"].get_delta_weight("default")
    assert torch.equal(module["q"].base_layer.weight, clean["q.weight"] + delta)
    model.unmerge_adapter()
    assert equal(tensors(model.unload()), clean)
