"""foreign_weights: weights of other libraries are read as they are meant, or refused in one line."""

import json

import pytest
import torch

from int8kit import InputError, Int8Linear, quantize_, reference
from int8kit.foreign_weights import float_weight, quantized, why_left

FP8 = torch.float8_e4m3fn


def linear(weight, n=32, k=64, **beside):
    """A linear [n, k] with this weight, and attributes beside it."""
    made = torch.nn.Linear(k, n, bias=False)
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    vars(made).update(beside)
    return made


def weight_of(n=32, k=64):
    torch.manual_seed(0)
    return torch.randn(n, k) / 8


def assert_refused(made, *words):
    with pytest.raises(InputError) as caught:
        Int8Linear.from_linear(made)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def assert_equals(made, weight):
    """`made` gives the int8 weight and scales of the float tensor `weight`."""
    wq, scale = quantized(made)
    expected_wq, expected_scale = reference.quantize(weight)
    assert torch.equal(wq, expected_wq)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_plain_floats(dtype):
    weight = weight_of().to(dtype)
    assert_equals(linear(weight), weight.float())
    assert_equals(linear(weight.t().contiguous().t()), weight.float())
    layer = Int8Linear.from_linear(torch.nn.Linear(64, 32, dtype=dtype))
    assert layer.bias.dtype is (torch.float32 if dtype is torch.float64 else dtype)


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (32,), (32, 1)])
def test_fp8_with_its_scale(name, shape):
    scale = torch.rand(shape) + 0.5
    weight = weight_of().to(FP8)
    rows = scale.reshape(-1).expand(32)
    assert_equals(linear(weight, **{name: scale}), weight.float() * rows[:, None])


def test_fp8_with_a_scale_for_each_block():
    scale = torch.rand(2, 3) + 0.5
    weight = weight_of(32, 40).to(FP8)
    made = linear(weight, k=40, weight_scale_inv=scale, block_size=[16, 16])
    wide = torch.cat([scale[:1].expand(16, 3), scale[1:].expand(16, 3)])
    wide = torch.stack([wide[:, j // 16] for j in range(40)], dim=1)
    assert_equals(made, weight.float() * wide)
    del made.block_size
    assert_refused(made, "scale [2, 3]", "expected one value, [32] or [32, 1]")


@pytest.mark.parametrize("shape", [(), (32,), (32, 1)])
def test_int8_keeps_its_integers_and_scales(shape):
    weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    scale = torch.rand(shape) + 0.5
    wq, found = quantized(linear(weight, weight_scale=scale))
    assert torch.equal(wq, weight)
    assert torch.equal(found, scale.reshape(-1).expand(32))
    layer = Int8Linear.from_int8(wq, found)
    assert torch.equal(quantized(layer)[0], weight)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda w: linear(w.to(FP8)), ["float8_e4m3fn with no scale", "weight_scale"]),
        (lambda w: linear(w.to(FP8), weight_scale=torch.ones(()), scale_weight=torch.ones(())), ["weight_scale and"]),
        (lambda w: linear(w.to(FP8), weight_scale=torch.ones(31)), ["a scale [31] for a weight [32, 64]"]),
        (lambda w: linear(w.to(FP8), weight_scale=torch.tensor(torch.nan)), ["32 of 32 rows", "NaN"]),
        (lambda w: linear(w.to(torch.int8)), ["int8 with no scale"]),
        (lambda w: linear(w.to(torch.int8)[:, :32], weight_scale=torch.ones(32)), ["[32, 32] of int8", "packed"]),
        (lambda w: linear(w.to(torch.int8), weight_scale=torch.ones(32), zero_point=torch.ones(32)), ["zero_point"]),
        (lambda w: linear(w, pre_quant_scale=torch.ones(64)), ["pre_quant_scale"]),
        (lambda w: linear(w, weight_scale=torch.ones(())), ["float32 with weight_scale beside it", "multiply"]),
        (lambda w: linear(torch.zeros(32, 34, dtype=torch.uint8)), ["[32, 34] of uint8", "without quantization"]),
        (lambda w: linear(w[:, :32]), ["[32, 32] of float32: expected [32, 64]"]),
        (lambda w: linear(w.to("meta")), ["meta", "load"]),
        (lambda w: linear(torch.where(w == w[3, 5], torch.inf, w)), ["1 of 32 rows", "infinity"]),
        (lambda w: linear(w.to_sparse()), ["without dequantize()"]),
    ],
)  # fmt: skip
def test_an_unknown_format_is_refused(made, words):
    assert_refused(made(weight_of()), *words)


