"""kernels/operands.py: tensors that do not fit are refused with the value, the expected value and often the remedy."""

import re

import pytest
import torch

from int8kit.errors import ShapeError
from int8kit.kernels.operands import Operands

M, N, K = 6, 4, 32


def operands(**change):
    valid = {
        "xq": torch.zeros(M, K, dtype=torch.int8),
        "wq": torch.zeros(N, K, dtype=torch.int8),
        "sx": torch.ones(M),
        "sw": torch.ones(N),
        "bias": torch.zeros(N),
        "out": torch.zeros(M, N),
    }
    return Operands(**valid | change)


def test_accepts_every_dtype_of_bias_and_output():
    for bias in (None, *(torch.zeros(N, dtype=t) for t in (torch.bfloat16, torch.float16, torch.float32))):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            made = operands(bias=bias, out=torch.zeros(M, N, dtype=dtype))
            assert (made.m, made.n, made.k) == (M, N, K)


def test_accepts_rows_of_wider_matrices_and_no_rows():
    wide = torch.zeros(M, 2 * K, dtype=torch.int8)
    assert operands(xq=wide[:, :K], wq=wide[:N, K:], out=torch.zeros(M, 9)[:, :N]).k == K
    assert operands(xq=wide[:0, :K], sx=torch.ones(0), out=torch.zeros(0, N)).m == 0


def test_accumulators_need_neither_scales_nor_bias():
    made = operands(sx=None, sw=None, bias=None, out=torch.zeros(M, N, dtype=torch.int32))
    assert made.vectors == (made.xq, made.xq, made.xq)


def test_swiglu_halves_the_columns():
    assert operands(swiglu=True, out=torch.zeros(M, N // 2)).n == N


INT8 = {"dtype": torch.int8}


@pytest.mark.parametrize(
    ("change", "value", "expected"),
    [
        ({"xq": torch.zeros(K, **INT8)}, "(32,)", "[M, K]"),
        ({"wq": torch.zeros(N, K + 1, **INT8)}, "(4, 33)", "[N, K]"),
        ({"xq": torch.zeros(M, K)}, "torch.float32", "quantize"),
        ({"wq": torch.zeros(N, K, dtype=torch.uint8)}, "torch.uint8", "torch.int8"),
        ({"sx": torch.ones(N)}, "sx (4,)", "[6]"),
        ({"sw": torch.ones(2 * N)[::2]}, "sw (4,)", "contiguous [4]"),
        ({"sw": torch.ones(N).double()}, "sw torch.float64", "torch.float32"),
        ({"bias": torch.zeros(N, dtype=torch.int32)}, "bias torch.int32", "torch.bfloat16"),
        ({"bias": torch.zeros(N, 1)}, "bias (4, 1)", "[4]"),
        ({"wq": torch.zeros(3, K, **INT8), "sw": torch.ones(3), "bias": None, "swiglu": True}, "N = 3", "even"),
        ({"swiglu": True}, "(6, 4)", "[6, 2]"),
        ({"out": torch.zeros(M, N + 1)}, "(6, 5)", "[6, 4]"),
        ({"out": torch.zeros(M, N, dtype=torch.int32)}, "torch.int32", "bf16, fp16 or fp32"),
        ({"out": torch.zeros(N, M).t()}, "out has strides (1, 6)", "contiguous"),
        ({"xq": torch.zeros(K, M, **INT8).t()}, "x has strides (1, 6)", "contiguous"),
        ({"sw": torch.ones(N, device="meta")}, "several devices", "move them"),
        (
            {"xq": torch.zeros(M, 131072, **INT8), "wq": torch.zeros(N, 131072, **INT8)},
            "K = 131072",
            "split the layer along K",
        ),
    ],
)
def test_error_names_the_value_and_the_expected_value(change, value, expected):
    with pytest.raises(ShapeError, match=f"{re.escape(value)}.*{re.escape(expected)}"):
        operands(**change)
