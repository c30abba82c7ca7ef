"""The torch operators on the CPU: values, schema, fake kernels, torch.compile."""

import pytest
import torch

from int8kit import ops, reference
from int8kit.errors import ShapeError
from int8kit.lookup import Plan
from int8kit.spec import GemmShape, TileConfig

PLAN = Plan.fixed((GemmShape(64, 24, 40), TileConfig(64, 64, 64, 4, 3)))


@pytest.fixture
def operands():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 40).bfloat16()
    wq, sw = reference.quantize(torch.randn(24, 40))
    return x, wq, sw, torch.randn(24).bfloat16()


def test_linear_equals_quantize_then_scaled_mm(operands):
    x, wq, sw, bias = operands
    xq, sx = ops.quantize(x.reshape(10, 40))
    want = ops.scaled_mm(xq, wq, sx, sw, bias, plan=PLAN).reshape(2, 5, 24)
    got = ops.int8_linear(x, wq, sw, bias, plan=PLAN)
    assert torch.equal(got, want)
    assert torch.equal(got, reference.linear(x, wq, sw, bias))


def test_schema_and_fake_kernels(operands):
    x, wq, sw, bias = operands
    xq, sx = ops.quantize(x.reshape(10, 40))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.int8kit.quantize.default, (x.reshape(10, 40),), test_utils=checks)
    for b in (bias, None):
        torch.library.opcheck(torch.ops.int8kit.linear.default, (x, wq, sw, b, PLAN.text), test_utils=checks)
        args = (xq, wq, sx, sw, b, torch.float16, PLAN.text)
        torch.library.opcheck(torch.ops.int8kit.scaled_mm.default, args, test_utils=checks)


def test_compiles_without_a_graph_break(operands):
    x, wq, sw, bias = operands
    compiled = torch.compile(ops.int8_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, wq, sw, bias, plan=PLAN), ops.int8_linear(x, wq, sw, bias))


@pytest.mark.parametrize("compiled", [False, True])
def test_swiglu_equals_two_linears_and_their_product(operands, compiled):
    x, wq, sw, bias = operands
    call = ops.int8_linear_swiglu
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = call(x, wq, sw, bias, plan=PLAN)
    assert torch.equal(got, reference.linear_swiglu(x, wq, sw, bias))
    y = reference.linear(x.float(), wq, sw, bias)
    assert torch.equal(got, (reference.silu(y[..., 0::2]) * y[..., 1::2]).to(x.dtype))


def test_swiglu_schema_and_fake_kernels(operands):
    x, wq, sw, bias = operands
    checks = ("test_schema", "test_faketensor")
    xq, sx = ops.quantize(x.reshape(-1, x.shape[-1]))
    for b in (None, bias):
        args = (x, wq, sw, b, PLAN.text)
        torch.library.opcheck(torch.ops.int8kit.linear_swiglu.default, args, test_utils=checks)
        args = (xq, wq, sx, sw, b, torch.bfloat16, PLAN.text)
        torch.library.opcheck(torch.ops.int8kit.scaled_mm_swiglu.default, args, test_utils=checks)


def test_swiglu_refuses_an_odd_number_of_columns(operands):
    x, wq, sw, _ = operands
    with pytest.raises(ShapeError, match="an even number"):
        ops.int8_linear_swiglu(x, wq[:-1], sw[:-1])
