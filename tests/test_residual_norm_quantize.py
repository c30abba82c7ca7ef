"""kernels/residual_norm_quantize.py in whatever executes here, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from int8kit import gpus, reference
from int8kit.errors import ShapeError
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize
from int8kit.verify import executors
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples.strategies import FLOAT_KINDS
from int8kit.verify.properties import row_kernels
from int8kit.verify.properties.row_kernels import Fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]
pytestmark = pytest.mark.usefixtures("quiet_interpreter")


def operands(images):
    """Of 6 rows of 416, and eps."""
    f = Fused("residual_norm_quantize", images, 6 // images, 416, "normal", 3, torch.bfloat16, torch.bfloat16)
    return row_kernels.operands(f, DEVICE)


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert bitwise_diff(a, b) is None


@pytest.mark.slow
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row_kernels.examples("residual_norm_quantize"))
def test_equals_the_reference(f):
    assert row_kernels.check(f, EXECUTOR) is None


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    f = Fused("residual_norm_quantize", 2, 2, 4608, kind, 1, torch.bfloat16, torch.bfloat16)
    assert row_kernels.check(f, EXECUTOR) is None


def test_is_the_next_kernels_input():
    """q and s are those of `rms_norm_quantize` of what was stored: rounded once, and read back the same."""
    args = operands(2)
    new, q, s = residual_norm_quantize(*args)
    assert_equal((q, s), reference.rms_norm_quantize(new, args[4], args[5]))


def test_a_shut_gate_leaves_the_residual():
    args = list(operands(1))
    args[3] = torch.zeros_like(args[3])
    assert torch.equal(residual_norm_quantize(*args)[0], args[0])


def test_empty():
    args = operands(1)
    got = residual_norm_quantize(args[0][:0], args[1][:0], *args[2:])
    assert [t.shape for t in got] == [(0, 416), (0, 416), (0,)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({1: torch.zeros(2, 7)}, r"branch .*legal is \[2, 8\]"),
        ({2: torch.zeros(7)}, "branch_weight"),
        ({3: torch.zeros(3, 8)}, "gate .*a divisor of M = 2"),
        ({5: torch.zeros(2, 8)}, r"modulation .*legal is \[1, 8\]"),
        ({4: torch.zeros(8, dtype=torch.int8)}, "weight torch.int8"),
    ],
)
def test_refuses_by_name(changed, reason):
    legal = [torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(8), torch.zeros(1, 8), torch.zeros(8), torch.zeros(1, 8)]
    with pytest.raises(ShapeError, match=reason):
        residual_norm_quantize(*(changed.get(i, t) for i, t in enumerate(legal)))
