"""kernels/rms_norm_quantize.py on the present executor, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import given
from kernel_helpers import DEVICE, EXECUTOR, MANY, assert_equals_reference, operands

from int8kit import reference
from int8kit.errors import ConfigError, ShapeError
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize
from int8kit.kernels.row_primitives import RowTile
from int8kit.verify.examples.strategies import FLOAT_KINDS
from int8kit.verify.properties import row_kernels

pytestmark = pytest.mark.usefixtures("quiet_interpreter")


@pytest.mark.slow
@MANY
@given(row_kernels.examples("rms_norm_quantize"))
def test_equals_the_reference(f):
    assert row_kernels.check(f, EXECUTOR) is None


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    args = operands("rms_norm_quantize", 4, 4608, images=2, kind=kind, seed=1)
    assert_equals_reference("rms_norm_quantize", *args)


def test_is_near_the_formula_in_float64():
    """Within half a quantization step, plus the rounding errors of fp32."""
    x, weight = torch.randn(8, 700).bfloat16(), torch.randn(700)
    modulation = torch.randn(2, 700)
    q, s = reference.rms_norm_quantize(x, weight, modulation, 1e-5)
    d = x.double()
    normalized = d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = normalized * weight * (1 + modulation.double().repeat_interleave(4, 0))
    assert ((q * s[:, None].double() - y).abs() <= s[:, None].double() * (0.5 + 1e-4)).all()


def test_nan_and_inf_affect_only_their_row():
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
        ((torch.zeros(4, 3).t(),), "strides"),
        ((torch.zeros(3, 20000),), "K = 20000"),
        ((torch.zeros(3, 4), torch.zeros(5)), r"weight .*\[4\]"),
        ((torch.zeros(3, 4), None, torch.zeros(2, 4)), "a divisor of M = 3"),
        ((torch.zeros(3, 4), None, torch.zeros(1, 5)), r"\[B, 4\]"),
    ],
)
def test_error_names_the_argument(args, reason):
    with pytest.raises(ShapeError, match=reason):
        rms_norm_quantize(*args)


def test_refuses_a_tile_wider_than_the_block_of_the_sum():
    with pytest.raises(ConfigError, match="at most 2048"):
        rms_norm_quantize(torch.zeros(3, 4), tile=RowTile(4096, 16))
