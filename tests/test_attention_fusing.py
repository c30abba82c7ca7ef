"""fuse_qkv_projections of diffusers beside INT8 layers: never integers in a float linear."""

import copy
import pickle

import pytest
import torch
from diffusers import FluxTransformer2DModel

from int8kit import InputError, Int8Linear, Policy, quantize_
from int8kit.integrations.loader import dequantize_layers


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


def output(model):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 8, 32), "pooled_projections": (1, 32)}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    with torch.no_grad():
        return model(**inputs, **ids, timestep=torch.tensor([0.5])).sample


@pytest.mark.parametrize("names", [["*.to_q", "*.to_k", "*.to_v"], ["*.to_q"], ["*.to_k"], ["*.add_v_proj"]])
def test_int8_projections_are_not_fused(model, names):
    quantize_(model, names)
    want = output(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(InputError, match="call it on the float model") as end:
            one.fuse_qkv_projections()
        assert "\n" not in str(end.value)
        assert torch.equal(output(one), want)


def test_projections_that_were_fused_before_give_the_same_bits(model):
    model.fuse_qkv_projections()
    report = quantize_(model, Policy(smallest=16))
    attention = model.transformer_blocks[0].attn
    assert type(attention.to_qkv) is Int8Linear
    assert "transformer_blocks.0.attn.to_added_qkv" in report.replaced
    fused = output(model)
    model.unfuse_qkv_projections()
    assert torch.equal(output(model), fused)


def test_float_projections_are_fused_again_after_dequantization(model):
    quantize_(model, ["*.to_q", "*.to_k", "*.to_v"])
    dequantize_layers(model)
    want = output(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(output(model), want)
    assert type(model.transformer_blocks[0].attn.to_qkv) is torch.nn.Linear


def test_other_int8_layers_do_not_stop_it(model):
    quantize_(model, ["*.to_out.0"])
    want = output(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(output(model), want)
