"""runtime/fuse_ideogram4.py: the fused forward inside diffusers' own pipeline."""

import copy
import pickle
import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4AttnProcessor, Ideogram4Transformer2DModel
from test_fused_ideogram4 import distance, inputs_of

import int8kit.integrations.diffusers  # noqa: F401  it reads saved INT8 models
from int8kit import models, optimize, quantize_
from int8kit.runtime import fuse, fuse_ideogram4

CASE = models.Case(64, 96, text_tokens=20, slots=24)


@pytest.fixture(scope="module")
def int8():
    made = models.tiny_pipeline().transformer
    quantize_(made)
    return made


@pytest.fixture
def fused(int8):
    made = copy.deepcopy(int8)
    assert fuse.fuse(made)
    return made


@torch.no_grad()
def out(model, given, **more):
    return model(**given, return_dict=False, **more)[0]


def images(given):
    return given["indicator"] == models.IMAGE


@pytest.fixture(scope="module")
def given(int8):
    return inputs_of(int8, CASE)


def test_the_stock_signature(int8, fused, given):
    want, made = out(int8, given), out(fused, given)
    assert (made.shape, made.dtype) == (want.shape, want.dtype)
    assert 0 < distance(made[images(given)], want[images(given)]) < 0.006
    assert (made[~images(given)] == 0).all()
    with torch.no_grad():
        assert torch.equal(fused(**given).sample, made)
        assert torch.equal(fused(*given.values(), None, False)[0], made)
    assert fuse.undo(fused)
    assert torch.equal(out(fused, given), want)
    assert "forward" not in vars(fused)


def test_the_prompt_is_kept_while_its_tensors_stay(fused, given):
    calls = []
    fused.llm_cond_proj.register_forward_pre_hook(lambda *args: calls.append(1))
    installed = fused.forward.__self__
    prompt_of = lambda: installed._prompt_of(  # noqa: E731
        *(given[name] for name in ("encoder_hidden_states", "position_ids", "segment_ids", "indicator"))
    )
    first = prompt_of()
    assert prompt_of() is first
    assert len(calls) == 1
    given["encoder_hidden_states"].mul_(2)  # other values in the same tensor
    assert prompt_of() is not first
    fused.llm_cond_proj.weight_scale.mul_(2)
    prompt_of()
    given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
    prompt_of()
    assert len(calls) == 4
    with torch.inference_mode():
        given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
        prompt_of()
        prompt_of()
    assert len(calls) == 6  # tensors of inference mode count no versions


def test_batches_and_times(int8, fused):
    given = inputs_of(int8, models.Case(64, 64, text_tokens=9, slots=12, batch=2))
    mask = images(given)
    for times in ([0.5, 0.5], [0.25, 0.75]):
        given["timestep"] = torch.tensor(times).bfloat16()
        assert distance(out(fused, given)[mask], out(int8, given)[mask]) < 0.006


def hooked(model):
    model.layers[1].feed_forward.w1.register_forward_hook(lambda *args: None)


def backed(model):
    """As `set_attention_backend` does, which also sets it for every other model of the process."""
    for layer in model.layers:
        layer.attention.processor._attention_backend = AttentionBackendName._NATIVE_MATH


class OtherProcessor(Ideogram4AttnProcessor):
    """Somebody's own attention."""


CAUSES = {
    "layers.1.feed_forward.w1 has a hook": hooked,
    "another processor or back end": lambda model: model.layers[0].attention.set_processor(OtherProcessor()),
    "processor or back end": backed,
}


@pytest.mark.parametrize("reason", CAUSES)
def test_the_stock_forward_where_it_has_to_run(int8, fused, given, reason):
    other = copy.deepcopy(int8)
    for model in (other, fused):
        CAUSES[reason](model)
    with pytest.warns(fuse.NotFused, match=rf"^Ideogram4Transformer2DModel runs unfused: .*{reason}"):
        assert torch.equal(out(fused, given), out(other, given))
    out(fused, given)  # it says so once


def test_a_timestep_for_each_token(int8, fused, given):
    each = {**given, "timestep": given["timestep"][:, None].expand(1, given["indicator"].shape[1])}
    with pytest.warns(fuse.NotFused, match="each token has its own timestep"):
        assert torch.equal(out(fused, each), out(int8, each))


