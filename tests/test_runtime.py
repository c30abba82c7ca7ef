import copy
import math
from dataclasses import replace

import bitsandbytes
import pytest
import torch
import triton
from PIL import Image

from int8kit import Int8Linear, Int8SwiGLU, gpus, models, reference
from int8kit.database import store
from int8kit.database.schema import Entry, Resources, stamp
from int8kit.errors import CheckFailed, FileError, InputError, ShapeError, UnknownName
from int8kit.kernels import gemm
from int8kit.layers import replace_linears
from int8kit.lookup import DEFAULT, LEVELS, Plan
from int8kit.runtime import generate, ideogram4
from int8kit.runtime.generate import PRESETS, Request
from int8kit.spec import Source, default_config


def test_linear_is_the_reference():
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24).bfloat16()
    layer = Int8Linear.from_linear(linear)
    x = torch.randn(2, 7, 40).bfloat16()
    wq, sw = reference.quantize(linear.weight.detach())
    assert torch.equal(layer(x), reference.linear(x, wq, sw, linear.bias.detach()))
    # near the layer that it stands for: half a step of each operand, summed over K independent errors
    exact = linear(x).float()
    step = x.abs().amax() / 254 * linear.weight.abs().amax()
    assert (layer(x) - exact).abs().max() < 6 * step * math.sqrt(40)


def test_an_nf4_layer_is_dequantized_first():
    """The released diffusers checkpoint holds bitsandbytes' NF4 layers: subclasses of nn.Linear with packed weights."""
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
    scales = layer.sw.clone()
    cast = layer.to(torch.bfloat16)
    assert cast.sw.dtype is torch.float32
    assert torch.equal(cast.sw, scales)
    assert cast.bias.dtype is torch.bfloat16
    assert cast.wq.dtype is torch.int8
    assert torch.equal(layer.half().sw, scales)


def test_joined_linears_are_the_same_bits():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(48, n, bias=n != 8) for n in (16, 8, 24)]
    x = torch.randn(3, 5, 48).bfloat16()
    got = Int8Linear.joined(layers)(x)
    for part, layer in zip(got.split([16, 8, 24], dim=-1), layers, strict=True):
        assert torch.equal(part, Int8Linear.from_linear(layer)(x))
    with pytest.raises(ShapeError, match="inputs of 48, 47 features"):
        Int8Linear.joined([layers[0], torch.nn.Linear(47, 16)])


def test_swiglu_layer_is_its_two_linears():
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
        Int8Linear(torch.zeros(1, 131072, dtype=torch.int8), torch.zeros(1))


def test_replaces_what_is_wanted():
    model = models.get("tiny")
    module = model.build()
    asked = []

    def plan(n, k):
        asked.append((n, k))
        return Plan()

    done = replace_linears(module, model.quantizes, plan)
    assert len(done) == 2 * 7 + 1
    assert all(isinstance(module.get_submodule(name), Int8Linear) for name in done)
    left = [name for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)]
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
    assert 0 < noise < 0.1  # 8 bits, two blocks deep; a layer put in the wrong place gives more than 1


def test_presets_follow_the_makers_schedules():
    assert PRESETS["quality"].guidance(48) == [7.0] * 45 + [3.0] * 3
    assert PRESETS["default"].guidance(20) == [7.0] * 18 + [3.0] * 2
    assert PRESETS["turbo"].guidance(12) == [7.0] * 11 + [3.0]
    assert PRESETS["quality"].guidance(1) == [7.0]
    assert PRESETS["quality"].guidance(4) == [7.0] * 3 + [3.0]


REQUEST = Request("a red bicycle", height=64, width=96, steps=2)


@pytest.fixture(scope="module")
def outcome():
    return generate.generate(REQUEST)


def test_an_image(outcome, tmp_path):
    assert outcome.image.size == (96, 64)
    assert outcome.steps == 2
    assert outcome.tokens == len("<user\na red bicycle<\n<assistant")  # a byte each, and < for each special token
    assert min(outcome.load_s, outcome.prepare_s, outcome.denoise_s, outcome.step_ms, outcome.peak_gib) > 0
    path = tmp_path / "a.png"
    assert not generate.is_ours(path)
    generate.save(outcome, path)
    assert generate.is_ours(path)
    with Image.open(path) as image:
        image.load()
        assert image.size == (96, 64)
        for word in ("a red bicycle", '"seed": 0', '"torch"', '"steps": 2'):
            assert word in image.info["int8kit"]
    assert list(tmp_path.iterdir()) == [path]


def test_configurations_are_resolved_for_what_runs(outcome):
    image, text = 4 * 6, outcome.tokens
    assert {choice.shape.m for choice, _ in outcome.choices} == {image, image + text}
    assert sum(count for _, count in outcome.choices) == 2 * (2 * 7 + 1)
    assert all(choice.level in {level.name for level in LEVELS} for choice, _ in outcome.choices)


