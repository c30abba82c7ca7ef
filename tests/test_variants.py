"""runtime/variants.py: each variant is a real linear, and its error stays inside the bound of its roundings."""

import copy
import json
import subprocess
import sys
import weakref

import pytest
import torch
from layer_bounds import exact_and_bound

from int8kit import InputError, Int8Linear, Plan, ShapeError, UnknownName, gpus, models, quantize
from int8kit.runtime import float8_linear, variants
from int8kit.runtime.fake_quant import FakeQuantLinear
from int8kit.runtime.float8_linear import E4M3, Float8Linear, emulated_product, quantize_rows_e4m3

CPU = torch.device("cpu")
MODEL = models.get("tiny")
NAMES = list(variants.VARIANTS)
QUANTIZED = [name for name in NAMES if name != "bf16"]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def tiny():
    """The tiny transformer, an input, and its output in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = MODEL.build()
        inputs = MODEL.inputs(transformer, models.Case(64, 96, text_tokens=9))
    return transformer, inputs, run(copy.deepcopy(transformer).float(), inputs)


def run(transformer, inputs):
    dtype = next(transformer.parameters()).dtype
    cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        return transformer(**cast, return_dict=False)[0].float()


def converted(tiny, name, **settings):
    needed(name)
    transformer = copy.deepcopy(tiny[0])
    return transformer, variants.convert(transformer, name, MODEL.quantizes, None, CPU, **settings)


def needed(name):
    if name == "nf4":
        pytest.importorskip("bitsandbytes")


def operands(m=5, n=48, k=112, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator) / 8
    x[0] *= 2.0**-20
    w[1] *= 2.0**-30
    return x.to(dtype), w.to(dtype)


def layer_of(name, w, bias=None):
    """A layer of one variant from a float weight."""
    needed(name)
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias is not None)
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    holder = torch.nn.Module()
    holder.inner = linear
    return variants.convert(holder, name, lambda _: True, None, CPU)["inner"]


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_transformer_runs(tiny, name):
    transformer, layers = converted(tiny, name)
    assert len(layers) == (0 if name == "bf16" else 15)
    assert all(MODEL.quantizes(layer) for layer in layers)
    assert all(transformer.get_submodule(layer) is made for layer, made in layers.items())
    kept = [type(m) for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear) and n not in layers]
    assert set(kept) == {torch.nn.Linear}
    _, inputs, expected = tiny
    error = float((run(transformer, inputs) - expected).norm() / expected.norm())
    low, high = {"bf16": (1e-4, 0.01), "nf4": (0.02, 0.08), "fp8": (0.006, 0.03)}.get(name, (0.004, 0.015))
    assert low < error < high


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_layer_is_within_the_bound_of_its_roundings(tiny, name):
    _, layers = converted(tiny, name)
    generator = torch.Generator().manual_seed(1)
    for layer, made in layers.items():
        linear = tiny[0].get_submodule(layer)
        x = torch.randn(4, linear.in_features, generator=generator).bfloat16()
        exact, bound = exact_and_bound(x, linear.weight, name)
        if linear.bias is not None:
            exact = exact + linear.bias.double()
            bound = bound + 2.0**-7 * (linear.bias.double().abs() + exact.abs())
        error = (made(x).double() - exact).abs()
        assert bool((error <= bound).all()), layer
        assert bool((error > 0).any()), layer


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_bound_notices_a_wrong_scale(name):
    """Numbers of one sign and a similar size, so that no sum cancels and hides an error."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.rand(5, 128, generator=generator) / 2 + 0.5, torch.rand(48, 128, generator=generator) / 2 + 0.5
    exact, bound = exact_and_bound(x, w, name)
    assert bool(((layer_of(name, w)(x).double() - exact).abs() <= bound).all())
    for factor in (0.75, 1.25):
        assert bool(((layer_of(name, factor * w)(x).double() - exact).abs() > bound).all())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes_dtypes_and_bias(name, dtype):
    x, w = operands(k=64)
    bias = torch.arange(48.0)
    made = layer_of(name, w, bias)
    plain = layer_of(name, w)
    assert (made.in_features, made.out_features, made.training) == (64, 48, True)
    assert isinstance(made, torch.nn.Linear)
    assert not any(p.requires_grad for p in made.parameters())
    x = x.to(dtype)
    y = made(x)
    assert y.shape == (5, 48)
    assert y.dtype is dtype
    assert torch.allclose(y.float(), plain(x).float() + bias, atol=0.3)
    assert torch.equal(made(x[None, :, None]), y[None, :, None])
    assert torch.equal(made(x[0]), y[0])
    assert torch.equal(made(x.t().contiguous().t()), y)
    for empty in (x[:0], x[None, :0], torch.empty(2, 0, 3, 64, dtype=dtype)):
        assert made(empty).shape == (*empty.shape[:-1], 48)
        assert made(empty).dtype is dtype
    for wrong in (x[:, :63], x[:, :0], torch.zeros((), dtype=dtype)):
        with pytest.raises(ShapeError) as caught:
            made(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ShapeError):
        made(x.double())


