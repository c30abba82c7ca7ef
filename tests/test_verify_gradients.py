"""verify/: the property `gradients`, unusual layouts, and the checks of operands and results of a call."""

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_helpers import EXECUTOR

from int8kit import gradient, ops
from int8kit.errors import InputError, ShapeError
from int8kit.kernels import gemm
from int8kit.spec import GemmShape, Kernel
from int8kit.verify import implementations
from int8kit.verify.examples import fixed, layouts
from int8kit.verify.examples.strategies import OUT_DTYPES, Draw
from int8kit.verify.properties import gemm as gemm_properties
from int8kit.verify.properties import gradients, operator_tables, operators, row_tables
from int8kit.verify.properties.gradients import WAYS, GradientCase
from int8kit.verify.properties.operators import OperatorCase
from int8kit.verify.verify_kernels import DEFAULT_TILES

pytestmark = pytest.mark.usefixtures("quiet_interpreter")
FP32, BF16 = torch.float32, torch.bfloat16
CASES = list(gradients.always())
BASE = GradientCase("linear_swiglu", (3, 2), 40, 24, FP32, BF16)
DRAW = Draw(GemmShape(3, 6, 40), fixed.SMALL_TILES[0], "uniform", 1, None, FP32, 16, "signed")
INT8KIT = implementations.int8kit(EXECUTOR, fixed.SMALL_TILES)


def test_cases_have_every_way_and_dtype():
    for operator in ("linear", "linear_swiglu"):
        own = [c for c in CASES if c.operator == operator]
        assert {c.way for c in own} == set(WAYS)
        assert {(c.dtype, c.bias) for c in own} == {(a, b) for a in OUT_DTYPES for b in (None, *OUT_DTYPES)}
        assert {c.needs for c in own} == set(gradients.NEEDS)
        assert max(c.rows[0] for c in own if c.rows) > 2 * 256  # bf16 has no odd number beyond 256


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", ["linear", "linear_swiglu"])
def test_derivatives_hold(operator, way):
    assert gradients.check(replace(BASE, operator=operator, way=way), EXECUTOR) is None


def _scaled(factor, of):
    whole = gradient._of_product

    def broken(*args):
        of_x, _, _, of_bias, _ = whole(*args)
        return (of_x * factor if of == "x" else of_x), None, None, (of_bias * factor if of == "bias" else of_bias), None

    return broken


@pytest.mark.parametrize(("of", "factor"), [("x", 1 + 2.0**-23), ("bias", 1.1)])
@pytest.mark.parametrize("operator", ["linear", "linear_swiglu"])
@pytest.mark.parametrize("way", ["backward", "func"])
def test_wrong_gradient_is_caught(monkeypatch, operator, way, of, factor):
    monkeypatch.setattr(gradient, "_of_product", _scaled(factor, of))
    assert gradients.check(replace(BASE, operator=operator, way=way), EXECUTOR).startswith(f"the gradient of {of}: ")


def test_lost_derivatives_and_refusals_are_caught(monkeypatch):
    monkeypatch.setattr(gradient, "_of_product", lambda *_: (None,) * 5)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        gradients.check(BASE, EXECUTOR)
    monkeypatch.setattr(gradients, "_call", lambda c, a, **changes: (a | changes)["x"] * 1.0)
    assert gradients.check(replace(BASE, way="tangent"), EXECUTOR) == "no error, expected InputError"
    assert gradients.check(replace(BASE, way="dual"), EXECUTOR) == "no error, expected InputError"
    assert gradients.check(replace(BASE, way="scales"), EXECUTOR) == "no error, expected InputError"
    assert gradients.check(replace(BASE, way="autocast"), EXECUTOR) == "torch.float32, expected torch.bfloat16"
    assert gradients.check(replace(BASE, way="no floats"), EXECUTOR) == (
        "no error for x of torch.float64, expected InputError"
    )


def test_layouts_of_x_and_of_the_gradient():
    for layout, contiguous in (("", True), ("transposed", False), ("apart", False), ("expanded", False)):
        a = gradients._operands(replace(BASE, layout=layout), "cpu")
        assert a["x"].shape == (3, 2, 40)
        assert (a["x"].is_contiguous(), a["grad"].is_contiguous()) == (contiguous, contiguous)
        row = gradients._operands(replace(BASE, rows=(), layout=layout), "cpu")
        assert (row["x"].shape, row["grad"].shape) == ((40,), (12,))


def test_second_derivative_without_the_bias_is_caught(monkeypatch):
    case = replace(BASE, way="second", bias=FP32)
    assert gradients.check(case, EXECUTOR) is None
    whole = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, bias=None: whole(x, w))
    assert gradients.check(case, EXECUTOR) == "the second derivative for bias: absent"


