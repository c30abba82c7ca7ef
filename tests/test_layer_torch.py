"""An INT8 layer under torch, safetensors, accelerate and diffusers: casts, files, copies, compilers, hooks."""

import copy
import io
import pickle
import threading

import accelerate
import pytest
import safetensors.torch
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from int8kit import Int8Linear, Int8SwiGLU, ShapeError
from int8kit.errors import InputError
from int8kit.layer_state import Int8Weight
from int8kit.lookup import Plan
from int8kit.quantization import replace_linears

X = torch.linspace(-1, 1, 3 * 16).reshape(3, 16)


@pytest.fixture
def layer():
    return Int8Linear.from_linear(nn.Linear(16, 8))


@pytest.fixture(params=["plain", "swiglu"])
def either(request, layer):
    return layer if request.param == "plain" else Int8SwiGLU.from_linears(nn.Linear(16, 8), nn.Linear(16, 8))


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.bfloat16().float(),
    "to": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "model": lambda m: nn.Sequential(m).half()[0],
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_changes_the_bias_alone(layer, cast):
    weight, scales = layer.weight.clone(), layer.weight_scale.clone()
    made = CASTS[cast](layer)
    assert made is layer
    assert layer.weight_scale.dtype is torch.float32
    assert torch.equal(layer.weight_scale, scales)
    assert layer.weight.dtype is torch.int8
    assert torch.equal(layer.weight, weight)
    assert layer.bias.dtype is {"half": torch.float16, "float": torch.float32}.get(cast, layer.bias.dtype)
    assert (layer.bias.dtype is torch.float32) is (cast == "float")
    assert layer(X.to(layer.bias.dtype)).dtype is layer.bias.dtype


def test_meta_and_back_by_assignment(either):
    state, want = copy.deepcopy(either.state_dict()), either(X)
    either.to("meta")
    assert {t.device.type for t in either.state_dict().values()} == {"meta"}
    with pytest.raises(ShapeError, match="x on cpu, wq on meta, sw on meta, bias on meta: expected one device"):
        either(X)
    assert either(X.to("meta")).is_meta
    either.load_state_dict(state, assign=True)
    assert torch.equal(either(X), want)
    assert isinstance(either.weight, Int8Weight)
    assert not either.weight.requires_grad


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_another_dtype_are_converted_with_a_warning(layer, dtype, assign):
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in layer.state_dict().items()}
    loss = {torch.bfloat16: "0.39", torch.float16: "0.049"}[dtype]
    model = nn.Sequential(layer)
    with pytest.warns(UserWarning, match=f"0.weight_scale is {dtype}: each scale was rounded by up to {loss} %"):
        model.load_state_dict({f"0.{k}": v for k, v in cast.items()}, assign=assign)
    assert layer.weight_scale.dtype is torch.float32
    assert torch.equal(layer.weight_scale, cast["weight_scale"].float())
    assert layer.bias.dtype is (dtype if assign else torch.float32)


def test_a_layer_without_its_scales_gives_nan(layer):
    state = layer.state_dict()
    del state["weight_scale"]
    made = Int8Linear(16, 8)
    assert made.load_state_dict(state, strict=False).missing_keys == ["weight_scale"]
    assert made(X).isnan().all()


