"""Bit-exactness on the GPU, of native code and of sm_86 code. `int8kit verify` has the properties and the entries."""

import pytest
import torch

from int8kit import gpus, reference
from int8kit.kernels import gemm, quantize
from int8kit.spec import GemmShape, Kernel, TileConfig, legal_configs
from int8kit.verify import executors, implementations, property_runs, runner
from int8kit.verify.examples.encoding import described
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.properties import gemm as gemm_properties


def executors_here():
    return executors.available(gpus.get("rtx3090")) if torch.cuda.is_available() else []


CONFIGS = [c for c in legal_configs(90, gpus.get("h200").shared_memory) if c.kernel is Kernel.WGMMA]
SHAPES = (GemmShape(300, 1160, 4112), GemmShape(2304, 2304, 272), GemmShape(81, 520, 1040))
LOTS = 8  # processes that share the configurations


def _check_each(run, report):
    """A child's work in the next test: every LOTS'th tile, with part of a wave, many k-steps, and tails."""
    failure, kernels = None, implementations.int8kit(run.executor)
    for config in CONFIGS[int(run.name) :: LOTS]:
        for shape, kind in zip(SHAPES, ("extremes", "normal", "uniform"), strict=True):
            d = Draw(shape, config, kind, 1, torch.bfloat16, torch.bfloat16, padding=16)
            report(described(d))
            failure = failure or gemm_properties.accumulators(d, kernels) or gemm_properties.output(d, kernels)
    return runner.Result(run.name, str(run.executor), len(CONFIGS) // LOTS, failure), {}


def test_every_tile_of_the_wgmma_kernel_ends_and_is_exact():
    """Its warp groups wait for each other: a tile of too few stages once waited for ever."""
    native = [executor for executor in executors_here() if executor.arch is None]
    if gpus.present().arch != 90:
        pytest.skip("no wgmma here")
    runs = [property_runs.PropertyRun(str(i), native[0]) for i in range(LOTS)]
    findings = property_runs.run_all(runs, _check_each, processes=LOTS)
    assert [result.failure for result, _ in findings] == [None] * LOTS


@pytest.mark.parametrize("m", [1, 16, 17, 127, 129])
@pytest.mark.parametrize("k", [53248, 131071])
def test_largest_sums(m, k):
    """-128 everywhere gives sums just inside int32, where saturation or overflow would show."""
    x = torch.full((m, k), -128, dtype=torch.int8, device="cuda")
    w = torch.full((136, k), -128, dtype=torch.int8, device="cuda")
    for executor in executors_here():
        for config in (TileConfig(64, 64, 128, 4, 3), TileConfig(128, 128, 64, 8, 4)):
            got = gemm.accumulate(x, w, config=config, arch=executor.arch)
            assert (got == 128 * 128 * k).all()


@pytest.mark.xdist_group("large")
def test_offsets_beyond_32_bits():
    """Rows whose first element lies past 2**31 in x and in out: the last rows against the reference."""
    m, k = 2**31 // 53248 + 200, 53248
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device="cuda")
    w = torch.randint(-128, 128, (64, k), dtype=torch.int8, device="cuda")
    config = TileConfig(128, 64, 128, 4, 3)
    got = gemm.accumulate(x, w, config=config)
    assert torch.equal(got[-150:], reference.accumulate(x[-150:], w))
    del x, got
    tall = torch.randint(-128, 128, (2**31 // 24576 + 200, 32), dtype=torch.int8, device="cuda")
    wide = torch.randint(-128, 128, (24576, 32), dtype=torch.int8, device="cuda")
    got = gemm.accumulate(tall, wide, config=config)
    assert torch.equal(got[-150:], reference.accumulate(tall[-150:], wide))
    long = torch.randn(2**31 // 16384 + 20, 16384, device="cuda", dtype=torch.bfloat16)
    q, s = quantize.quantize(long)
    want_q, want_s = reference.quantize(long[-9:])
    assert torch.equal(q[-9:], want_q)
    assert torch.equal(s[-9:], want_s)


def test_cpu_and_gpu_reference_agree():
    """The reference is the same function on both devices, so the bits of a linear do not depend on the device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 416, generator=generator).bfloat16()
    q, s = reference.quantize(x)
    q_gpu, s_gpu = reference.quantize(x.cuda())
    assert torch.equal(q, q_gpu.cpu())
    assert torch.equal(s, s_gpu.cpu())
    sw, bias = torch.rand(37, generator=generator) / 256, torch.randn(37, generator=generator).bfloat16()
    y = reference.scaled_mm(q, q, s, sw, bias)
    y_gpu = reference.scaled_mm(q_gpu, q_gpu, s_gpu, sw.cuda(), bias.cuda())
    assert torch.equal(y, y_gpu.cpu())