def test_batch_along_another_axis_is_caught(monkeypatch):
    """The operators hold the rule of vmap itself, so its code is exchanged."""
    cases = [c for c in CASES if c.axes]
    assert {c.axes for c in cases} == set(gradients.AXES)
    assert {c.operator for c in cases} == {"linear", "linear_swiglu"}

    def of_first_axis(name, info, in_dims, x, *others):
        return getattr(torch.ops.int8kit, name)(x, *others), 0

    def without_copy(name, info, in_dims, *operands):
        operator = getattr(torch.ops.int8kit, name)
        calls = [
            [o if d is None else o.select(d, i) for o, d in zip(operands, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        return torch.stack([operator(*call) for call in calls]), 0

    def fails(case):
        try:
            return gradients.check(case, EXECUTOR)
        except (ShapeError, RuntimeError) as error:
            return str(error)

    monkeypatch.setattr(gradient.batched, "__code__", of_first_axis.__code__)
    assert all(fails(c) for c in cases)
    monkeypatch.setattr(gradient.batched, "__code__", without_copy.__code__)
    assert any(fails(c) for c in cases if c.axes[1:] != (None, None, None))


def test_refusals_without_a_tangent_are_caught(monkeypatch):
    case = replace(BASE, way="no tangent", bias=None)
    assert gradients.check(case, EXECUTOR) is None
    monkeypatch.setattr(ops.gradient, "refuse_tangents", _refuses_levels)
    with pytest.raises(InputError):
        gradients.check(case, EXECUTOR)
    monkeypatch.undo()
    monkeypatch.setattr(gradient.LinearSwiGLU, "jvp", lambda ctx, *tangents: None)
    assert "expected InputError" in gradients.check(replace(BASE, way="hessian"), EXECUTOR)


def _refuses_levels(*operands):
    if torch.autograd.forward_ad._current_level >= 0:
        raise InputError("a level")


@pytest.mark.parametrize(("layout", "k", "strides"), [("expanded", 40, (0, 1)), ("overlapping", 40, (16, 1)),
                                                      ("overlapping", 3, (1, 1)), ("apart", 1, (4, 2)),
                                                      ("loose", 40, (41, 1))])  # fmt: skip
def test_layouts(layout, k, strides):
    plain = torch.arange(1.0, 3 * k + 1).reshape(3, k)
    view = layouts.laid_out(plain, layout, torch.nan)
    assert view.stride() == strides
    assert not view.isnan().any()
    assert torch.equal(view[0], plain[0])
    assert torch.equal(view, plain) is (layout in ("apart", "loose"))


def test_every_layout_of_x_and_w_is_tried():
    found = {(d.config.kernel, d.layout) for d in fixed.layouts(DEFAULT_TILES)}
    assert {layout for kernel, layout in found if kernel is Kernel.TRITON} == {
        f"{layout} {name}" for layout in layouts.LAYOUTS for name in ("x", "w")
    }
    for d in fixed.layouts(fixed.SMALL_TILES):
        assert gemm_properties.accumulators(d, INT8KIT) is None


@pytest.mark.parametrize(
    ("sizes", "first", "last", "factor"),
    [(fixed.MIDDLE_K, 4096, 131071, 1.5), (fixed.MIDDLE_M_N, 150, 70000, 2.1), (row_tables.MIDDLE_K, 3000, 16384, 1.4)],
)
def test_middle_extents_leave_no_wide_gap(sizes, first, last, factor):
    ordered = (first, *sizes, last)
    assert all(a < b <= factor * a for a, b in itertools.pairwise(ordered))


def test_write_into_an_operand_is_caught(monkeypatch):
    whole = gemm._rounded

    def writes(operands, *rest):
        operands.sx.abs_()
        return whole(operands, *rest)

    monkeypatch.setattr(gemm, "_rounded", writes)
    d = replace(DRAW, shape=replace(DRAW.shape, m=20))
    assert gemm_properties.output(d, INT8KIT).startswith("the operand sx was written: ")

    def writes_later(operands, *rest):
        result = whole(operands, *rest)
        operands.sx.zero_()
        return result

    monkeypatch.setattr(gemm, "_rounded", writes_later)
    case = operator_tables.base("scaled_mm")
    assert operators.check(case, EXECUTOR).startswith("the kernel half: the operand sx was written: ")


def test_memory_that_calls_share_is_caught(monkeypatch):
    kept = {}
    monkeypatch.setattr(gemm, "_empty", lambda x, columns, dtype: kept.setdefault(0, torch.empty(5, 24, dtype=BF16)))
    why = operators.check(operator_tables.base("scaled_mm"), EXECUTOR)
    assert why == "the kernel half: a later call returns the memory of the result"
    monkeypatch.setattr(operators, "_kernel_half", lambda c, device, a: (a["x"],))
    monkeypatch.setattr(operators, "_public", lambda c, a: (a["x"],))
    assert operators._shared(OperatorCase("quantize", (5,), 40), lambda a: (), {"x": kept[0]}, (kept[0][1:],)) == (
        "a result lies in the memory of an operand"
    )


def test_gradient_that_is_not_defined_is_caught(monkeypatch):
    case = replace(operator_tables.base("quantize"), requires_grad="x")
    assert operators.check(case, EXECUTOR) is None
    monkeypatch.setattr(ops, "quantize", lambda x: (torch.ops.int8kit.quantize(x)[0], x.abs().amax(1) / 127.0))
    assert operators.check(case, EXECUTOR) == ("the CPU half: the operator gives x a gradient, which is not defined")


def test_narrowed_number_of_rows_is_caught(monkeypatch):
    case = operator_tables.base("linear")
    arguments = operators.arguments(case, "cpu")
    assert operators._narrowed(case, arguments) is None
    monkeypatch.setattr(ops, "int8_linear", lambda x, wq, *_, **__: x.new_empty(int(x.shape[0]), wq.shape[0]))
    assert operators._narrowed(case, arguments).startswith("the fake kernel narrows a number of rows: ")


def test_operand_that_one_half_takes_is_caught(monkeypatch):
    case = OperatorCase("quantize", (5,), 40, wrong="x", fault="dtype")
    for name, words in (("_public", "the CPU half"), ("_fake", "the fake kernel")):
        with monkeypatch.context() as patch:
            patch.setattr(operators, name, lambda *_: ())
            if name == "_fake":
                with pytest.raises(ShapeError):
                    operators._public(case, operators.arguments(case, "cpu"))
            assert operators.check(case, EXECUTOR) == f"{words} took it, expected ShapeError"
