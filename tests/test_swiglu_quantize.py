"""kernels/swiglu_quantize.py and activations.py in whatever executes here, bit for bit; and how good our silu is."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from int8kit import reference
from int8kit.errors import ShapeError
from int8kit.kernels.row_primitives import CHUNKS, RowTile
from int8kit.kernels.swiglu_quantize import swiglu_quantize
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples.strategies import FLOAT_KINDS, float_matrix, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("quiet_interpreter")


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert bitwise_diff(a, b) is None


def ulps(g):
    """Errors of `reference.silu` in units in the last place of the true value, a unit being at least 2**-149."""
    truth = g.double() / (1 + torch.exp(-g.double()))
    unit = torch.exp2(torch.frexp(truth)[1].clamp(min=-125).double() - 24)
    return (reference.silu(g).double() - truth).abs() / unit


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=rows(5000),
    scale=st.sampled_from([1.0, 30.0]),
    tile=st.sampled_from([None, *(RowTile(chunk, max(1, chunk // 256)) for chunk in CHUNKS)]),
)
def test_equals_the_reference(case, scale, tile):
    gu = float_matrix(case.m, 2 * case.k + case.padding, case.kind, case.seed, case.dtype, DEVICE)[:, : 2 * case.k]
    gu = gu * scale if case.padding == 0 else gu
    assert_equal(swiglu_quantize(gu, tile=tile), reference.swiglu_quantize(gu))


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    gu = float_matrix(3, 24576, kind, 1, torch.bfloat16, DEVICE)
    assert_equal(swiglu_quantize(gu), reference.swiglu_quantize(gu))


def test_every_bf16_gate():
    """All 65536 gates beside an up of one, so that s and q show them all; the gates that are no numbers apart."""
    gates = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    for part in (gates[gates.abs() <= 100], gates[gates.abs() > 100], gates[~(gates.abs() <= 100)]):
        rest = torch.nn.functional.pad(part, (0, -len(part) % 1024)).view(-1, 1024)
        gu = torch.stack((rest, torch.ones_like(rest)), -1).flatten(1)
        assert_equal(swiglu_quantize(gu), reference.swiglu_quantize(gu))


def test_columns_are_interleaved():
    gu = torch.zeros(1, 8)
    gu[0, 4], gu[0, 5] = 3.0, 2.0
    q, s = reference.swiglu_quantize(gu)
    assert q[0].tolist() == [0, 0, 127, 0]
    assert s.item() * 127 == pytest.approx(6 / (1 + 2.718281828**-3))


@pytest.mark.parametrize("low", [-86.0, -20.0, -5.0, -1.0, -0.01, 1e-30, 0.01, 1.0, 5.0, 20.0, 86.0])
def test_silu_is_within_four_ulp(low):
    high = {
        -86.0: -20,
        -20.0: -5,
        -5.0: -1,
        -1.0: -0.01,
        -0.01: -1e-30,
        1e-30: 0.01,
        0.01: 1,
        1.0: 5,
        5.0: 20,
        20.0: 86,
    }
    g = torch.empty(1 << 20).uniform_(low, high.get(low, 1e30), generator=torch.Generator().manual_seed(0))
    assert ulps(g).max() < 4


def test_silu_of_every_bf16_number_from_minus_86_on():
    g = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    assert ulps(g[g.isfinite() & (g >= -86)]).max() < 4


def test_silu_at_the_extremes():
    inf = float("inf")
    floor = reference.silu(torch.tensor(-86.0))
    assert -4e-36 < floor < 0
    deep = torch.tensor([-87.0, -100.0, -3e38, -inf])
    assert (reference.silu(deep) == floor).all()  # the truth lies between this and zero
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
        (torch.zeros(4, 3).t(), "the last must be 1"),
        (torch.zeros(1, 40000), "K = 20000"),
    ],
)
def test_refuses_by_name(gu, reason):
    with pytest.raises(ShapeError, match=reason):
        swiglu_quantize(gu)