def test_autocast(int8, fused, given):
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(fuse.NotFused, match="autocast is on"):
        made = out(fused, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made, out(int8, given))


def test_gradients_take_the_stock_way(int8, fused, given):
    grown = {**given, "hidden_states": given["hidden_states"].clone().requires_grad_()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", fuse.NotFused)
        made = fused(**grown, return_dict=False)[0]
    assert torch.equal(made.detach(), out(int8, given))
    made.float().square().sum().backward()
    assert grown["hidden_states"].grad.abs().sum() > 0


def test_state_dicts_hold_plain_weights(int8, fused, given, tmp_path):
    before = {name: tensor.clone() for name, tensor in int8.state_dict().items()}
    made = out(fused, given)  # which puts the rows of w1 and w3 in turn
    assert not fused.layers[0].feed_forward.w1.weight.is_contiguous()
    state = fused.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) and state[name].is_contiguous() for name in before)
    fused.save_pretrained(tmp_path / "saved")
    saved = Ideogram4Transformer2DModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.state_dict().items())
    fused.load_state_dict(state)
    assert torch.equal(out(fused, given), made)
    fuse.undo(fused)
    assert all(parameter.is_contiguous() for parameter in fused.parameters())


def test_new_weights_take_effect(int8, fused, given):
    """By load_state_dict, by the layer's tensors, and by `.data`, which leaves no trace."""
    out(fused, given)
    fresh = copy.deepcopy(int8)
    for model in (fused, fresh):
        block = model.layers[0]
        block.attention.to_k.weight.data = block.attention.to_q.weight.data.clone()
        block.attention.to_v.weight_scale.data.mul_(0.5)
        block.feed_forward.w3.weight.data.neg_()
        block.feed_forward.w1.weight_scale.copy_(block.feed_forward.w3.weight_scale)
        block.attention.to_out[0].weight.data.neg_()
    fuse.fuse(fresh)
    assert torch.equal(out(fused, given), out(fresh, given))


def test_linears_that_are_shared(int8, given):
    """In one block, between blocks, and by their parameter alone."""
    model = copy.deepcopy(int8)
    first, second = (layer.attention for layer in model.layers)
    first.to_k = first.to_q
    second.to_v = first.to_v
    second.to_k.weight = second.to_q.weight
    model.layers[1].feed_forward.w3 = model.layers[1].feed_forward.w1
    want = out(model, given)
    assert fuse.fuse(model)
    for _ in range(2):
        assert distance(out(model, given)[images(given)], want[images(given)]) < 0.006
    fuse.undo(model)
    assert torch.equal(out(model, given), want)


def test_copies_are_whole(fused, given):
    made = out(fused, given)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.forward.__self__ is not fused.forward.__self__
        assert other.forward.__self__.fused.model is other
        assert torch.equal(out(other, given), made)
        other.layers[0].attention.to_q.weight.data.neg_()
        assert not torch.equal(out(other, given), made)
    assert torch.equal(out(fused, given), made)


def test_a_model_with_a_forward_of_its_own():
    class Mine(Ideogram4Transformer2DModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Mine(**models.TINY_TRANSFORMER)
    assert fuse_ideogram4.fusion(model) is None
    assert not fuse.fuse(model)


def test_a_gpu_gives_the_plans_of_joined_weights(fused):
    assert fused.forward.__self__.fused._plans is None
    other = copy.deepcopy(fused)
    other.__dict__.pop("forward")
    fuse.fuse(other, "rtx3090")
    assert other.forward.__self__.fused._plans(13824, 4608).candidates


def test_a_whole_pipeline(given):
    """Negative guidance, two prompts of other lengths, two images of each: as the stock pipeline in INT8."""
    pipe = models.tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    report = optimize(pipe)
    assert all(part.fused for part in report.components.values())

    def latents():
        return pipe(
            ["a red bicycle", "a cat"], height=32, width=32, num_inference_steps=2, guidance_schedule=[7.0, 3.0],
            num_images_per_prompt=2, output_type="latent", max_sequence_length=48,
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    made = latents()
    for model in (pipe.transformer, pipe.unconditional_transformer):
        fuse.undo(model)
    assert 0 < distance(made, latents()) < 0.02  # guidance multiplies the difference of each branch
