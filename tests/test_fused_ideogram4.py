"""runtime/fused_ideogram4.py: the repaired forward against the stock model, switch by switch and part by part."""

import copy
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from int8kit import models, ops, quantize_
from int8kit.errors import InputError, UnknownName
from int8kit.runtime import denoise, float_blocks, packed_rows
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4
from int8kit.runtime.repairs import Repairs, described

TIGHT = models.Case(64, 96, text_tokens=20)
UNCOND = models.Case(64, 96, branch="uncond")
PADDED = models.Case(64, 96, text_tokens=20, slots=30, batch=2)
CASES = {"tight": TIGHT, "uncond": UNCOND, "padded batch": PADDED}


@pytest.fixture(scope="module")
def stock():
    return models.tiny_pipeline().transformer


@pytest.fixture(scope="module")
def int8(stock):
    made = copy.deepcopy(stock)
    quantize_(made)
    return made


def inputs_of(model, case, dtype=torch.bfloat16):
    torch.manual_seed(1)
    found = models.get("tiny").inputs(model, case)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


@torch.no_grad()
def of_stock(model, given):
    """The stock model's velocity of the image rows."""
    return model(**given, return_dict=False)[0][given["indicator"] == models.IMAGE]


@torch.no_grad()
def of_fused(model, given, repairs=None, **options):
    """The same rows by `FusedIdeogram4`."""
    fused = FusedIdeogram4(model, repairs, **options)
    rows = packed_rows.pack(given["segment_ids"], given["indicator"], trim=fused.repairs.trim_text)
    features, positions, latents = (
        given[name].flatten(0, 1) for name in ("encoder_hidden_states", "position_ids", "hidden_states")
    )
    prompt = fused.prompt(features[rows.places[rows.texts]], positions[rows.places], rows)
    return fused.velocity(latents[rows.places[rows.images]], prompt, fused.modulation(given["timestep"]))


def distance(one, other):
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@pytest.mark.parametrize("off", ["nothing", *described()])
@pytest.mark.parametrize("case", ["tight", "uncond"])
def test_float_models_keep_their_bits(stock, case, off):
    """Without padding no arithmetic changes, so each switch gives the stock model's bits."""
    given = inputs_of(stock, CASES[case])
    repairs = Repairs.without(() if off == "nothing" else [off])
    assert torch.equal(of_fused(stock, given, repairs), of_stock(stock, given))


def test_shared_linears_of_a_float_model(stock):
    model = copy.deepcopy(stock)
    model.layers[0].attention.to_k = model.layers[0].attention.to_q
    model.layers[1].feed_forward.w3.weight = model.layers[1].feed_forward.w1.weight
    given = inputs_of(model, TIGHT)
    assert torch.equal(of_fused(model, given), of_stock(model, given))


@pytest.mark.parametrize("case", CASES)
def test_no_repair_is_the_stock_forward(stock, int8, case):
    for model in (stock, int8):
        given = inputs_of(model, CASES[case])
        assert torch.equal(of_fused(model, given, Repairs.none()), of_stock(model, given))


def test_errors_beside_the_floor(stock, int8):
    """float32 is the truth. The fused forward rounds less often than the unfused one, and no path errs more."""
    exact = copy.deepcopy(stock).float()
    for case in CASES.values():
        given = inputs_of(stock, case)
        truth = of_stock(exact, inputs_of(stock, case, torch.float32))
        floor, unfused = distance(of_stock(stock, given), truth), distance(of_stock(int8, given), truth)
        assert distance(of_fused(stock, given), truth) < 1.1 * floor
        assert distance(of_fused(int8, given), truth) < 1.1 * unfused
        assert floor < unfused < 2 * floor  # two blocks: their INT8 errors do not hide a wrong part


@pytest.mark.parametrize("off", ["trim-text", "no-mask", "text-once", "modulation-ahead", "image-rows", "joined"])
def test_int8_repairs_change_rounding_at_most(stock, int8, off):
    """Less than bf16 itself changes the float model."""
    given = inputs_of(int8, PADDED)
    all_of_them = of_fused(int8, given)
    truth = of_stock(copy.deepcopy(stock).float(), inputs_of(stock, PADDED, torch.float32))
    assert distance(of_fused(int8, given, Repairs.without([off])), all_of_them) < distance(
        of_stock(stock, given), truth
    )


# Parts of a block on the stock model's inputs. U: the largest relative error of a rounding to bf16.
U = 2.0**-8


@pytest.fixture(scope="module")
def parts(stock):
    """Inputs and outputs of the modules of the second block, in the stock forward."""
    seen = {}
    layer = stock.layers[1]

    def keep(name):
        return lambda module, args, out: seen.__setitem__(name, (args, out))

    hooks = [module.register_forward_hook(keep(name)) for name, module in layer.named_modules() if name]
    hooks.append(layer.register_forward_hook(lambda m, args, out: seen.__setitem__("block", (args, out))))
    of_stock(stock, inputs_of(stock, TIGHT))
    for hook in hooks:
        hook.remove()
    return seen


def modulation(stock, parts):
    values = parts["adaln_modulation"][1].reshape(1, -1).chunk(4, -1)
    return [value.contiguous() for value in values]


def test_norm_and_quantize(stock, parts):
    """int8 is half a step away at most. The stock rounds the norm, the weight's product, 1 + scale and the product."""
    x, norm = parts["attention_norm1"][0][0][0], stock.layers[1].attention_norm1
    scale = modulation(stock, parts)[0]
    q, s = ops.rms_norm_quantize(x, norm.weight, scale, norm.eps)
    want = parts["attention.to_q"][0][0][0].float()
    error = (q.float() * s[:, None] - want).abs()
    assert (error <= 0.5 * s[:, None] * (1 + 2**-20) + 4 * U * want.abs()).all()


