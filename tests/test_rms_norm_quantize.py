"""kernels/rms_norm_quantize.py in whatever executes here, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from int8kit import reference
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize
from int8kit.kernels.rows import CHUNKS, RowTile
from int8kit.spec import ConfigError, ShapeError
from int8kit.verify.bits import difference
from int8kit.verify.strategies import FLOAT_KINDS, OUT_DTYPES, float_matrix, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("quiet_interpreter")


def vectors(count, k, seed, dtype):
    """[count, k] around zero, as modulations and gates are, and as weights minus one are."""
    return (torch.randn(count, k, generator=torch.Generator().manual_seed(seed)) * 0.5).to(dtype).to(DEVICE)


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert difference(a, b) is None


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=rows(5000),
    tile=st.sampled_from([None, *(RowTile(chunk, chunk // 256) for chunk in CHUNKS[:4])]),
    dtype=st.sampled_from(OUT_DTYPES),
    has_weight=st.booleans(),
    images=st.sampled_from([0, 1, 2]),
)
def test_equals_the_reference(case, tile, dtype, has_weight, images):
    m = case.m * max(images, 1)
    x = float_matrix(m, case.k + case.padding, case.kind, case.seed, case.dtype, DEVICE)[:, : case.k]
    weight = vectors(1, case.k, case.seed, dtype)[0] + 1 if has_weight else None
    modulation = vectors(images, case.k, case.seed + 1, dtype) if images else None
    got = rms_norm_quantize(x, weight, modulation, 1e-5, tile=tile)
    assert_equal(got, reference.rms_norm_quantize(x, weight, modulation, 1e-5))


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    x = float_matrix(4, 4608, kind, 1, torch.bfloat16, DEVICE)
    weight, modulation = vectors(1, 4608, 1, torch.bfloat16)[0] + 1, vectors(2, 4608, 2, torch.bfloat16)
    assert_equal(rms_norm_quantize(x, weight, modulation), reference.rms_norm_quantize(x, weight, modulation))


def test_is_the_norm():
    """Against the plain formula in float64: within half a step of the quantization, and the rounding of fp32."""
    x, weight = torch.randn(8, 700).bfloat16(), torch.randn(700)
    modulation = torch.randn(2, 700)
    q, s = reference.rms_norm_quantize(x, weight, modulation, 1e-5)
    d = x.double()
    y = (
        d
        / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        * weight
        * (1 + modulation.double().repeat_interleave(4, 0))
    )
    assert ((q * s[:, None].double() - y).abs() <= s[:, None].double() * (0.5 + 1e-4)).all()


def test_rows_without_a_number_stay_without():
    x = torch.randn(4, 300, device=DEVICE)
    x[1, 7], x[2, 8] = float("nan"), float("inf")
    q, s = rms_norm_quantize(x)
    assert s.isnan().tolist() == [False, True, True, False]
    assert (q[1:3] == 0).all()


def test_zero_rows_and_empty():
    q, s = rms_norm_quantize(torch.zeros(2, 300, device=DEVICE))
    assert (q == 0).all()
    assert (s == 0).all()
    assert [t.shape for t in rms_norm_quantize(torch.zeros(0, 300, device=DEVICE))] == [(0, 300), (0,)]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((torch.zeros(3, 4, dtype=torch.float64),), "float64"),
        ((torch.zeros(4, 3).t(),), "the last must be 1"),
        ((torch.zeros(3, 20000),), "K = 20000"),
        ((torch.zeros(3, 4), torch.zeros(5)), r"weight .*\[4\]"),
        ((torch.zeros(3, 4), None, torch.zeros(2, 4)), "a divisor of M = 3"),
        ((torch.zeros(3, 4), None, torch.zeros(1, 5)), r"legal is \[B, 4\]"),
    ],
)
def test_refuses_by_name(args, reason):
    with pytest.raises(ShapeError, match=reason):
        rms_norm_quantize(*args)


def test_refuses_a_tile_wider_than_the_order():
    with pytest.raises(ConfigError, match="at most 2048"):
        rms_norm_quantize(torch.zeros(3, 4), tile=RowTile(4096, 16))