def test_a_rotated_weight_of_comfy_is_refused():
    def marked(text):
        return linear(
            torch.ones(32, 64, dtype=torch.int8),
            weight_scale=torch.ones(32),
            comfy_quant=torch.tensor(list(text.encode()), dtype=torch.uint8),
        )

    assert quantized(marked(json.dumps({"format": "int8_tensorwise"})))[0].sum() == 32 * 64
    assert_refused(marked(json.dumps({"format": "int8_tensorwise", "convrot": True})), "convrot", "rotated")
    assert_refused(marked("{"), "comfy_quant", "no JSON object")


class Scaled(torch.Tensor):
    """A stand-in for a tensor class of torchao or quanto: integers, a scale per row, and a shift."""

    def dequantize(self):
        if self.fails:
            raise RuntimeError("lost")
        return (self.qdata - self.shift) * self.scale


def stand_in(shift=0, fails=False):
    weight = torch.zeros(32, 64).as_subclass(Scaled)
    torch.manual_seed(0)
    weight.qdata = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    weight.scale, weight.shift, weight.fails = torch.rand(32, 1) + 0.5, shift, fails
    made = torch.nn.Linear(64, 32, bias=False)
    made._parameters["weight"] = weight
    weight.detach = lambda: weight
    return made, weight


def test_a_tensor_class_with_dequantize():
    made, weight = stand_in()
    wq, scale = quantized(made)
    assert torch.equal(wq, weight.qdata)  # kept: the class has nothing but the integers and a scale per row
    assert torch.equal(scale, weight.scale[:, 0])
    made, weight = stand_in(shift=3)
    assert_equals(made, weight.dequantize())
    assert_refused(stand_in(fails=True)[0], "Scaled", "dequantize() fails (RuntimeError)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    for config, kept in (
        (quantization.Int8WeightOnlyConfig(), True),
        (quantization.Int8DynamicActivationInt8WeightConfig(), True),
        (quantization.Float8WeightOnlyConfig(), False),
    ):
        module = torch.nn.Sequential(linear(weight_of()).to(dtype))
        quantization.quantize_(module, config)
        weight = module[0].weight
        if kept:
            assert torch.equal(quantized(module[0])[0], weight.qdata)
        else:
            assert_equals(module[0], weight.dequantize())


def test_quanto():
    quanto = pytest.importorskip("optimum.quanto")
    for kind in (quanto.qint8, quanto.qint4, quanto.qfloat8):
        module = torch.nn.Sequential(linear(weight_of(32, 128), k=128))
        quanto.quantize(module, weights=kind)
        assert_equals(module[0], weight_of(32, 128))  # not frozen yet
        quanto.freeze(module)
        weight = module[0].weight
        if kind is quanto.qint8:
            assert torch.equal(quantized(module[0])[0], weight._data)
        else:
            assert_equals(module[0], weight.dequantize())