def test_residual_gate_norm_and_quantize(stock, parts):
    """The sum is rounded once; the stock rounds norm, weight, gate, product and sum."""
    layer, (_, gate, scale, _) = stock.layers[1], modulation(stock, parts)
    x, branch = parts["attention_norm1"][0][0][0], parts["attention_norm2"][0][0][0]
    total, q, s = ops.residual_norm_quantize(
        x, branch, layer.attention_norm2.weight, gate.tanh(), layer.ffn_norm1.weight, scale, 1e-5
    )
    added = gate.tanh().float() * parts["attention_norm2"][1][0].float()
    want = parts["ffn_norm1"][0][0][0].float()
    assert ((total.float() - want).abs() <= 2 * U * want.abs() + 3.1 * U * added.abs()).all()
    normed = layer.ffn_norm1(total).float() * (1 + scale.float())
    assert ((q.float() * s[:, None] - normed).abs() <= 0.5 * s[:, None] * (1 + 2**-20) + 4 * U * normed.abs()).all()


def test_qk_norm_and_rope(stock, parts):
    """Both products and their sum are rounded once here, and each by itself in the stock model, after the norm."""
    attention = stock.layers[1].attention
    q, k, v = (parts[f"attention.to_{name}"][1][0] for name in "qkv")
    given = inputs_of(stock, TIGHT)
    cos, sin = (table[0].bfloat16() for table in stock.rotary_emb(given["position_ids"]))
    made = ops.qk_norm_rope(
        torch.cat([q, k, v], -1), attention.norm_q.weight, attention.norm_k.weight, cos, sin, attention.num_heads, 1e-5
    )
    for out, name in zip(made, ("norm_q", "norm_k"), strict=True):
        normed = parts[f"attention.{name}"][1][0].float()
        turned = torch.cat([-normed[..., 128:], normed[..., :128]], -1)
        a, b = normed * cos.float()[:, None], turned * sin.float()[:, None]
        error = (out.float().unflatten(-1, (2, 256)) - (a + b)).abs()
        assert (error <= 3 * U * (a.abs() + b.abs()) + U * (a + b).abs()).all()


def test_rows_that_a_text_does_not_have(stock):
    """Prompts of other lengths in one batch: each sample as if it were alone."""
    scene = [models.Case(64, 96, text_tokens=n, slots=20) for n in (20, 7)]
    each = [inputs_of(stock, case) for case in scene]
    both = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    alone = torch.cat([of_stock(stock, one) for one in each])
    assert distance(of_fused(stock, both), alone) < 0.004
    both["timestep"] = torch.tensor([0.25, 0.5]).bfloat16()  # each sample at its own time
    each[0]["timestep"], each[1]["timestep"] = both["timestep"].split(1)
    alone = torch.cat([of_stock(stock, one) for one in each])
    assert distance(of_fused(stock, both), alone) < 0.004


def test_released_weights_come_back(int8, monkeypatch):
    fused = FusedIdeogram4(int8)
    assert fused.release() == 0  # they are on the CPU already
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args: moved.append(module))
    fused.release()
    assert {type(module).__name__ for module in moved} >= {"Int8Linear", "Linear", "Ideogram4EmbedScalar"}
    assert int8.llm_cond_proj in moved
    assert int8.layers[1].adaln_modulation in moved
    assert int8.layers[1].attention.to_q not in moved


def test_switches_by_name():
    assert Repairs.without([]) == Repairs()
    assert Repairs.without(["trim-text"]) == Repairs(trim_text=False)
    assert not any(vars(Repairs.none()).values())
    with pytest.raises(UnknownName, match=r"unknown repair 'trim'; expected .*trim-text"):
        Repairs.without(["trim"])


def test_compile_is_for_float_blocks(stock, int8):
    with pytest.raises(InputError, match="the fused INT8 blocks gain nothing"):
        FusedIdeogram4(int8, compiled=True)
    FusedIdeogram4(int8, Repairs.without(["fused-rows"]), compiled=True)
    assert FusedIdeogram4(stock, compiled=True).compiled


@pytest.fixture
def counter(monkeypatch):
    """Counts the compilations of the float blocks, which then run by torch's own operations."""
    found = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=found))
    torch.compiler.reset()
    float_blocks._compiled.cache_clear()
    yield found
    torch.compiler.reset()
    float_blocks._compiled.cache_clear()


def test_no_prompt_and_no_size_compiles_a_block_again(stock, counter):
    """A compilation during the capture of a graph fails, and after a few torch gives up compiling."""
    pair = [FusedIdeogram4(stock, compiled=compiled) for compiled in (True, False)]
    for texts, height, width in (((20,), 64, 96), ((33,), 96, 96), ((5, 9), 64, 64), ((7, 7, 4), 32, 64)):
        torch.manual_seed(0)
        features = tuple(torch.randn(n, stock.config.llm_features_dim).to(stock.dtype) for n in texts)
        scene, times = denoise.Scene(features, 1, height, width), torch.tensor([0.1, 0.5, 0.9], dtype=stock.dtype)
        compiled, eager = (denoise.FusedBranches(fused, fused, scene, times) for fused in pair)
        latents = denoise.noise(scene, stock.config.in_channels, 0, torch.device("cpu"))
        for step in range(3):
            for made, want in zip(compiled.velocities(latents, step), eager.velocities(latents, step), strict=True):
                assert torch.equal(made, want)
        assert counter.frame_count == 2  # before and after the attention
