"""The torch operators on the CPU: values, schema, fake kernels, torch.compile."""

import re
import subprocess
import sys

import pytest
import torch

from int8kit import operand_checks, ops, reference
from int8kit.errors import ShapeError
from int8kit.kernels import qk_norm_rope, row_primitives
from int8kit.lookup import Plan
from int8kit.spec import GemmShape, TileConfig
from int8kit.verify.properties import operator_tables, operators

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


REFUSED = [c for operator in ops.OPERATORS for c in operator_tables.refusals(operator_tables.base(operator))]


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_all_halves_refuse_the_same_operands_in_the_same_words(operator):
    """The CPU half, the kernel half in Triton's interpreter, and the fake kernel, which compile and export call."""
    cases = [c for c in REFUSED if c.operator == operator]
    assert len(cases) > 2
    for case in cases:
        said = []
        for half in (operators._public, lambda c, a: operators._kernel_half(c, "cpu", a), operators._fake):
            with pytest.raises(ShapeError) as end:
                half(case, operators.arguments(case, "cpu"))
            said.append(str(end.value))
        assert len(set(said)) == 1, (case, said)
        assert "\n" not in said[0]


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_operands_on_several_devices_are_named(operator):
    case = operator_tables.base(operator)
    arguments = operators.arguments(case, "cpu")
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    for one in names if len(names) > 1 else ():
        mixed = {**arguments, one: arguments[one].to("meta")}
        found = ", ".join(f"{name} on {'meta' if name == one else 'cpu'}" for name in names)
        for half in (operators._public, operators._fake):
            with pytest.raises(ShapeError, match=re.escape(f"{found}: expected one device")):
                half(case, mixed)
    whole = {name: value.to("meta") if name in names else value for name, value in arguments.items()}
    assert {t.device.type for t in operators._public(case, whole)} == {"meta"}


@pytest.mark.parametrize(
    ("x", "n", "words"),
    [
        (torch.tensor(1.0), 40, "x () and w (24, 40): expected [..., K] and [N, K] with the same K"),
        (torch.zeros(3, 0), 0, "K = 0 of w (24, 0): expected at least 1"),
        (torch.zeros(3, 39), 40, "x (3, 39) and w (24, 40): expected [..., K]"),
        (torch.zeros(3, 40).double(), 40, "x torch.float64 (3, 40): expected [M, K] of bf16, fp16 or fp32"),
    ],
)
def test_linear_refuses_x_without_rows_of_k(x, n, words):
    wq, sw = torch.zeros(24, n, dtype=torch.int8), torch.ones(24)
    with pytest.raises(ShapeError, match=re.escape(words)):
        ops.int8_linear(x, wq, sw)
    with pytest.raises(ShapeError, match=re.escape(words)):
        ops._linear_cuda(x, wq, sw, None, Plan().text)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (0, 2, 40)])
def test_empty_batches_of_both_halves(operands, shape):
    _, wq, sw, bias = operands
    x = torch.zeros(shape).bfloat16()
    for half in (lambda: ops.int8_linear(x, wq, sw, bias), lambda: ops._linear_cuda(x, wq, sw, bias, Plan().text)):
        assert half().shape == (*shape[:-1], 24)
    assert ops.int8_linear_swiglu(x, wq, sw, bias).shape == (*shape[:-1], 12)


def test_limits_are_the_kernels():
    assert operand_checks.K_MAX_HELD == row_primitives.K_MAX_HELD
    assert operand_checks.HEAD_DIMS == qk_norm_rope.HEAD_DIMS
    assert set(operand_checks.FLOATS) == set(row_primitives.FLOATS)


def test_checks_leave_the_number_of_rows_free():
    """A check that compared a symbol would narrow the exported graph, or compile it again for each M."""

    args = torch.randn(6, 40), torch.ones(40), torch.zeros(2, 40)
    wq, sw = reference.quantize(torch.randn(24, 40))

    class Whole(torch.nn.Module):
        def forward(self, x, weight, modulation):
            q, s = ops.rms_norm_quantize(x, weight, modulation)
            return ops.scaled_mm(q, wq, s, sw)

    program = torch.export.export(Whole(), args, dynamic_shapes=({0: torch.export.Dim("rows")}, None, None))
    x = torch.randn(10, 40)
    assert torch.equal(program.module()(x, *args[1:]), Whole()(x, *args[1:]))


@pytest.mark.process
def test_operators_on_a_cpu_import_no_triton():
    code = (
        "import sys, torch; from int8kit import Int8Linear; layer = Int8Linear.from_linear(torch.nn.Linear(16, 8)); "
        "layer(torch.ones(2, 16, requires_grad=True)).sum().backward(); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"
