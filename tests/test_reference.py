"""reference.py against exact arithmetic: Python's integers and fractions."""

from fractions import Fraction

import pytest
import torch

from int8kit import reference
from int8kit.errors import ShapeError
from int8kit.verify.examples.strategies import FLOAT_KINDS, float_matrix


def _round(value: Fraction) -> int:
    return round(value)  # ties to even, exactly


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_quantize_against_fractions(kind, dtype):
    x = float_matrix(4, 40, kind, 1, dtype, "cpu")
    q, s = reference.quantize(x)
    for row in range(4):
        values = x[row].float()
        if not values.isfinite().all():
            assert s[row].isnan()
            assert (q[row] == 0).all()
            continue
        amax = float(values.abs().max())
        assert float(s[row]) == float(torch.tensor(amax, dtype=torch.float64).div(127).float())
        if float(s[row]) == 0:
            assert (q[row] == 0).all()
            continue
        for value, got in zip(values.tolist(), q[row].tolist(), strict=True):
            quotient = Fraction(value) / Fraction(float(s[row]))
            single = Fraction(float(torch.tensor(float(quotient), dtype=torch.float32)))  # one rounding, to float32
            assert got == max(-127, min(127, _round(single)))


def test_zero_rows_give_exactly_the_bias():
    xq, sx = reference.quantize(torch.zeros(3, 16))
    wq, sw = reference.quantize(torch.randn(5, 16))
    bias = torch.randn(5)
    y = reference.scaled_mm(xq, wq, sx, sw, bias, out_dtype=torch.float32)
    assert torch.equal(y, bias.expand(3, 5))


def test_nan_affects_only_its_row():
    x = torch.randn(3, 16)
    x[1, 5] = torch.nan
    y = reference.linear(x, *reference.quantize(torch.randn(5, 16)))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_accumulate_against_python_integers():
    x = torch.randint(-128, 128, (3, 50), dtype=torch.int8)
    w = torch.randint(-128, 128, (4, 50), dtype=torch.int8)
    want = [[sum(a * b for a, b in zip(r, c, strict=True)) for c in w.tolist()] for r in x.tolist()]
    assert reference.accumulate(x, w).tolist() == want
    assert torch.equal(reference.accumulate(x, w), torch._int_mm(x, w.t()))


def test_accumulate_at_the_limit_of_int32():
    x = torch.full((1, 131071), -128, dtype=torch.int8)
    assert reference.accumulate(x, x).item() == 128 * 128 * 131071
    with pytest.raises(ShapeError, match="131072"):
        reference.accumulate(torch.zeros(1, 131072, dtype=torch.int8), torch.zeros(1, 131072, dtype=torch.int8))


def test_epilogue_rounds_each_step():
    """A case in which an FMA, another order, or multiplying the scales first would give another float32."""
    acc = torch.tensor([[2**24 + 1, 16777219, -123456789]], dtype=torch.int32)
    sx, sw = torch.tensor([0.0073]), torch.tensor([0.0031, 0.0017, 0.0091])
    bias = torch.tensor([-161.3, 208.2, 8201.77])
    got = reference.dequantize(acc, sx, sw, bias, torch.float32)

    def single(value: Fraction) -> Fraction:
        return Fraction(float(torch.tensor(float(value), dtype=torch.float32)))

    for i in range(3):
        a = single(Fraction(int(acc[0, i])))
        y = single(single(a * Fraction(float(sx[0]))) * Fraction(float(sw[i])))
        assert Fraction(float(got[0, i])) == single(y + Fraction(float(bias[i])))