@pytest.mark.parametrize("name", [name for name in QUANTIZED if name != "nf4"])
def test_a_row_without_a_number_changes_no_other_row(name):
    x, w = operands()
    expected = layer_of(name, w)(x)
    x[2, 3] = torch.nan
    y = layer_of(name, w)(x)
    assert bool(y[2].isnan().all())
    rest = [0, 1, 3, 4]
    assert torch.equal(y[rest], expected[rest])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_weight_without_a_number_is_refused(name):
    _, w = operands(k=64)
    w[3, 3] = torch.inf
    with pytest.raises(InputError, match=r"'inner': .*NaN or an infinity"):
        layer_of(name, w)


@pytest.mark.parametrize("cls", [Float8Linear, FakeQuantLinear])
def test_state_dict_round_trip(cls):
    x, w = operands()
    made = cls.from_weight(w, torch.arange(48.0))
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert {name: t.dtype for name, t in state.items()} == {
        "weight": cls.weight_dtype, "weight_scale": torch.float32, "bias": torch.float32,
    }  # fmt: skip
    for assign in (False, True):
        loaded = cls(112, 48)
        assert bool(loaded.weight_scale.isnan().all())
        loaded.load_state_dict(state, assign=assign)
        assert torch.equal(loaded(x), made(x))
    for name in ("weight", "weight_scale"):
        with pytest.raises(InputError, match=f"{name} is torch.bfloat16: expected"):
            cls(112, 48).load_state_dict({**state, name: state[name].bfloat16()})
    assert torch.equal(copy.deepcopy(made)(x), made(x))


