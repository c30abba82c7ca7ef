"""kernels/rms_norm_quantize.py in whatever executes here, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from int8kit import gpus, reference
from int8kit.errors import ConfigError, ShapeError
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize
from int8kit.kernels.row_primitives import RowTile
from int8kit.verify import executors
from int8kit.verify.examples.strategies import FLOAT_KINDS
from int8kit.verify.properties import row_kernels
from int8kit.verify.properties.row_kernels import Fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]
pytestmark = pytest.mark.usefixtures("quiet_interpreter")


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row_kernels.examples("rms_norm_quantize"))
def test_equals_the_reference(f):
    assert row_kernels.check(f, EXECUTOR) is None


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    f = Fused("rms_norm_quantize", 2, 2, 4608, kind, 1, torch.bfloat16, torch.bfloat16)
    assert row_kernels.check(f, EXECUTOR) is None


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
