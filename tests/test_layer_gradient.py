"""Gradients through INT8 layers: definition, torch.compile, adapters, and requests for a gradient of the weight."""

import warnings

import pytest
import torch
from torch import nn

from int8kit import Int8Linear, Int8SwiGLU, ops, reference
from int8kit.errors import InputError
from int8kit.lookup import Plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 16), (2, 3, 16), (16,), (0, 16))


def _plain(dtype, bias=True):
    layer = Int8Linear.from_linear(nn.Linear(16, 8, bias=bias, dtype=dtype))
    return layer.requires_grad_(False)


def _swiglu(dtype):
    return Int8SwiGLU.from_linears(nn.Linear(16, 8, dtype=dtype), nn.Linear(16, 8, dtype=dtype))


def _backward(call, x, grad):
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(grad)
    return x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_a_linear_is_the_product_with_the_dequantized_weight(dtype, shape):
    layer, x = _plain(dtype), torch.randn(shape).to(dtype)
    grad = torch.randn(*shape[:-1], 8).to(dtype)
    want = grad @ (layer.weight * layer.weight_scale[:, None]).to(dtype)
    assert torch.equal(_backward(layer, x, grad), want)
    assert layer.bias.grad is None
    assert torch.equal(_backward(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, grad), want)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_swiglu_follows_the_chain_rule(dtype, shape):
    """Against autograd of silu(g) * u in float64, at the pre-activations that the INT8 product gives."""
    layer, x = _swiglu(dtype), torch.randn(shape).to(dtype)
    layer.bias.requires_grad_(True)
    grad = torch.randn(*shape[:-1], 8).to(dtype)
    xq, sx = reference.quantize(x.reshape(-1, 16))
    h = reference.scaled_mm(xq, layer.weight, sx, layer.weight_scale, layer.bias.detach(), out_dtype=torch.float32)
    h = h.reshape(*shape[:-1], 16).double().requires_grad_()
    (nn.functional.silu(h[..., 0::2]) * h[..., 1::2]).backward(grad.double())
    want = h.grad @ (layer.weight.double() * layer.weight_scale.double()[:, None])
    got = _backward(layer, x, grad)
    tolerance = {"rtol": 0.0, "atol": 8 * torch.finfo(dtype).eps * float(want.abs().max() if want.numel() else 0)}
    torch.testing.assert_close(got.double(), want, **tolerance)
    of_bias = h.grad.reshape(-1, 16).sum(0)
    tolerance["atol"] = 8 * torch.finfo(dtype).eps * float(of_bias.abs().max())
    torch.testing.assert_close(layer.bias.grad.double(), of_bias, **tolerance)
    assert torch.equal(_backward(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, grad), got)
    torch._dynamo.reset()


def test_second_derivative_of_swiglu_follows_the_chain_rule():
    """Against autograd of silu(g) * u, at the same pre-activations. The rounding of x counts as the identity."""
    layer, x = _swiglu(torch.float32), torch.randn(3, 16)
    layer.bias.requires_grad_(True)
    xq, sx = reference.quantize(x)
    h = reference.scaled_mm(xq, layer.weight, sx, layer.weight_scale, layer.bias.detach(), out_dtype=torch.float32)

    def floats(x):
        exact = nn.functional.linear(x, layer.weight * layer.weight_scale[:, None], layer.bias)
        g, u = (exact + (h - exact).detach()).reshape(3, 8, 2).unbind(-1)
        return nn.functional.silu(g) * u

    def second(call, of):
        x_in = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(of(call(x_in)).sum(), x_in, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x_in, layer.bias))

    for of in (torch.square, torch.clone):  # the second has a constant gradient of y
        for got, want in zip(second(layer, of), second(floats, of), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [_plain(torch.float32), _swiglu(torch.float32)])
def test_a_tangent_is_refused_not_dropped(layer):
    x = torch.randn(3, 16)
    with pytest.raises(InputError, match="forward-mode"):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(InputError, match="forward-mode"):
        torch.func.hessian(lambda x: layer(x).square().sum())(x)
    with torch.autograd.forward_ad.dual_level():
        assert layer(x).shape == (3, 8)
        with pytest.raises(InputError, match="forward-mode"):
            layer(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_has_the_gradient_of_a_float_layer(dtype):
    linear = nn.Linear(16, 8, dtype=dtype)
    layer = Int8Linear.from_linear(linear)
    layer.bias.requires_grad_(True)
    x, grad = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 5, 8).to(dtype)
    layer(x).backward(grad)
    linear(x).backward(grad)
    assert torch.equal(layer.bias.grad, linear.bias.grad)
    assert layer.weight.grad is None
    mixed = Int8Linear.from_int8(layer.weight, layer.weight_scale, torch.zeros(8))
    mixed.bias.requires_grad_(True)
    mixed(x).backward(grad)
    assert torch.equal(mixed.bias.grad, grad.float().reshape(-1, 8).sum(0))


