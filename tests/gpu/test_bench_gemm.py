"""The small benchmark: `pytest tests/gpu/test_bench_gemm.py --benchmark-enable`. Figures are microseconds a call."""

import pytest
import torch

from int8kit import gpus
from int8kit.spec import GemmShape, default_config

SHAPE = GemmShape(4096, 4608, 4608)


@pytest.fixture(scope="module")
def bench():
    from int8kit.tune.measure import Bench

    return Bench(SHAPE, gpus.present())


def test_bench_gemm(bench, benchmark):
    call = bench.call(default_config(SHAPE))

    def synchronous():
        call()
        torch.cuda.synchronize()

    benchmark(synchronous)
    assert torch.equal(bench.out, bench.truth)


def test_bench_bf16(bench, benchmark):
    def synchronous():
        bench.bf16()
        torch.cuda.synchronize()

    benchmark(synchronous)
    assert bench.out.isfinite().all()