def test_float64_scales_that_are_float32_numbers_load_in_silence(layer):
    want = layer.weight_scale.clone()
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight_scale": state["weight_scale"].double()}, assign=True)
    assert torch.equal(layer.weight_scale, want)
    with pytest.warns(UserWarning, match="up to 6e-06 %"):
        layer.load_state_dict({**state, "weight_scale": state["weight_scale"].double() / 3}, assign=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_scales_that_a_cast_destroyed_are_refused(layer, value):
    state = layer.state_dict()
    scales = state["weight_scale"].half()
    scales[3] = value
    with pytest.raises(InputError, match="1 of 8 scales are infinite, NaN or zero") as end:
        layer.load_state_dict({**state, "weight_scale": scales})
    assert "\n" not in str(end.value)


def test_a_zero_row_keeps_its_zero_scale(layer):
    linear = nn.Linear(16, 8)
    with torch.no_grad():
        linear.weight[2] = 0
    state = Int8Linear.from_linear(linear).state_dict()
    with pytest.warns(UserWarning, match="was rounded"):
        layer.load_state_dict({**state, "weight_scale": state["weight_scale"].bfloat16()})
    assert layer.weight_scale[2] == 0


def test_a_float_weight_is_refused():
    layer = Int8Linear(16, 8)
    for assign in (False, True):
        with pytest.raises(InputError, match=r"0.weight is torch.float32: expected torch.int8; .*from_linear") as end:
            nn.Sequential(layer).load_state_dict(nn.Sequential(nn.Linear(16, 8)).state_dict(), assign=assign)
        assert "\n" not in str(end.value)
    with pytest.raises(InputError, match=r"weight torch\.float32: expected torch\.int8"):
        layer.weight = nn.Parameter(torch.zeros(8, 16))
    with pytest.raises(InputError, match=r"weight_scale is torch\.int32"):
        layer.load_state_dict({**layer.state_dict(), "weight_scale": torch.ones(8, dtype=torch.int32)})


def test_old_state_dicts_load(either):
    old = {"wq": either.weight.detach(), "sw": either.weight_scale, "bias": either.bias.detach()}
    new = type(either)(16, either.out_features)
    new.load_state_dict(old)
    assert set(old) == {"wq", "sw", "bias"}
    assert torch.equal(new(X), either(X))
    model = nn.Sequential(type(either)(16, either.out_features, device="meta"))
    model.load_state_dict({f"0.{name}": value for name, value in old.items()}, assign=True)
    assert torch.equal(model(X), either(X))


@pytest.mark.parametrize("bias", [True, False])
def test_old_pickles_load(either, bias):
    """A pickle holds the class and its __dict__, in which the three tensors were buffers."""
    if not bias:
        either.bias = None
    state = either.__getstate__()
    tensors = {"wq": either.weight.detach(), "sw": either.weight_scale}
    tensors["bias"] = either.bias.detach() if bias else None
    old = pickle.loads(pickle.dumps({**state, "_parameters": {}, "_buffers": tensors, "plan": Plan()}))
    made = type(either).__new__(type(either))
    made.__setstate__(old)
    assert torch.equal(made(X), either(X))
    assert set(made.state_dict()) == set(either.state_dict())
    assert isinstance(made.weight, Int8Weight)
    assert made.plan is None


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _through_torch(m),
    "safetensors": lambda m: _through_safetensors(m),
}


def _through_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_safetensors(module):
    made = type(module)(16, module.out_features, device="meta")
    loaded = safetensors.torch.load(safetensors.torch.save(module.state_dict()))
    made.load_state_dict(loaded, assign=True)
    return made


@pytest.mark.parametrize("way", COPIES)
def test_copies_give_the_same_bits(either, way):
    made = COPIES[way](either)
    assert made is not either
    assert type(made) is type(either)
    assert made.weight.data_ptr() != either.weight.data_ptr()
    assert isinstance(made.weight, Int8Weight)
    assert torch.equal(made(X), either(X))


def test_state_dict_loads_as_weights_only(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(keep_vars=True), file)
    file.seek(0)
    made = Int8Linear(16, 8)
    made.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(made(X), layer(X))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(either, backend):
    torch._dynamo.reset()
    compiled = torch.compile(either, fullgraph=True, backend=backend)
    assert torch.equal(compiled(X), either(X))
    with torch.inference_mode():
        assert torch.equal(compiled(X), either(X))


def test_exports_with_a_free_number_of_rows(either):
    program = torch.export.export(either, (X,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    for rows in (X, X[:2], torch.cat((X, X))):
        assert torch.equal(program.module()(rows), either(rows))


def test_fx_traces_a_layer(either):
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(either))(X), either(X))


