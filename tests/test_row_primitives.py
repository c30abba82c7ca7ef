"""kernels/row_primitives.py: tiles, the error bound of the mean of squares, and the quotient by FMAs."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from int8kit import reference
from int8kit.errors import ConfigError, ShapeError
from int8kit.kernels import row_primitives
from int8kit.kernels.row_primitives import RowTile

U = 2.0**-24


@pytest.mark.parametrize("k", [1, 7, 256, 257, 2048, 2049, 4608, 12288])
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_mean_of_squares_is_within_its_bound(k, spread):
    """Bound n u / (1 - n u) with n = ceil(K / 2048) + 12 roundings. The error of float64 is 2**-29 of it."""
    g = torch.Generator().manual_seed(k)
    x = torch.randn(64, k, generator=g) * torch.exp(spread * torch.rand(64, k, generator=g))
    truth = x.double().square().sum(-1) / k
    n = -(-k // 2048) + 12
    error = (reference.mean_square(x).double() - truth).abs() / truth
    assert error.max() <= n * U / (1 - n * U) * (1 + 1e-6)


def test_order_of_the_sum_depends_on_the_position_only():
    """Appended zeros change only the divisor, here by a power of two."""
    x = torch.randn(5, 1024)
    for width in (2048, 4096, 8192):
        wide = torch.nn.functional.pad(x, (0, width - 1024))
        assert torch.equal(reference.mean_square(x), reference.mean_square(wide) * (width // 1024))


def _fma(a, b, c):
    """a b + c in float32, with one rounding. Rounding the float64 sum to odd prevents a double rounding.

    Source: Boldo and Melquiond, Emulation of a FMA and Correctly Rounded Sums, 2008.
    """
    a, b, c = (np.asarray(t, np.float64) for t in (a, b, c))
    product = a * b  # exact: 48 bits
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64).copy()
    inexact = (error != 0) & (bits & 1 == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(inexact, toward, 0)).view(np.float64).astype(np.float32)


def test_emulated_fma_rounds_once():
    g = np.random.default_rng(0)
    for _ in range(2000):
        a, b = (np.float32(v) for v in g.standard_normal(2))
        c = np.float32(-float(a) * float(b) * (1 + g.standard_normal() * 2.0 ** -g.integers(0, 50)))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        got = Fraction(float(_fma(a, b, c)))
        near = np.float32(float(got))
        for other in (np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))):
            assert abs(exact - got) <= abs(exact - Fraction(float(other)))


@pytest.mark.parametrize("low", [-100, -60, 0, 100])
def test_quotient_by_fmas_equals_the_division(low):
    """The steps of `store_quantized` against IEEE division, mostly near ties. The interpreter has no FMA."""
    g = np.random.default_rng(low + 200)
    count = 1 << 20
    s = (g.uniform(1, 2, count) * 2.0 ** g.integers(low, low + 20, count)).astype(np.float32)
    # within 3 units in the last place of a half integer
    y = (s.astype(np.float64) * (g.integers(-127, 127, count) + 0.5)).astype(np.float32)
    y = (y.view(np.int32) + g.integers(-3, 4, count, dtype=np.int32)).view(np.float32)
    r = np.float32(1) / s
    with np.errstate(under="ignore"):
        rest = _fma(-s, r, np.float32(1)) * r
        q = _fma(y, r, y * rest)
        q = _fma(_fma(-s, q, y), r, q)
    assert np.array_equal(q, y / s)
    rounded = (q + np.float32(12582912)).view(np.int32).astype(np.int8)
    assert np.array_equal(rounded, np.rint(y / s).astype(np.int8))


def test_default_tiles():
    assert row_primitives.default_tile(4608) == RowTile(512, 2)
    assert row_primitives.default_tile(12288) == RowTile(1024, 4)
    assert row_primitives.default_tile(5120) == RowTile(512, 2)
    assert row_primitives.default_tile(1) == RowTile(256, 1)
    assert row_primitives.default_tile(16384 - 256) == RowTile(2048, 8)


@pytest.mark.parametrize("tile", [(500, 2), (128, 1), (8192, 8), (512, 3), (512, 32)])
def test_refuses_tiles(tile):
    with pytest.raises(ConfigError, match="chunk"):
        RowTile(*tile)


def test_refuses_a_chunk_past_the_block():
    with pytest.raises(ConfigError, match="at most 2048"):
        row_primitives.check_tree(RowTile(4096, 16))


def test_refuses_long_rows():
    with pytest.raises(ShapeError, match="K = 16385"):
        row_primitives.check_held(16385)
