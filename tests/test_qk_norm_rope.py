"""kernels/qk_norm_rope.py on the present executor, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import given
from kernel_helpers import EXECUTOR, MANY, assert_equals_reference, operands

from int8kit import reference
from int8kit.errors import ConfigError, ShapeError
from int8kit.kernels.qk_norm_rope import HeadTile, qk_norm_rope
from int8kit.verify.examples.strategies import FLOAT_KINDS
from int8kit.verify.properties import row_kernels

pytestmark = pytest.mark.usefixtures("quiet_interpreter")


@pytest.mark.slow
@MANY
@given(row_kernels.examples("qk_norm_rope"))
def test_equals_the_reference(f):
    assert row_kernels.check(f, EXECUTOR) is None


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    assert_equals_reference("qk_norm_rope", *operands("qk_norm_rope", 2, 256, kind=kind, heads=18, seed=1))


def test_agrees_with_the_stock_model():
    """Against the eager modules in float32. They round like the reference, except for the order of the mean."""
    norms = pytest.importorskip("diffusers.models.normalization")
    stock = pytest.importorskip("diffusers.models.transformers.transformer_ideogram4")
    args = operands("qk_norm_rope", 6, 256, images=2, heads=3, dtype=torch.float32, seed=2)
    qkv, q_weight, k_weight, cos, sin, heads = (t.cpu() if isinstance(t, torch.Tensor) else t for t in args[:6])
    got = reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads)
    for third, weight, ours in zip(qkv.chunk(3, -1), (q_weight, k_weight), got, strict=False):
        norm = norms.RMSNorm(256, eps=1e-5)
        norm.weight.data = weight
        x = norm(third.reshape(2, 3, heads, 256))
        y = x * cos[None, :, None] + stock._rotate_half(x) * sin[None, :, None]
        torch.testing.assert_close(ours, y.reshape(6, -1), rtol=2e-6, atol=2e-6)


def test_v_is_unchanged_and_empty():
    args = operands("qk_norm_rope", 2, 64, images=2, heads=2, seed=2)
    before = args[0].clone()
    qk_norm_rope(*args)
    assert torch.equal(args[0], before)
    assert [t.shape for t in qk_norm_rope(args[0][:0], *args[1:])] == [(0, 128), (0, 128)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({0: torch.zeros(4, 3 * 2 * 24)}, r"\[M, 3 H D\]"),
        ({1: torch.zeros(16)}, "q_weight"),
        ({3: torch.zeros(3, 32)}, "a divisor of M = 4"),
        ({4: torch.zeros(2, 32)}, "cos"),
        ({5: 0}, "0 heads"),
    ],
)
def test_error_names_the_argument(changed, reason):
    valid = [torch.zeros(4, 3 * 2 * 32), torch.zeros(32), torch.zeros(32), torch.zeros(4, 32), torch.zeros(4, 32), 2]
    with pytest.raises(ShapeError, match=reason):
        qk_norm_rope(*(changed.get(i, t) for i, t in enumerate(valid)))


@pytest.mark.parametrize("tile", [(3, 1, 1), (2, 0, 1), (2, 1, 3)])
def test_refuses_tiles(tile):
    with pytest.raises(ConfigError, match="heads"):
        HeadTile(*tile)
