"""The small benchmark of the row kernels: `pytest tests/gpu/test_bench_fused.py --benchmark-enable`.

`int8kit.bench.fused` is the full benchmark.
"""

import pytest
import torch

from int8kit import ops

M, K, F, HEADS, D = 4352, 4608, 12288, 18, 256


def operands(name):
    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    return {
        "rms_norm_quantize": lambda: (random(M, K), random(K), random(1, K)),
        "residual_norm_quantize": lambda: (
            random(M, K), random(M, K), random(K), random(1, K), random(K), random(1, K),
        ),
        "swiglu_quantize": lambda: (random(M, 2 * F),),
        "qk_norm_rope": lambda: (
            random(M, 3 * HEADS * D), random(D), random(D), random(M, D), random(M, D), HEADS,
        ),
    }[name]()  # fmt: skip


@pytest.mark.parametrize("name", ["rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope"])
def test_bench_fused_kernel(name, benchmark):
    args = operands(name)

    def synchronous():
        getattr(ops, name)(*args)
        torch.cuda.synchronize()

    benchmark(synchronous)
