"""kernels/quantize.py on the present executor."""

import pytest
import torch
from kernel_helpers import DEVICE, assert_equal

from int8kit import reference
from int8kit.errors import ShapeError
from int8kit.kernels.quantize import quantize
from int8kit.verify.examples.strategies import FLOAT_KINDS, float_matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", FLOAT_KINDS)
@pytest.mark.parametrize("k", [1, 416, 17000])
def test_equals_the_reference(kind, dtype, k):
    x = float_matrix(3, k, kind, 2, dtype, DEVICE)
    assert_equal(quantize(x), reference.quantize(x))


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
        (torch.zeros(3), r"\[M, K\]"),
        (torch.zeros(4, 3).t(), "strides"),
    ],
)
def test_error_names_the_argument(x, reason):
    with pytest.raises(ShapeError, match=reason):
        quantize(x)


def test_tensors_to_write_into_are_checked():
    x = torch.randn(3, 8, device=DEVICE)
    q, s = torch.empty(3, 8, dtype=torch.int8, device=DEVICE), torch.empty(3, device=DEVICE)
    assert quantize(x, (q, s))[0] is q
    wide = torch.empty(3, 16, dtype=torch.int8, device=DEVICE)
    for wrong, reason in (
        ((q.short(), s), r"expected int8 \[3, 8\] and float32 \[3\]"),
        ((q, s[:2]), r"expected int8 \[3, 8\] and float32 \[3\]"),
        ((wide[:, ::2], s), r"q has strides \(16, 2\)"),
        ((q.to("meta"), s), r"out on meta, \w+(:0)?: expected both on"),
        ((q, s.to("meta")), r"out on \w+(:0)?, meta: expected both on"),
    ):
        with pytest.raises(ShapeError, match=reason):
            quantize(x, wrong)