def test_gradient_under_autocast_and_of_a_slice():
    layer, x = _plain(torch.float32), torch.randn(3, 32)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x[:, ::2])
    y.backward(torch.ones_like(y))
    weight = (layer.weight * layer.weight_scale[:, None]).bfloat16()
    assert torch.equal(x.grad[:, ::2], (torch.ones(3, 8).bfloat16() @ weight).float())
    assert not x.grad[:, 1::2].any()


def test_operators_are_registered_for_autograd():
    """x requires a gradient; opcheck compares eager with AOTAutograd, forward and backward."""
    for layer, operator in ((_plain(torch.float32), "linear"), (_swiglu(torch.float32), "linear_swiglu")):
        layer.bias.requires_grad_(True)
        args = (torch.randn(3, 16, requires_grad=True), layer.weight, layer.weight_scale, layer.bias, Plan().text)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.int8kit, operator).default, args, test_utils=tests)
    with pytest.raises(InputError, match="sw requires a gradient"):
        ops.int8_linear(torch.randn(3, 16), layer.weight, layer.weight_scale.clone().requires_grad_())


class _Adapted(nn.Module):
    """A trained linear, a frozen layer, a trained linear."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(3)
        self.before, self.middle, self.after = nn.Linear(12, 16), middle, nn.Linear(8, 4)

    def forward(self, x):
        return self.after(torch.tanh(self.middle(torch.tanh(self.before(x)))))


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_train_as_around_a_float_layer(compiled):
    """Two steps of SGD; the parameters move within 3 % of the float model's movement."""
    torch._dynamo.reset()
    linear = nn.Linear(16, 8).requires_grad_(False)
    moved = []
    for middle in (linear, Int8Linear.from_linear(linear)):
        model = _Adapted(middle)
        start = [p.detach().clone() for p in model.parameters()]
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        torch.manual_seed(4)
        x, target = torch.randn(32, 12), torch.randn(32, 4)
        losses = []
        for _ in range(2):
            loss = nn.functional.mse_loss(call(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]
        steps = [p.detach() - q for p, q in zip(model.parameters(), start, strict=True) if p.requires_grad]
        moved.append(torch.cat([s.flatten() for s in steps]))
        assert len(steps) == 4
        assert all(s.any() for s in steps)
    assert (moved[1] - moved[0]).norm() < 0.03 * moved[0].norm()


def test_the_weight_stays_without_a_gradient():
    layer = _plain(torch.float32)
    with pytest.warns(UserWarning, match="an int8 weight has no gradient and stays frozen: train adapters") as heard:
        layer.weight.requires_grad_(True)
    assert "\n" not in str(heard[0].message)
    assert not layer.weight.requires_grad
    assert layer.weight.requires_grad_(False) is layer.weight


def test_a_model_that_asks_for_gradients_keeps_its_int8_weights_frozen():
    model = nn.Sequential(nn.Linear(16, 16), _plain(torch.float32), nn.Linear(8, 8)).requires_grad_(False)
    for target in (model, model[1]):
        with pytest.warns(UserWarning, match="stays frozen"):
            assert target.requires_grad_(True) is target
        assert next(name for name, p in target.named_parameters() if not p.requires_grad).endswith("weight")
        assert sum(not p.requires_grad for p in target.parameters()) == 1
        target.requires_grad_(False)
        assert not any(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("layer", [_plain(torch.float32), _swiglu(torch.float32)])
def test_transforms_of_torch_func(layer):
    """Output in the same bits; gradients as of torch.autograd."""
    x = torch.randn(3, 16)

    def loss(x):
        return layer(x).square().sum()

    wanted = x.clone().requires_grad_()
    loss(wanted).backward()
    assert torch.equal(torch.vmap(layer)(x), layer(x))
    assert torch.equal(torch.vmap(layer, in_dims=1, out_dims=1)(x[:, None]), layer(x[:, None]))
    assert torch.equal(torch.func.grad(loss)(x), wanted.grad)
    assert torch.equal(torch.func.vjp(layer, x)[1](torch.ones(3, 8))[0], torch.func.grad(lambda x: layer(x).sum())(x))
    jacobian = torch.autograd.functional.jacobian(layer, x[0])
    with warnings.catch_warnings():  # torch has no rule for the operators of SwiGLU's backward
        warnings.filterwarnings("ignore", "There is a performance drop")
        torch.testing.assert_close(torch.func.grad(lambda x: torch.vmap(layer)(x).square().sum())(x), wanted.grad)
        torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), jacobian)


def test_an_ensemble_of_layers_is_a_loop():
    layers = [_plain(torch.float32), _plain(torch.float32)]
    tensors = [dict(layer.state_dict()) for layer in layers]
    stacked = {name: torch.stack([one[name] for one in tensors]) for name in tensors[0]}
    x = torch.randn(3, 16)
    got = torch.vmap(lambda state: torch.func.functional_call(layers[0], state, (x,)))(stacked)
    assert torch.equal(got, torch.stack([layer(x) for layer in layers]))
