"""runtime/variants.py on a GPU: FP8 products equal their emulation, and other layers equal their results on a CPU."""

import copy

import pytest
import torch
from layer_bounds import exact_and_bound

from int8kit import gpus, models
from int8kit.runtime import denoise, variants
from int8kit.runtime.fake_quant import FakeQuantLinear
from int8kit.runtime.float8_linear import Float8Linear, emulated_product, has_products, quantize_rows_e4m3
from int8kit.runtime.fused_ideogram4 import FusedIdeogram4

SHAPES = [(1, 16, 16), (5, 48, 64), (300, 4608, 4608), (17, 512, 12288)]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def native():
    if not has_products(0):
        pytest.skip("this GPU and torch have no FP8 products with scales per row")


def operands(m, n, k, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.randn(m, k, device="cuda").to(dtype), (torch.randn(n, k, device="cuda") / k**0.5).to(dtype)


def assert_near_emulation(y, q, s, layer):
    """Each instruction adds 32 products in about 13 bits, so an error is at most K / 32 + 2 such roundings.

    The product and its sum with the bias are rounded to bf16, each with a relative error of 2**-8 at most.
    """
    expected = emulated_product(q, s, layer.weight, layer.weight_scale, layer.bias).double()
    size = (q.double().abs() @ layer.weight.double().abs().t()) * s.double() * layer.weight_scale.double()
    roundings = layer.in_features / 32 + 2
    rounded = expected.abs() + (0 if layer.bias is None else layer.bias.double().abs())
    assert bool(((y.double() - expected).abs() <= 2.0**-7 * rounded + roundings * 2.0**-13 * size).all())
    assert float((y.double() - expected).norm()) <= 0.03 * float(expected.norm())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_native_product_is_near_its_emulation(native, m, n, k, bias):
    x, w = operands(m, n, k)
    layer = Float8Linear.from_weight(w, torch.randn(n, device="cuda") if bias else None)
    assert layer.native
    q, s = quantize_rows_e4m3(x)
    y = layer.product(q, s)
    assert y.dtype is torch.bfloat16
    assert_near_emulation(y, q, s, layer)
    assert torch.equal(layer(x), y)
    if m > 5:  # rows of a larger quantization: the first scale is at an odd address
        assert_near_emulation(layer.product(q[3:], s[3:]), q[3:], s[3:], layer)


def test_the_native_layer_is_within_the_bound_of_its_roundings(native):
    x, w = operands(64, 256, 512)
    exact, bound = exact_and_bound(x, w, "fp8-native", accumulated=2.0**-13 / 16)
    error = (Float8Linear.from_weight(w)(x).double() - exact).abs()
    assert bool((error <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_quantized_as_on_a_cpu(dtype):
    x = operands(64, 16, 4608, dtype)[0]
    x[1] = 0
    x[2, 5] = torch.nan
    x[3] *= 2.0**-20
    for made, expected in zip(quantize_rows_e4m3(x), quantize_rows_e4m3(x.cpu()), strict=True):
        assert torch.equal(made.cpu().float().nan_to_num(), expected.float().nan_to_num())


def kernels(call):
    """The number of kernels of a call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def test_the_compiled_quantization(native):
    """One kernel, the numbers of the eager functions but for a last place, and no compilation for another M."""
    for k in (4608, 12288):
        x = operands(4096, 16, k)[0]
        assert (
            kernels(lambda x=x: quantize_rows_e4m3(x, compiled=True)) <= 2 < kernels(lambda x=x: quantize_rows_e4m3(x))
        )
        with torch._dynamo.config.patch(error_on_recompile=True):
            for m in (4096, 3777, 300, 7):
                (q, s), (expected, scale) = quantize_rows_e4m3(x[:m], compiled=True), quantize_rows_e4m3(x[:m])
                assert torch.allclose(s, scale, rtol=2.0**-21, atol=0)
                apart = (q.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
                assert int(apart.max()) <= 1
                assert float((apart > 0).double().mean()) < 1e-3


def test_the_native_layer_compiles_and_is_captured(native):
    x, w = operands(300, 512, 1024)
    layer = Float8Linear.from_weight(w)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True)(x)
    assert float((compiled - expected).norm()) <= 0.01 * float(expected.norm())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.equal(y, expected)


def test_without_products_the_layer_is_weight_only():
    x, w = operands(17, 40, 72)  # no multiples of 16
    layer = Float8Linear.from_weight(w)
    assert not layer.native
    assert torch.equal(layer.dequantized().cpu(), Float8Linear.from_weight(w.cpu()).dequantized())
    exact, bound = exact_and_bound(x, w, "fp8")
    assert bool(((layer(x).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_quant_has_the_operands_of_a_cpu(dtype):
    x, w = operands(33, 256, 512, dtype)
    layer, on_cpu = FakeQuantLinear.from_weight(w), FakeQuantLinear.from_weight(w.cpu())
    assert torch.equal(layer.weight.cpu(), on_cpu.weight)
    assert torch.equal(layer.weight_scale.cpu(), on_cpu.weight_scale)
    assert torch.equal(layer.dequantized().cpu(), on_cpu.dequantized())
    exact, bound = exact_and_bound(x, w, "fake-quant")
    assert bool(((layer(x).double() - exact).abs() <= bound).all())
    # the same operands, summed in another order: the sums may round to neighbours in bf16
    y, expected, size = (
        layer(x).cpu().double(),
        on_cpu(x.cpu()).double(),
        (x.double().abs() @ w.double().abs().t()).cpu(),
    )
    assert bool(((y - expected).abs() <= 2.0**-7 * expected.abs() + 512 * 2.0**-23 * size).all())


@pytest.mark.filterwarnings("ignore:inner dimension")  # bitsandbytes, where blocks of 64 do not divide K
def test_nf4_has_the_weight_of_a_cpu():
    pytest.importorskip("bitsandbytes")
    from int8kit.foreign_weights import four_bits
    from int8kit.runtime.nf4_linear import NF4Linear

    for n, k in ((256, 512), (48, 416)):
        x, w = operands(33, n, k)
        layer, on_cpu = NF4Linear.from_weight(w, None), NF4Linear.from_weight(w, None, "cpu")
        found, expected = (four_bits(one.weight.data, one.weight.quant_state).cpu() for one in (layer, on_cpu))
        assert float((found != expected).double().mean()) < 1e-3  # a number half way between two codes
        exact, bound = exact_and_bound(x, w, "nf4")
        assert bool(((layer(x).double() - exact).abs() <= bound).all())
        assert layer(x[:0]).shape == (0, n)
        assert layer(x[0]).shape == (n,)


@pytest.mark.filterwarnings("ignore:inner dimension")  # bitsandbytes, where blocks of 64 do not divide K
@pytest.mark.parametrize("name", list(variants.VARIANTS))
def test_the_tiny_transformer_runs_on_a_gpu(name):
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    pytest.importorskip("diffusers")
    device, model = torch.device("cuda"), models.get("tiny")
    assert variants.why_not(name, device, gpus.present()) is None
    torch.manual_seed(0)
    transformer = model.build()
    inputs = model.inputs(transformer, models.Case(64, 96, text_tokens=9))
    moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    with torch.no_grad():
        expected = copy.deepcopy(transformer)(**inputs, return_dict=False)[0].float()
        layers = variants.convert(transformer, name, model.quantizes, None, device)
        y = transformer.to(device)(**moved, return_dict=False)[0].float().cpu()
    assert all(layer.weight.is_cuda for layer in layers.values())
    if name == "fp8":
        assert all(layer.native == has_products(0) for layer in layers.values())
    assert float((y - expected).norm() / expected.norm()) < (0.08 if name == "nf4" else 0.05)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_compiled_steps_are_captured(name):
    """A compilation at the second call would fall into the capture, and fail."""
    pytest.importorskip("diffusers")
    device, model = torch.device("cuda"), models.get("tiny")
    torch.manual_seed(0)
    transformer = model.build().to(device, torch.bfloat16)
    variants.convert(transformer, name, model.quantizes, None, device, compiled=True)
    pair = [FusedIdeogram4(transformer, compiled=compiled) for compiled in (True, False)]
    times = torch.tensor([0.1, 0.5, 0.9], device=device, dtype=torch.bfloat16)
    for texts, height, width in (((20,), 64, 96), ((5, 9), 96, 96)):
        features = tuple(torch.randn(n, transformer.config.llm_features_dim, device=device).bfloat16() for n in texts)
        scene = denoise.Scene(features, 1, height, width)
        compiled, eager = (denoise.FusedBranches(fused, fused, scene, times) for fused in pair)
        assert compiled.graphs
        latents = denoise.noise(scene, transformer.config.in_channels, 0, device)
        for step in (1, 1, 2, 0):
            for made, want in zip(compiled.velocities(latents, step), eager.velocities(latents, step), strict=True):
                assert float((made - want).norm()) <= 0.02 * float(want.norm())