@pytest.mark.parametrize("cls", [Float8Linear, FakeQuantLinear])
def test_a_cast_keeps_the_weight_and_its_scales(cls):
    x, w = operands()
    made = cls.from_weight(w, torch.arange(48.0))
    expected = made(x)
    for cast in (made.half(), made.bfloat16(), made.to(torch.float64), made.float()):
        assert cast.weight.dtype is cls.weight_dtype
        assert cast.weight_scale.dtype is torch.float32
    assert made.bias.dtype is torch.float32
    assert torch.equal(made(x), expected)
    moved = cls(112, 48, device="meta").to_empty(device="cpu")
    assert bool(moved.weight_scale.isnan().all())
    assert cls(112, 48, device="meta").half().weight.dtype is cls.weight_dtype
    with pytest.raises(InputError):
        made.reset_parameters()
    with pytest.raises(ShapeError):
        cls(0, 48)
    with pytest.raises(ShapeError):
        cls.from_weight(w[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_quant_has_the_operands_of_int8(dtype):
    x, w = operands(dtype=dtype)
    made, int8 = FakeQuantLinear.from_weight(w), layer_of("int8", w)
    assert torch.equal(made.weight, int8.weight)
    assert torch.equal(made.weight_scale, int8.weight_scale)
    q, s = quantize(x)
    rounded = (q.float() * s[:, None]).bfloat16()
    weight = (int8.weight.float() * int8.weight_scale[:, None]).bfloat16()
    assert torch.equal(made.dequantized(), weight)
    assert torch.equal(made(x), torch.nn.functional.linear(rounded, weight).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_in_e4m3(dtype):
    x, _ = operands(dtype=dtype)
    x[1] = 0
    x[2, 5] = torch.nan
    x[3, 5] = -torch.inf
    q, s = quantize_rows_e4m3(x)
    assert (q.dtype, q.shape, s.dtype, s.shape) == (E4M3, x.shape, torch.float32, (5, 1))
    assert s[1] == 0
    assert bool(s[2:4].isnan().all())
    assert not bool(q[1:4].float().any())
    for row in (0, 4):
        assert float(q[row].float().abs().max()) == 448
        step = torch.maximum(x[row].float().abs() * 2.0**-4, s[row] * 2.0**-10) * (1 + 2.0**-20)
        assert bool(((q[row].float() * s[row] - x[row].float()).abs() <= step).all())
    assert quantize_rows_e4m3(x.t())[0].is_contiguous()
    assert [t.shape for t in quantize_rows_e4m3(x[:0])] == [(0, 112), (0, 1)]


def test_a_row_whose_scale_is_subnormal_stays_inside_e4m3():
    """Such a scale is rounded by up to half of itself, so quotients exceed 448, and a cast may make NaN of them."""
    x = torch.tensor([[2.0**-149 * 1.4 * 448, -(2.0**-149)], [2.0**-149, 0.0]])
    q, s = quantize_rows_e4m3(x)
    assert s.tolist() == [[2.0**-149], [0.0]]
    assert q.float().tolist() == [[448.0, -1.0], [0.0, 0.0]]


def test_every_e4m3_number_is_kept():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    numbers = codes[codes.float().isfinite()]
    q, s = quantize_rows_e4m3(numbers.float()[None])
    assert float(s) == 1
    assert torch.equal(q[0].float(), numbers.float())
    made = Float8Linear.from_weight(numbers.float()[None])
    assert torch.equal(made.dequantized()[0].float(), numbers.float())


def test_the_emulated_product_is_exact_and_within_its_bound():
    x, w = operands(k=4608)
    made = Float8Linear.from_weight(w, torch.arange(48.0))
    q, s = quantize_rows_e4m3(x)
    y = made.product(q, s)
    assert torch.equal(y, emulated_product(q, s, made.weight, made.weight_scale, made.bias))
    # in units of 2**-18, the smallest product, every sum is an integer
    whole = ((q.double() * 512).long() @ (made.weight.double() * 512).long().t()).double() / 2**18
    assert torch.equal(y, (whole.float() * s * made.weight_scale + torch.arange(48.0)).bfloat16())
    exact, bound = exact_and_bound(x, w, "fp8-native")
    error = (Float8Linear.from_weight(w).product(q, s).double() - exact).abs()
    assert bool((error <= bound).all())
    weight_only = made(x).double()
    near = bound + exact_and_bound(x, w, "fp8")[1] + 2.0**-7 * exact.abs() + 2.0**-7 * 48
    assert bool(((y.double() - weight_only).abs() <= near).all())


def test_the_emulation_equals_torch_on_a_cpu():
    x, w = operands(m=64, n=64, k=256)
    made = Float8Linear.from_weight(w)
    q, s = quantize_rows_e4m3(x)
    try:
        y = torch._scaled_mm(q, made.weight.t(), s, made.weight_scale[None], out_dtype=torch.bfloat16)
    except RuntimeError as error:  # an older torch has no scales per row here
        pytest.skip(str(error).partition("\n")[0])
    expected = made.product(q, s).float()
    # the sum of 256 products is rounded in another order, and the result may round to the other neighbour
    size = (q.double().abs() @ made.weight.double().abs().t()) * s.double() * made.weight_scale.double()
    assert bool(((y.float() - expected).abs() <= 2.0**-7 * expected.abs() + 256 * 2.0**-24 * size).all())


def test_operands_of_another_layer_are_refused():
    x, w = operands()
    made = Float8Linear.from_weight(w)
    q, s = quantize_rows_e4m3(x)
    for wrong in ((q[:, :96], s), (q.float(), s), (q, s[:, 0]), (q, s[:4]), (q[None], s)):
        with pytest.raises(ShapeError, match="as quantize_rows_e4m3 returns them"):
            made.product(*wrong)


def test_the_path_of_a_layer_is_shown(monkeypatch):
    made = Float8Linear.from_weight(operands()[1])
    assert not made.native
    assert "out_features=48, bias=False, weight-only: bf16 products" in repr(made)
    monkeypatch.setattr(Float8Linear, "native", True)
    assert "bias=False, fp8 products" in repr(made)


def test_a_native_layer_quantizes_each_input_once(monkeypatch):
    """On a CPU with the operator of torch in place of the tensor cores."""
    x, w = operands(n=64, k=128)
    made = Float8Linear.from_weight(w, torch.arange(64.0))
    calls = []

    def scaled_mm(q, weight, s, scale, *, out_dtype, use_fast_accum):
        calls.append((q.is_contiguous(), weight.stride(), tuple(s.shape), tuple(scale.shape), use_fast_accum))
        return emulated_product(q, s, weight.t(), scale[0]).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(Float8Linear, "native", True)
    y = made(x)
    assert calls == [(True, (1, 128), (len(x), 1), (1, 64), True)]
    assert torch.equal(y, made.product(*quantize_rows_e4m3(x)).float())
    assert made(x[:0]).shape == (0, 64)
    assert len(calls) == 2  # torch is not called without rows


@pytest.mark.slow
def test_a_compiled_quantization_serves_every_m(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(float8_linear._quantize_rows, backend=counter)
    monkeypatch.setattr(float8_linear, "_compiled_quantize_rows", lambda: compiled)
    for k in (64, 128):
        for m in (7, 33, 300):
            x = operands(m=m, k=k)[0]
            for made, expected in zip(quantize_rows_e4m3(x, compiled=True), quantize_rows_e4m3(x), strict=True):
                assert torch.equal(made.float(), expected.float())
    assert counter.frame_count == 2


def test_names_of_layers_and_shared_layers():
    model = torch.nn.Module()
    model.first = torch.nn.Linear(64, 32)
    model.blocks = torch.nn.ModuleList([model.first, torch.nn.Linear(64, 32)])
    model.head = torch.nn.Linear(32, 16)
    left = model.head
    layers = variants.convert(model, "fake-quant", lambda name: name != "head")
    assert set(layers) == {"first", "blocks.0", "blocks.1"}
    assert layers["first"] is layers["blocks.0"] is model.blocks[0] is model.first
    assert model.head is left
    assert variants.convert(model, "fake-quant", lambda name: name != "head") == {}
    assert variants.convert(torch.nn.Module(), "fp8", lambda _: True) == {}


@pytest.mark.parametrize("name", ["int8", "unfused"])
def test_plans_reach_int8(tiny, name):
    seen, made = [], Plan()

    def plan(n, k):
        seen.append((n, k))
        return made

    layers = variants.convert(copy.deepcopy(tiny[0]), name, MODEL.quantizes, plan, CPU)
    assert seen == [(layer.out_features, layer.in_features) for layer in layers.values()]
    assert {type(layer) for layer in layers.values()} == {Int8Linear}
    assert all(layer.plan is made for layer in layers.values())


@pytest.mark.parametrize("name", QUANTIZED)
def test_one_float_weight_at_a_time(name):
    """Of the variants that replace one linear after the other, a former weight is free before the next one is read."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    alive = [weakref.ref(linear) for linear in model]
    counts = []

    def quantizes(_):
        counts.append(sum(one() is not None for one in alive))
        return True

    needed(name)
    variants.convert(model, name, quantizes, None, CPU)
    assert counts == ([4] * 4 if name in ("int8", "unfused") else [4, 3, 2, 1])
    assert not any(one() is not None for one in alive)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Float8Linear, FakeQuantLinear])
def test_layers_compile_without_a_break(cls):
    x, w = operands(n=64, k=128)
    made = cls.from_weight(w, torch.arange(64.0))
    expected = made(x)
    assert torch.equal(torch.compile(made, backend="eager", fullgraph=True)(x), expected)


def test_compiled_reaches_the_layers(tiny):
    assert not any(layer.compiled for layer in converted(tiny, "fp8")[1].values())
    assert all(layer.compiled for layer in converted(tiny, "fp8", compiled=True)[1].values())


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_nf4_serve_every_variant(name):
    """A checkpoint in bitsandbytes' NF4: each variant starts from the floats of its weights."""
    bnb = pytest.importorskip("bitsandbytes")
    _, w = operands(k=64)
    packed = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(w.bfloat16(), quant_type="nf4", compress_statistics=False).to("cpu")
    floats = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    model = torch.nn.Sequential(packed)
    [made] = variants.convert(model, name, lambda _: True).values()
    assert type(made) is not type(packed)
    x = operands(k=64)[0].bfloat16()
    if name == "bf16":
        assert torch.equal(made.weight, floats.bfloat16())
        assert torch.equal(made(x), torch.nn.functional.linear(x, floats.bfloat16()))
    else:
        assert torch.equal(made(x), layer_of(name, floats)(x))


@pytest.mark.parametrize("name", ["fp9", "INT8", "fake_quant", ""])
def test_an_unknown_name_is_refused_in_one_line(name):
    expected = f"unknown variant {name!r}; expected bf16, fake-quant, fp8, int8, nf4, unfused"
    for call in (
        lambda: variants.check(name),
        lambda: variants.why_not(name, CPU, None),
        lambda: variants.remark(name, CPU, None),
        lambda: variants.convert(torch.nn.Module(), name, lambda _: True),
    ):
        with pytest.raises(UnknownName) as caught:
            call()
        assert str(caught.value) == expected


def test_every_variant_has_a_line():
    assert NAMES == ["int8", "bf16", "fp8", "nf4", "fake-quant", "unfused"]
    for name, variant in variants.VARIANTS.items():
        assert variants.check(name) is variant
        assert variant.name == name
        assert 0 < len(variant.description) < 100
        assert "\n" not in variant.description


def test_the_reasons_of_a_machine(monkeypatch):
    cuda, gpu = torch.device("cuda", 0), gpus.get("rtx3090")
    monkeypatch.setattr(variants, "find_spec", lambda _: None)
    for device, record in ((CPU, None), (cuda, gpu)):
        assert [name for name in NAMES if variants.why_not(name, device, record)] == ["nf4"]
    assert "pip install 'int8kit[nf4]'" in variants.why_not("nf4", CPU, None)
    monkeypatch.setattr(variants, "find_spec", lambda _: object())
    assert not any(variants.why_not(name, cuda, gpu) for name in NAMES)
    assert all(variants.why_not(name, cuda, None) for name in NAMES)
    assert all(variants.why_not(name, torch.device("meta"), None) for name in NAMES)


def test_the_path_of_fp8_is_explained(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert not any(variants.remark(name, CPU, None) for name in NAMES if name != "fp8")
    assert "a CPU has no FP8 products" in variants.remark("fp8", CPU, None)
    assert "is sm_86, and FP8 products need sm_89" in variants.remark("fp8", cuda, gpus.get("rtx3090"))
    for works in (True, False):
        monkeypatch.setattr(float8_linear, "has_products", lambda device, works=works: works and device == 0)
        remark = variants.remark("fp8", cuda, gpus.get("h200"))
        assert (remark is None) is works
    assert "this torch has no FP8 products with scales per row for sm_90" in remark


@pytest.mark.process
def test_questions_load_no_torch():
    code = (
        "import json, sys; from int8kit.runtime import variants; variants.check('fp8'); "
        "print(json.dumps([m for m in ('torch', 'triton', 'bitsandbytes') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == []
