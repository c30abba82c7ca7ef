"""verify/properties/operators.py: a case for every torch operator, and faults of each half."""

import pytest
import torch
from kernel_helpers import EXECUTOR

from int8kit import operand_checks, ops, reference
from int8kit.errors import ShapeError
from int8kit.kernels import gemm
from int8kit.spec import K_MAX
from int8kit.verify.properties import operator_tables, operators
from int8kit.verify.properties.operators import PLANS, PRODUCTS, OperatorCase
from int8kit.verify.runner import forbid_fallback

pytestmark = pytest.mark.usefixtures("quiet_interpreter")
CASES = list(operator_tables.always())
CPU_REFUSES = (
    *(("rms_norm_quantize", "modulation", "images"), ("residual_norm_quantize", "modulation", "images")),
    *(("residual_norm_quantize", "gate", "images"), ("qk_norm_rope", "cos", "images")),
    *(("qk_norm_rope", "qkv", "shape"), ("qk_norm_rope", "heads", "shape")),
    *((name, "wq", "odd n") for name in PRODUCTS if name.endswith("swiglu")),
    *((name, "wq", "largest k") for name in PRODUCTS),
)
"""Operator, operand and fault for which the reference itself promises ShapeError."""


def test_every_operator_has_cases():
    assert {c.operator for c in CASES} == set(ops.OPERATORS) == set(operators.PUBLIC)
    for operator in ops.OPERATORS:
        own = [c for c in CASES if c.operator == operator]
        assert len({(c.dtype, c.vectors) for c in own}) == 9
        names = {name for name, v in operators.arguments(own[0], "cpu").items() if isinstance(v, torch.Tensor)}
        assert names <= {c.wrong for c in own}
        assert any(not c.contiguous for c in own)
        assert (0,) in {c.rows for c in own} or operator in ("linear", "linear_swiglu")
        if operator in PRODUCTS:
            assert {c.plan for c in own} == set(range(len(PLANS)))
    assert {(c.operator, c.wrong, c.fault) for c in CASES} >= set(CPU_REFUSES)


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_base_case_holds(operator):
    with forbid_fallback():
        assert operators.check(operator_tables.base(operator), EXECUTOR) is None


def test_operator_without_a_case_is_noticed(monkeypatch):
    monkeypatch.setitem(ops.OPERATORS, "another", ops.OPERATORS["quantize"])
    with pytest.raises(KeyError, match="another"):
        [operators.PUBLIC[c.operator] for c in operator_tables.always()]


def test_plans_choose_several_configurations():
    """Else a constant configuration would pass."""
    chosen = {
        PLANS[c.plan].choose(operators.GemmShape(*c.rows, c.n, c.k))
        for c in CASES if c.operator == "scaled_mm" and len(c.rows) == 1 and c.rows[0] and not c.wrong
    }  # fmt: skip
    assert len(chosen) >= 5


@pytest.mark.parametrize(
    ("name", "broken", "case", "words"),
    [
        ("_choose", lambda *_: operators.PLANS[1].candidates[2].config,
         OperatorCase("scaled_mm", (5,), 40, plan=1), "AssertionError: launched ['32x32x32"),
        ("int8_linear", lambda x, wq, sw, bias=None, **_: reference.linear(x, wq, sw),
         OperatorCase("linear", (5,), 40), "the CPU half: result 0: "),
        ("quantize", lambda x: (x.new_empty(x.shape), x.new_empty(x.shape[:1])),
         OperatorCase("quantize", (5,), 40), "the CPU half: result 0: dtype torch.float32, expected torch.int8"),
    ],
)  # fmt: skip
def test_faults_of_a_half_are_caught(monkeypatch, name, broken, case, words):
    monkeypatch.setattr(ops, name, broken)
    try:
        why = operators.check(case, EXECUTOR)
    except AssertionError as error:
        why = f"AssertionError: {error}"
    assert why.startswith(words), why


def test_fault_of_a_fake_kernel_is_caught(monkeypatch):
    case = OperatorCase("quantize", (5,), 40)
    whole = operators._fake
    monkeypatch.setattr(operators, "_fake", lambda c, a: tuple(t.double() for t in whole(c, a)))
    assert operators.check(case, EXECUTOR).startswith("the fake kernel beside the CPU half: result 0: dtype")


def test_operand_that_is_taken_or_raises_another_error_is_caught(monkeypatch):
    case = OperatorCase("scaled_mm", (5,), 40, wrong="sw", fault="dtype")
    assert operators.check(case, EXECUTOR) is None
    with monkeypatch.context() as patch:
        patch.setattr(operators, "_kernel_half", lambda *_: ())
        assert operators._refusal(case, EXECUTOR) == "the kernel half took it, expected ShapeError"

    def raises(*_, **__):
        raise ValueError("planted")

    monkeypatch.setattr(gemm, "scaled_mm", raises)
    assert "raised ValueError: planted; expected ShapeError" in operators.check(case, EXECUTOR)


def test_reference_refuses_where_the_table_says():
    for operator, wrong, fault in CPU_REFUSES:
        case = next(c for c in CASES if (c.operator, c.wrong, c.fault) == (operator, wrong, fault))
        with pytest.raises(ShapeError):
            operators._public(case, operators.arguments(case, "cpu"))


def _changed_half(monkeypatch, change):
    """Let `operators._public` return `change(arguments, results)` for real tensors."""
    whole = operators._public

    def broken(c, a):
        results = whole(c, a)
        return results if isinstance(a["x"], torch._subclasses.FakeTensor) else change(a, results)

    monkeypatch.setattr(operators, "_public", broken)
    return operators.check(operator_tables.base("quantize"), EXECUTOR)


def test_an_operand_that_is_written_is_caught(monkeypatch):
    why = _changed_half(monkeypatch, lambda a, results: (a["x"].neg_(), results)[1])
    assert "the operand x was written" in why


def test_a_result_in_kept_memory_is_caught(monkeypatch):
    kept = []

    def same_memory(a, results):
        kept[:] = kept or results
        return tuple(old.copy_(new) for old, new in zip(kept, results, strict=True))

    assert "a later call returns the memory of the result" in _changed_half(monkeypatch, same_memory)


def test_a_fake_kernel_that_narrows_the_rows_is_caught(monkeypatch):
    whole = operators._public
    monkeypatch.setattr(operators, "_public", lambda c, a: (bool(len(a["x"]) > 2), whole(c, a))[1])
    why = operators.check(operator_tables.base("quantize"), EXECUTOR)
    assert "the fake kernel narrows a number of rows" in why


def _refuses_rows_apart(name, v, m, k):
    if not v.is_contiguous():
        raise ShapeError(name)


@pytest.mark.parametrize(
    ("check", "narrower", "operator"),
    [
        ("K_MAX_HELD", 16383, "rms_norm_quantize"),
        ("HEAD_DIMS", (16, 32, 64, 128), "qk_norm_rope"),
        ("HEAD_DIMS", (32, 64, 128, 256), "qk_norm_rope"),
        ("_is_apart", lambda x: x.stride(-1) != 1, "scaled_mm"),
        ("_is_apart", lambda x: x.stride(-1) != 1, "linear"),
        ("_images", _refuses_rows_apart, "residual_norm_quantize"),
    ],
)
def test_a_check_that_refuses_the_last_legal_operand_is_caught(monkeypatch, check, narrower, operator):
    cases = [c for c in operator_tables._limits(operator_tables.base(operator)) if c.k < K_MAX]
    assert [why for c in cases if (why := operators.check(c, EXECUTOR))] == []
    monkeypatch.setattr(operand_checks, check, narrower)
    with pytest.raises(ShapeError):
        [operators.check(case, EXECUTOR) for case in cases]
