"""kernels/qk_norm_rope.py in whatever executes here, against its reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from int8kit import gpus, reference
from int8kit.errors import ConfigError, ShapeError
from int8kit.kernels.qk_norm_rope import HeadTile, qk_norm_rope
from int8kit.verify import executors
from int8kit.verify.examples.strategies import FLOAT_KINDS
from int8kit.verify.properties import row_kernels
from int8kit.verify.properties.row_kernels import Fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]
pytestmark = pytest.mark.usefixtures("quiet_interpreter")


def operands(heads, d, dtype, period):
    """Of two images of `period` rows, and eps."""
    return row_kernels.operands(Fused("qk_norm_rope", 2, period, d, "normal", 2, dtype, dtype, heads=heads), DEVICE)


@pytest.mark.slow
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row_kernels.examples("qk_norm_rope"))
def test_equals_the_reference(f):
    assert row_kernels.check(f, EXECUTOR) is None


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_at_the_models_width(kind):
    f = Fused("qk_norm_rope", 1, 2, 256, kind, 1, torch.bfloat16, torch.bfloat16, heads=18)
    assert row_kernels.check(f, EXECUTOR) is None


def test_agrees_with_the_stock_models_steps():
    """The eager model's own modules in float32, where its roundings are as ours but for the order of the mean."""
    norms = pytest.importorskip("diffusers.models.normalization")
    stock = pytest.importorskip("diffusers.models.transformers.transformer_ideogram4")
    args = operands(3, 256, torch.float32, 3)
    qkv, q_weight, k_weight, cos, sin, heads = (t.cpu() if isinstance(t, torch.Tensor) else t for t in args[:6])
    got = reference.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads)
    for third, weight, ours in zip(qkv.chunk(3, -1), (q_weight, k_weight), got, strict=False):
        norm = norms.RMSNorm(256, eps=1e-5)
        norm.weight.data = weight
        x = norm(third.reshape(2, 3, heads, 256))
        y = x * cos[None, :, None] + stock._rotate_half(x) * sin[None, :, None]
        torch.testing.assert_close(ours, y.reshape(6, -1), rtol=2e-6, atol=2e-6)


def test_v_is_not_touched_and_empty():
    args = operands(2, 64, torch.bfloat16, 1)
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
