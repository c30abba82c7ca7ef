"""kernels/residual_norm_quantize.py in whatever executes here, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from int8kit import reference
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize
from int8kit.kernels.rows import CHUNKS, RowTile
from int8kit.spec import ShapeError
from int8kit.verify.bits import difference
from int8kit.verify.strategies import FLOAT_KINDS, OUT_DTYPES, float_matrix, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("quiet_interpreter")


def operands(m, k, kind, seed, dtype, vector_dtype, images, padding=0):
    """The six tensors; branch of the kind, residual of it or ordinary by the seed's parity."""
    branch = float_matrix(m, k + padding, kind, seed, dtype, DEVICE)[:, :k]
    residual = float_matrix(m, k + padding, kind if seed % 2 else "normal", seed + 1, dtype, DEVICE)[:, :k]
    g = torch.Generator().manual_seed(seed)
    gate, modulation = (torch.randn(2, images, k, generator=g) * 0.5).to(vector_dtype).to(DEVICE)
    weights = (torch.randn(2, k, generator=g) * 0.5 + 1).to(vector_dtype).to(DEVICE)
    return residual, branch, weights[0], gate.tanh(), weights[1], modulation


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert difference(a, b) is None


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=rows(5000),
    tile=st.sampled_from([None, *(RowTile(chunk, chunk // 256) for chunk in CHUNKS[:4])]),
    dtype=st.sampled_from(OUT_DTYPES),
    images=st.sampled_from([1, 2]),
)
def test_equals_the_reference(case, tile, dtype, images):
    args = operands(case.m * images, case.k, case.kind, case.seed, case.dtype, dtype, images, case.padding)
    assert_equal(residual_norm_quantize(*args, 1e-5, tile=tile), reference.residual_norm_quantize(*args, 1e-5))


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    args = operands(4, 4608, kind, 1, torch.bfloat16, torch.bfloat16, 2)
    assert_equal(residual_norm_quantize(*args), reference.residual_norm_quantize(*args))


def test_is_the_next_kernels_input():
    """q and s are those of `rms_norm_quantize` of what was stored: rounded once, and read back the same."""
    args = operands(6, 416, "normal", 3, torch.bfloat16, torch.bfloat16, 2)
    new, q, s = residual_norm_quantize(*args)
    assert_equal((q, s), reference.rms_norm_quantize(new, args[4], args[5]))


def test_a_shut_gate_leaves_the_residual():
    args = list(operands(6, 416, "normal", 3, torch.bfloat16, torch.bfloat16, 1))
    args[3] = torch.zeros_like(args[3])
    assert torch.equal(residual_norm_quantize(*args)[0], args[0])


def test_empty():
    args = operands(2, 300, "normal", 0, torch.bfloat16, torch.bfloat16, 1)
    got = residual_norm_quantize(args[0][:0], args[1][:0], *args[2:])
    assert [t.shape for t in got] == [(0, 300), (0, 300), (0,)]


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
