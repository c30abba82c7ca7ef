"""kernels/gemm.py on the present executor: values against the reference, errors, and fallbacks."""

from types import SimpleNamespace

import pytest
import torch
from kernel_helpers import DEVICE

from int8kit import reference
from int8kit.errors import ShapeError
from int8kit.kernels import gemm
from int8kit.spec import Kernel, TileConfig

TILE = TileConfig(32, 32, 32, 4, 2, group_m=2)


def operands(m=40, n=24, k=70):
    torch.manual_seed(0)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=DEVICE)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE)
    return x, w, torch.rand(m, device=DEVICE) / 99, torch.rand(n, device=DEVICE) / 99


@pytest.mark.parametrize("dtype", gemm.OUT_DTYPES)
@pytest.mark.parametrize("m", [1, 33, 100])
def test_scaled_mm_equals_the_reference(dtype, m):
    x, w, sx, sw = operands(m)
    for bias in (None, torch.randn(24, device=DEVICE).to(dtype)):
        got = gemm.scaled_mm(x, w, sx, sw, bias, config=TILE, out_dtype=dtype)
        assert torch.equal(got, reference.scaled_mm(x, w, sx, sw, bias, out_dtype=dtype))


def test_accumulate_equals_int_mm():
    x, w, *_ = operands(40, 24, 64)
    assert torch.equal(gemm.accumulate(x, w, config=TILE), torch._int_mm(x, w.t()))


def test_any_two_configurations_give_the_same_bits():
    x, w, sx, sw = operands(75, 90, 200)
    tiles = (TILE, TileConfig(64, 16, 64, 2, 3), TileConfig(16, 128, 128, 4, 4, group_m=1))
    first, *others = (gemm.scaled_mm(x, w, sx, sw, config=c, out_dtype=torch.float32) for c in tiles)
    for other in others:
        assert torch.equal(first, other)


def test_empty_input():
    x, w, sx, sw = operands(0)
    assert gemm.scaled_mm(x, w, sx, sw, config=TILE).shape == (0, 24)


def test_nan_scale_affects_only_its_row():
    x, w, sx, sw = operands()
    sx[3] = torch.nan
    y = gemm.scaled_mm(x, w, sx, sw, config=TILE)
    assert y[3].isnan().all()
    assert y.isnan().sum() == 24


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w, sx, sw: (x.float(), w, sx, sw), "torch.float32 and w torch.int8: .*quantize first"),
        (lambda x, w, sx, sw: (x[:, :8], w, sx, sw), r"\[M, K\] and \[N, K\]"),
        (lambda x, w, sx, sw: (x, w, sx[:3], sw), r"sx \(3,\): .* a contiguous \[40\]"),
        (lambda x, w, sx, sw: (x, w, sx, sw.double()), "sw torch.float64: .* torch.float32"),
        (lambda x, w, sx, sw: (x.t().contiguous().t(), w, sx, sw), r"x has strides \(1, 40\)"),
        (lambda x, w, sx, sw: (x.expand(1, 40, 70), w, sx, sw), r"x \(1, 40, 70\)"),
    ],
)
def test_error_names_the_argument(change, reason):
    with pytest.raises(ShapeError, match=reason):
        gemm.scaled_mm(*change(*operands()), config=TILE)


def test_refuses_k_beyond_int32():
    x = torch.zeros(1, 131072, dtype=torch.int8, device=DEVICE)
    with pytest.raises(ShapeError, match="K = 131072"):
        gemm.accumulate(x, x, config=TILE)


def test_another_kernel_serves_if_the_named_one_cannot():
    x, w, sx, sw = operands()
    config = TileConfig(64, 64, 128, 4, 3, kernel=Kernel.MMA_SYNC)
    gemm._notice.cache_clear()
    with pytest.warns(UserWarning, match="the triton kernel serves instead of the mma_sync kernel"):
        got = gemm.scaled_mm(x, w, sx, sw, config=config)
    assert torch.equal(got, reference.scaled_mm(x, w, sx, sw))
    gemm.scaled_mm(x, w, sx, sw, config=config)  # the second call must not warn: warnings are errors here


def test_triton_kernel_serves_if_the_named_one_does_not_compile(monkeypatch):
    x, w, sx, sw = operands()
    config = TileConfig(64, 64, 128, 4, 3, kernel=Kernel.WGMMA)
    triton = gemm.module(Kernel.TRITON)

    def launch(*_):
        raise RuntimeError(message)

    broken = SimpleNamespace(why_not=lambda _: None, launch=launch)
    monkeypatch.setattr(gemm, "module", lambda kernel: triton if kernel is Kernel.TRITON else broken)
    monkeypatch.setattr(gemm, "why_not", lambda *_: None)
    gemm._notice.cache_clear()
    message = "PassManager::run failed"
    with pytest.warns(gemm.Fallback, match=r"does not compile wgmma 64x64x128"):
        got = gemm.scaled_mm(x, w, sx, sw, config=config)
    assert torch.equal(got, reference.scaled_mm(x, w, sx, sw))
    message = "Triton Error [CUDA]: an illegal memory access"  # not from the compiler, so it is not hidden
    with pytest.raises(RuntimeError, match="illegal"):
        gemm.scaled_mm(x, w, sx, sw, config=config)
