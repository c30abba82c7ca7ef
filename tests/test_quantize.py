"""kernels/quantize.py in whatever executes here."""

import pytest
import torch

from int8kit import reference
from int8kit.errors import ShapeError
from int8kit.kernels.quantize import quantize
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples.strategies import FLOAT_KINDS, float_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", FLOAT_KINDS)
@pytest.mark.parametrize("k", [1, 416, 17000])
def test_equals_the_reference(kind, dtype, k):
    x = float_matrix(3, k, kind, 2, dtype, DEVICE)
    for got, want in zip(quantize(x), reference.quantize(x), strict=True):
        assert bitwise_diff(got, want) is None


def test_never_gives_minus_128():
    q, _ = quantize(torch.linspace(-1, 1, 4096, device=DEVICE)[None])
    assert q.min() == -127


def test_reads_rows_of_a_wider_matrix():
    x = torch.randn(4, 100, device=DEVICE)[:, :33]
    assert torch.equal(quantize(x)[0], reference.quantize(x)[0])


def test_empty():
    q, s = quantize(torch.empty(0, 7, device=DEVICE))
    assert (q.shape, s.shape) == ((0, 7), (0,))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(3, 4, dtype=torch.float64), "float64"),
        (torch.zeros(3), r"legal is \[M, K\]"),
        (torch.zeros(4, 3).t(), "the last must be 1"),
    ],
)
def test_refuses_by_name(x, reason):
    with pytest.raises(ShapeError, match=reason):
        quantize(x)