def test_same_seed_same_picture(outcome):
    again = generate.generate(REQUEST)
    assert again.image.tobytes() == outcome.image.tobytes()
    other = generate.generate(Request("a red bicycle", height=64, width=96, steps=2, seed=1))
    assert other.image.tobytes() != outcome.image.tobytes()


def test_tight_text_and_int8_stay_near_the_stock_pipeline():
    """The picture against diffusers' own run with 2048 padded slots in bf16: only quantization noise between them."""
    stock = models.tiny_pipeline()
    stock.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 96, "num_inference_steps": 2, "std": 1.5, "guidance_schedule": [7.0, 3.0]}
    theirs = stock("a red bicycle", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images[0]
    ours = torch.tensor(list(generate.generate(REQUEST).image.tobytes())).reshape(64, 96, 3).permute(2, 0, 1) / 255
    assert (ours - theirs).abs().mean() < 0.05
    assert theirs.std() > 0.05


def test_the_mask_of_tight_text_does_nothing():
    model = models.get("tiny")
    module = model.build()
    for case in (models.Case(64, 64, text_tokens=9), models.Case(64, 64, branch="uncond")):
        torch.manual_seed(1)
        inputs = model.inputs(module, case)
        with torch.no_grad():
            masked = module(**inputs).sample
            bare = copy.deepcopy(module)
            ideogram4.unmask(bare)
            assert torch.equal(bare(**inputs).sample, masked)


def test_a_local_folder(tmp_path):
    models.tiny_pipeline().save_pretrained(tmp_path / "m")
    here = generate.generate(Request("a red bicycle", model=str(tmp_path / "m"), height=64, width=96, steps=2))
    there = generate.generate(REQUEST)
    assert here.image.tobytes() == there.image.tobytes()
    generate.save(here, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert '"model": "m"' in image.info["int8kit"]
        assert str(tmp_path) not in str(image.info)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"model": "sdxl"}, UnknownName, "unknown model 'sdxl'; known: tiny"),
        ({"model": "nobody/nothing"}, FileError, "cannot load 'nobody/nothing'"),
        ({"preset": "best"}, UnknownName, "unknown preset 'best'; known: default, quality, turbo"),
        ({"steps": 0}, InputError, "0 steps"),
        ({"width": 100}, InputError, "width 100: expected a positive multiple of 16"),
        ({"gpu": "rtx1"}, UnknownName, "unknown GPU"),
        ({"prompt": "x" * 3000}, InputError, "the prompt has 30[0-9]+ tokens; legal is up to 2048; shorten it"),
    ],
)
def test_bad_requests(change, error, reason):
    with pytest.raises(error, match=reason):
        generate.generate(Request(**{"prompt": "x", "height": 64, "width": 64, "steps": 1, **change}))


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(FileError, match="as an Ideogram4Pipeline"):
        ideogram4.load(str(tmp_path))


def test_no_database_for_a_card(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "find", lambda alias, given=None: None)
    outcome = generate.generate(Request("x", height=64, width=64, steps=1, gpu="rtx3060"))
    assert {choice.level for choice, _ in outcome.choices} == {DEFAULT}
    assert outcome.databases == ()
    assert gpus.get("rtx3060").alias == "rtx3060"


def test_strict_refuses_what_is_not_proven(outcome, tmp_path):
    nothing = Resources(registers=1, spill_bytes=0, shared_bytes=0)
    entries = [
        Entry(m=s.m, n=s.n, k=s.k, source=Source.MODELLED, config=default_config(s), triton=triton.__version__,
              kernel=gemm.kernel_hash(), resources=nothing, tried=1)
        for s in {choice.shape for choice, _ in outcome.choices}
    ]  # fmt: skip
    path, card = tmp_path / "t.json", gpus.get("rtx3090")
    store.update(path, card, entries)
    request = replace(REQUEST, steps=1, gpu="rtx3090", database=path, strict=True)
    reason = (
        rf"not proven under Triton {triton.__version__} as sm_86 code .* run `int8kit verify --gpu rtx3090` on a GPU"
    )
    with pytest.raises(CheckFailed, match=reason):
        generate.generate(request)
    assert len(generate.unproven_of(generate.generate(replace(request, strict=False)).choices)) > 1

    def proven(**change):
        about = {"device": "d", "arch": 86, "kernel": gemm.kernel_hash(), "triton": triton.__version__, **change}
        return {e.key: [stamp("native", entry=e, **about)] for e in entries}

    store.stamp(path, proven(triton="3.6.99"))
    with pytest.raises(CheckFailed, match=reason):
        generate.generate(request)
    store.stamp(path, proven())
    assert generate.unproven_of(generate.generate(request).choices) == []
