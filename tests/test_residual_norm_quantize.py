"""kernels/residual_norm_quantize.py on the present executor, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import given
from kernel_helpers import EXECUTOR, MANY, assert_equal, assert_equals_reference, operands

from int8kit import reference
from int8kit.errors import ShapeError
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize
from int8kit.verify.examples.strategies import FLOAT_KINDS
from int8kit.verify.properties import row_kernels

NAME = "residual_norm_quantize"
pytestmark = pytest.mark.usefixtures("quiet_interpreter")


@pytest.mark.slow
@MANY
@given(row_kernels.examples(NAME))
def test_equals_the_reference(f):
    assert row_kernels.check(f, EXECUTOR) is None


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    assert_equals_reference(NAME, *operands(NAME, 4, 4608, images=2, kind=kind, seed=1))


def test_output_equals_the_norm_of_the_stored_residual():
    """q and s equal those of `rms_norm_quantize` on the stored residual: it is rounded once, before the norm."""
    args = operands(NAME, 6, 416, images=2, seed=3)
    new, q, s = residual_norm_quantize(*args)
    assert_equal((q, s), reference.rms_norm_quantize(new, args[4], args[5]))


def test_zero_gate_keeps_the_residual():
    args = list(operands(NAME, 6, 416, seed=3))
    args[3] = torch.zeros_like(args[3])
    assert torch.equal(residual_norm_quantize(*args)[0], args[0])


def test_empty():
    args = operands(NAME, 6, 416, seed=3)
    got = residual_norm_quantize(args[0][:0], args[1][:0], *args[2:])
    assert [t.shape for t in got] == [(0, 416), (0, 416), (0,)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({1: torch.zeros(2, 7)}, r"branch .*\[2, 8\]"),
        ({2: torch.zeros(7)}, "branch_weight"),
        ({3: torch.zeros(3, 8)}, "gate .*a divisor of M = 2"),
        ({5: torch.zeros(2, 8)}, r"modulation .*\[1, 8\]"),
        ({4: torch.zeros(8, dtype=torch.int8)}, "weight torch.int8"),
    ],
)
def test_error_names_the_argument(changed, reason):
    valid = [torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(8), torch.zeros(1, 8), torch.zeros(8), torch.zeros(1, 8)]
    with pytest.raises(ShapeError, match=reason):
        residual_norm_quantize(*(changed.get(i, t) for i, t in enumerate(valid)))
