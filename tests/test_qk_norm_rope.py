"""kernels/qk_norm_rope.py in whatever executes here, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from int8kit import reference
from int8kit.kernels.qk_norm_rope import HEAD_DIMS, HeadTile, qk_norm_rope
from int8kit.spec import ConfigError, ShapeError
from int8kit.verify.bits import difference
from int8kit.verify.strategies import FLOAT_KINDS, OUT_DTYPES, float_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("quiet_interpreter")
TILES = (None, HeadTile(1, 1, 1), HeadTile(2, 3, 1), HeadTile(4, 2, 2), HeadTile(16, 1, 4))


def operands(m, heads, d, kind, seed, dtype, vector_dtype, period, padding=0):
    width = 3 * heads * d
    qkv = float_matrix(m, width + padding, kind, seed, dtype, DEVICE)[:, :width]
    g = torch.Generator().manual_seed(seed)
    weights = (torch.randn(2, d, generator=g) * 0.5 + 1).to(vector_dtype).to(DEVICE)
    angles = torch.rand(period, d, generator=g) * 100
    cos, sin = (t.to(vector_dtype).to(DEVICE) for t in (angles.cos(), angles.sin()))
    return qkv, weights[0], weights[1], cos, sin, heads


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert difference(a, b) is None


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 7),
    d=st.sampled_from(HEAD_DIMS),
    kind=st.sampled_from(FLOAT_KINDS),
    seed=st.integers(0, 7),
    dtypes=st.tuples(st.sampled_from(OUT_DTYPES), st.sampled_from(OUT_DTYPES)),
    images=st.integers(1, 3),
    period=st.integers(1, 3),
    padding=st.sampled_from([0, 3]),
    tile=st.sampled_from(TILES),
)
def test_equals_the_reference(heads, d, kind, seed, dtypes, images, period, padding, tile):
    args = operands(images * period, heads, d, kind, seed, *dtypes, period, padding)
    assert_equal(qk_norm_rope(*args, tile=tile), reference.qk_norm_rope(*args))


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    args = operands(2, 18, 256, kind, 1, torch.bfloat16, torch.bfloat16, 2)
    assert_equal(qk_norm_rope(*args), reference.qk_norm_rope(*args))


def test_agrees_with_the_stock_models_steps():
    """The eager model's own modules in float32, where its roundings are as ours but for the order of the mean."""
    norms = pytest.importorskip("diffusers.models.normalization")
    stock = pytest.importorskip("diffusers.models.transformers.transformer_ideogram4")
    args = operands(6, 3, 256, "normal", 2, torch.float32, torch.float32, 3)
    qkv, q_weight, k_weight, cos, sin, heads = (t.cpu() if isinstance(t, torch.Tensor) else t for t in args)
    got = reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads)
    for third, weight, ours in zip(qkv.chunk(3, -1), (q_weight, k_weight), got, strict=False):
        norm = norms.RMSNorm(256, eps=1e-5)
        norm.weight.data = weight
        x = norm(third.reshape(2, 3, heads, 256))
        y = x * cos[None, :, None] + stock._rotate_half(x) * sin[None, :, None]
        torch.testing.assert_close(ours, y.reshape(6, -1), rtol=2e-6, atol=2e-6)


def test_v_is_not_touched_and_empty():
    args = operands(2, 2, 64, "normal", 0, torch.bfloat16, torch.bfloat16, 1)
    before = args[0].clone()
    qk_norm_rope(*args)
    assert torch.equal(args[0], before)
    assert [t.shape for t in qk_norm_rope(args[0][:0], *args[1:])] == [(0, 128), (0, 128)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({0: torch.zeros(4, 3 * 2 * 24)}, r"legal is \[M, 3 H D\]"),
        ({1: torch.zeros(16)}, "q_weight"),
        ({3: torch.zeros(3, 32)}, "a divisor of M = 4"),
        ({4: torch.zeros(2, 32)}, "cos as sin"),
        ({5: 0}, "0 heads"),
    ],
)
def test_refuses_by_name(changed, reason):
    legal = [torch.zeros(4, 3 * 2 * 32), torch.zeros(32), torch.zeros(32), torch.zeros(4, 32), torch.zeros(4, 32), 2]
    with pytest.raises(ShapeError, match=reason):
        qk_norm_rope(*(changed.get(i, t) for i, t in enumerate(legal)))


@pytest.mark.parametrize("tile", [(3, 1, 1), (2, 0, 1), (2, 1, 3)])
def test_refuses_tiles(tile):
    with pytest.raises(ConfigError, match="legal are heads"):
        HeadTile(*tile)