def four_bits(bnb, weight, **settings):
    made = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False)
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, **settings).to("cpu")
    return made


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_of_bitsandbytes(kind, double):
    bnb = pytest.importorskip("bitsandbytes")
    settings = {"quant_type": kind, "compress_statistics": double}
    for dtype in (torch.float32, torch.bfloat16):
        made = four_bits(bnb, weight_of(32, 512).to(dtype), **settings)
        assert_equals(made, bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state))
    # Rows that are not whole blocks: the same blocks as those of one long row, which the library decodes rightly
    weight = weight_of(32, 416)
    flat = four_bits(bnb, weight.reshape(1, -1), **settings).weight
    expected = bnb.functional.dequantize_4bit(flat.data, flat.quant_state).reshape(32, 416)
    assert (expected - weight).norm() < 0.13 * weight.norm()
    assert_equals(four_bits(bnb, weight, **settings), expected)
    stored = four_bits(bnb, weight, quant_storage=torch.bfloat16, **settings)
    assert stored.weight.dtype is torch.bfloat16
    assert_equals(stored, expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bits_without_their_state_are_refused(storage):
    bnb = pytest.importorskip("bitsandbytes")
    made = four_bits(bnb, weight_of(), quant_type="nf4", quant_storage=storage)
    made.weight.quant_state = None
    assert_refused(made, "without quantization")
    plain = bnb.nn.Linear4bit(64, 32, bias=False)
    plain.weight.data = weight_of()
    assert_equals(plain, weight_of())  # not packed yet


def test_eight_bits_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    made.load_state_dict({"weight": weight_of()})
    assert_equals(made, weight_of())  # not quantized yet
    made = made.to("cpu")
    integers, scale = made.weight.data.clone(), made.weight.SCB / 127
    for _ in range(2):
        wq, found = quantized(made)
        assert torch.equal(wq, integers)
        assert torch.equal(found, scale)
        made(torch.ones(1, 64))  # moves the scales from the weight to the state
    made.state.SCB = None
    assert_refused(made, "8-bit", "SCB")


class Halved(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


class Inherited(torch.nn.Linear):
    pass


def test_linears_with_more_than_a_weight():
    assert why_left(torch.nn.Linear(8, 8)) == why_left(Inherited(8, 8)) == ""
    assert why_left(Int8Linear(8, 8)) == ""
    assert "Halved has an own forward" in why_left(Halved(8, 8))
    assert "no torch.nn.Linear" in why_left(torch.nn.Conv2d(3, 3, 1))
    assert "lazy" in why_left(torch.nn.LazyLinear(8))
    assert "MultiheadAttention" in why_left(torch.nn.MultiheadAttention(8, 2).out_proj)
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))
    assert "remove_parametrizations" in why_left(parametrized)
    assert_refused(Halved(8, 8), "own forward")
    replaced = torch.nn.Linear(8, 8)
    replaced.forward = lambda x: x
    assert "replaced on the instance" in why_left(replaced)


def test_the_older_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        made = torch.nn.utils.weight_norm(torch.nn.Linear(8, 8))
    assert "computed from other parameters" in why_left(made)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu": 3}, "gpu = 3: expected the alias of a GPU"),
        ({"device": "meta"}, "device = 'meta': expected a device with memory"),
        ({"device": "xyz"}, "device = 'xyz': expected a device of this machine"),
        ({"device": 99}, "device = 99: expected a device of this machine"),
    ],
)
def test_quantize_names_a_wrong_argument(settings, words):
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    with pytest.raises(InputError, match=words) as end:
        quantize_(model, **settings)
    assert "\n" not in str(end.value)
    assert type(model[0]) is torch.nn.Linear


def test_float_weights():
    plain = linear(weight_of().bfloat16())
    assert float_weight(plain).data_ptr() == plain.weight.data_ptr()
    scale = torch.rand(32) + 0.5
    for weight in (weight_of().to(FP8), (100 * weight_of()).to(torch.int8)):
        made = float_weight(linear(weight, weight_scale=scale), "cpu")
        assert torch.equal(made, weight.float() * scale[:, None])
        with pytest.raises(InputError, match="no scale"):
            float_weight(linear(weight))
    with pytest.raises(InputError, match="on the device meta"):
        float_weight(torch.nn.Linear(64, 32, device="meta"))
    plain.out_features = 16
    with pytest.raises(InputError, match=r"a weight \[32, 64\] of bfloat16: expected \[16, 64\]"):
        float_weight(plain)