def test_input_has_the_name_that_torch_gives_it(either):
    assert torch.equal(either(input=X), either(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype(either, dtype):
    torch._dynamo.reset()

    def nested(x):
        with torch.autocast("cpu", dtype=dtype):
            return either(x)

    want, without = either(X.to(dtype)), either(X)
    assert nested(X).dtype is dtype
    assert torch.equal(nested(X), want)
    for backend in ("eager", "aot_eager"):
        assert torch.equal(torch.compile(nested, fullgraph=True, backend=backend)(X), want)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(torch.compile(either, fullgraph=True, backend="aot_eager")(X), want)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(either(X), without)


def test_inference_mode(either):
    want = either(X)
    with torch.inference_mode():
        got = either(X)
    assert got.is_inference()
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 2, 16), (0, 0, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_empty_batches(either, shape, dtype):
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    y = either(x)
    assert y.shape == (*shape[:-1], 8)
    assert y.dtype is dtype
    y.sum().backward()
    assert x.grad.shape == shape


def test_threads_share_a_layer(layer):
    xs = [torch.randn(5 + i, 16) for i in range(8)]
    want, got = [layer(x) for x in xs], [None] * 8

    def call(i):
        for _ in range(20):
            got[i] = layer(xs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def _model():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    replace_linears(model, lambda name: True, lambda n, k: Plan())
    return model


@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_offloads_the_weight(buffers):
    model = _model()
    want = model(X)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    for _ in range(2):
        assert {m.weight.device.type for m in model} == {"meta"}
        assert {m.weight_scale.device.type for m in model} == {"meta" if buffers else "cpu"}
        assert torch.equal(model(X), want)


def test_quantizing_under_init_empty_weights_of_accelerate():
    linear = nn.Linear(16, 8)
    with accelerate.init_empty_weights():
        made = Int8Linear.from_linear(linear)
    assert made.weight.is_meta
    assert isinstance(made.weight, Int8Weight)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_diffusers_group_offload_gives_the_same_bits(kind):
    model = _model()
    want = model(X)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    device = torch.device("cpu")
    apply_group_offloading(model, onload_device=device, offload_device=device, offload_type=kind, **blocks)
    for _ in range(2):
        assert torch.equal(model(X), want)


def test_multihead_attention_refuses_an_int8_output_projection():
    """It multiplies by `out_proj.weight` itself."""
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(InputError, match="out_proj of MultiheadAttention"):
        attention.out_proj = Int8Linear.from_linear(nn.Linear(16, 16))
    assert attention(X, X, X)[0].shape == X.shape


def test_transformers_reads_the_dtype_of_a_weight():
    """T5 casts its activations to the dtype of `wo.weight`, unless that is int8."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseActDense

    dense = T5DenseActDense(T5Config(d_model=16, d_ff=24, dropout_rate=0.0)).bfloat16().eval()
    dense.wo = Int8Linear.from_linear(dense.wo)
    got = dense(X.bfloat16())
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, dense.wo(torch.relu(dense.wi(X.bfloat16()))))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Int8Linear(0, 4), "K = 0: expected at least 1"),
        (lambda: Int8Linear(4, 0), "N = 0: expected at least 1"),
        (lambda: Int8Linear(2.5, 4), "in_features is of type float: expected an int"),
        (lambda: Int8Linear(torch.zeros(2, 2), 4), "in_features is of type Tensor: expected an int; .*from_int8"),
        (lambda: Int8Linear(4, 4, dtype=torch.int8), "dtype of the bias torch.int8: expected torch.bfloat16"),
        (lambda: Int8SwiGLU(4, 3), "out_features = 3: expected an even number"),
        (lambda: Int8Linear.from_int8(torch.zeros(2, 4), torch.ones(2)), r"weight torch.float32 \(2, 4\): expected"),
        (lambda: Int8Linear.from_int8(_int8(2, 4), torch.ones(4)), r"weight_scale \(4,\): expected a contiguous \[2\]"),
        (lambda: Int8Linear.from_int8(_int8(2, 4), torch.ones(2).half()), "weight_scale torch.float16: expected"),
        (lambda: Int8Linear.from_int8(_int8(2, 4), torch.ones(2), torch.ones(3)), r"bias \(3,\): expected"),
        (lambda: Int8Linear.from_int8(_int8(4, 2).t(), torch.ones(2)), "weight has strides"),
        (
            lambda: Int8Linear.from_int8(_int8(2, 4), torch.ones(2, device="meta")),
            "weight on cpu, weight_scale on meta: expected one device",
        ),
        (lambda: Int8Linear.from_int8(_int8(2, 4), 1.0), "weight_scale is of type float: expected a torch.Tensor"),
        (lambda: Int8Linear.from_int8(_int8(2, 4), torch.ones(2), [0, 0]), "bias is of type list: expected"),
        (lambda: Int8Linear.joined([]), "no linears: expected at least one"),
    ],
)
def test_constructors_name_a_wrong_argument(make, words):
    with pytest.raises(ShapeError, match=words) as end:
        make()
    assert "\n" not in str(end.value)


def _int8(*shape):
    return torch.zeros(shape, dtype=torch.int8)


def test_initial_values_are_refused(layer):
    with pytest.raises(InputError, match="load a state dict, or call"):
        layer.reset_parameters()


def test_repr(layer):
    assert repr(layer) == "Int8Linear(in_features=16, out_features=8, bias=True)"
    layer.plan = Plan()
    layer.bias = None
    assert repr(layer) == "Int8Linear(in_features=16, out_features=8, bias=False, plan=default)"
