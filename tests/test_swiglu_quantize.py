"""kernels/swiglu_quantize.py and activations.py on the present executor, bit for bit; accuracy of the silu."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from kernel_helpers import DEVICE, EXECUTOR, MANY, assert_equals_reference

from int8kit import reference
from int8kit.errors import ShapeError
from int8kit.kernels.swiglu_quantize import swiglu_quantize
from int8kit.verify.examples.strategies import FLOAT_KINDS, float_matrix
from int8kit.verify.properties import row_kernels

pytestmark = pytest.mark.usefixtures("quiet_interpreter")


def ulps(g):
    """Errors of `reference.silu` in units in the last place of the true value, with a unit of at least 2**-149."""
    truth = g.double() / (1 + torch.exp(-g.double()))
    unit = torch.exp2(torch.frexp(truth)[1].clamp(min=-125).double() - 24)
    return (reference.silu(g).double() - truth).abs() / unit


@MANY
@given(row_kernels.examples("swiglu_quantize", 5000))
def test_equals_the_reference(f):
    assert row_kernels.check(f, EXECUTOR) is None


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    gu = float_matrix(3, 24576, kind, 1, torch.bfloat16, DEVICE)
    assert_equals_reference("swiglu_quantize", gu)


def test_every_bf16_gate():
    """All 65536 gates with up = 1. Small, large and NaN gates are in separate rows, so that s and q show each."""
    gates = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    for part in (gates[gates.abs() <= 100], gates[gates.abs() > 100], gates[~(gates.abs() <= 100)]):
        rest = torch.nn.functional.pad(part, (0, -len(part) % 1024)).view(-1, 1024)
        gu = torch.stack((rest, torch.ones_like(rest)), -1).flatten(1)
        assert_equals_reference("swiglu_quantize", gu)


def test_columns_are_interleaved():
    gu = torch.zeros(1, 8)
    gu[0, 4], gu[0, 5] = 3.0, 2.0
    q, s = reference.swiglu_quantize(gu)
    assert q[0].tolist() == [0, 0, 127, 0]
    assert s.item() * 127 == pytest.approx(6 / (1 + 2.718281828**-3))


NEGATIVE = pairwise([-86.0, -20.0, -5.0, -1.0, -0.01, -1e-30])
POSITIVE = pairwise([1e-30, 0.01, 1.0, 5.0, 20.0, 86.0, 1e30])


@pytest.mark.parametrize(("low", "high"), [*NEGATIVE, *POSITIVE])
def test_silu_is_within_four_ulp(low, high):
    g = torch.empty(1 << 20).uniform_(low, high, generator=torch.Generator().manual_seed(0))
    assert ulps(g).max() < 4


def test_silu_of_every_bf16_number_from_minus_86():
    g = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    assert ulps(g[g.isfinite() & (g >= -86)]).max() < 4


def test_silu_at_the_extremes():
    inf = float("inf")
    floor = reference.silu(torch.tensor(-86.0))
    assert -4e-36 < floor < 0
    deep = torch.tensor([-87.0, -100.0, -3e38, -inf])
    assert (reference.silu(deep) == floor).all()  # the true value lies between this and zero
    got = reference.silu(torch.tensor([inf, 3e38, 0.0, -0.0, float("nan")]))
    assert got[:4].tolist() == [inf, torch.tensor(3e38).item(), 0.0, 0.0]
    assert got[3].signbit()
    assert got[4].isnan()


def test_empty():
    assert [t.shape for t in swiglu_quantize(torch.zeros(0, 300, device=DEVICE))] == [(0, 150), (0,)]


@pytest.mark.parametrize(
    ("gu", "reason"),
    [
        (torch.zeros(3, 5), r"\[M, 2 F\]"),
        (torch.zeros(3, 4, dtype=torch.int8), "int8"),
        (torch.zeros(4, 3).t(), "strides"),
        (torch.zeros(1, 40000), "K = 20000"),
    ],
)
def test_error_names_the_argument(gu, reason):
    with pytest.raises(ShapeError, match=reason):
        swiglu_quantize(gu)
