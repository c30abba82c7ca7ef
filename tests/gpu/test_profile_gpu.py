"""bench/profile.py on a GPU: the parts of a chain of int8kit's operators add up to the wall clock."""

import pytest
import torch

from int8kit import ops
from int8kit.bench.profile import GAPS, PARTS, TOLERANCE, profile
from int8kit.timing.wall_clock import interleaved

M, K, F, HEADS, D = 4352, 4608, 12288, 18, 256


def chain(rows):
    """One call of each row kernel, products, attention, and a copy, on `rows` rows."""

    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, weight, modulation = normal(rows, K), normal(K), normal(1, K)
    (w_qkv, s_qkv), (w_down, s_down) = (ops.quantize(normal(n, k)) for n, k in ((3 * HEADS * D, K), (K, F)))
    w_up, s_up = ops.quantize(normal(2 * F, K))
    norms, tables = (normal(D), normal(D)), (normal(rows, D), normal(rows, D))

    def call():
        q, s = ops.rms_norm_quantize(x, weight, modulation)
        qkv = ops.scaled_mm(q, w_qkv, s, s_qkv)
        heads = [t.view(rows, HEADS, D).transpose(0, 1)[None] for t in ops.qk_norm_rope(qkv, *norms, *tables, HEADS)]
        value = qkv[:, 2 * HEADS * D :].view(rows, HEADS, D).transpose(0, 1)[None]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads, value)
        mixed = mixed.transpose(1, 2).reshape(rows, HEADS * D)
        new, q, s = ops.residual_norm_quantize(x, mixed, weight, modulation, weight, modulation)
        q, s = ops.swiglu_quantize(ops.scaled_mm(q, w_up, s, s_up))
        return torch.cat([new, ops.scaled_mm(q, w_down, s, s_down)]) + 1

    return call


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_the_parts_add_up_to_the_wall_clock():
    found = profile(chain(M), repeats=5)
    assert found.device == "cuda"
    assert found.adds_up, found.document()
    assert found.unknown == ()
    for part in PARTS:
        assert (found.ms[part] > 0) is (part != "other"), part
    assert found.ms["GEMM"] > found.ms["row kernels"]
    counts = {kernel.name: kernel.count for kernel in found.kernels}
    names = ("rms_norm_quantize", "qk_norm_rope", "residual_norm_quantize", "swiglu_quantize")
    assert [counts[f"_{name}"] for name in names] == [1, 1, 1, 1]
    assert sum(kernel.count for kernel in found.kernels if kernel.part == "GEMM") >= 3


def test_a_slow_host_is_seen_as_gaps():
    """The host waits for each of 20 short kernels, so the GPU is idle for most of the time."""
    x = torch.ones(16, device="cuda")

    def call():
        for _ in range(20):
            x.add_(1).sum().item()

    found = profile(call, repeats=5)
    assert found.ms[GAPS] > found.busy_ms
    assert found.ms[GAPS] > 0.5 * found.wall_ms
    assert found.sum_over_wall <= 1 + TOLERANCE


def test_a_captured_graph_shows_its_kernels():
    call = chain(M)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    found = profile(graph.replay, repeats=5)
    assert found.adds_up, found.document()
    assert min(found.ms[part] for part in ("GEMM", "attention", "row kernels")) > 0


def test_the_wall_clock_covers_the_gpus_work():
    product = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found = interleaved({"one": lambda: product @ product, "three": lambda: product @ product @ product @ product}, 7)
    assert 2 < found["three"].p50 / found["one"].p50 < 4
    assert found["one"].p20 <= found["one"].p50 <= found["one"].p80
