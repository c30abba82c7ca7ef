"""Every GEMM kernel in its hardest cases: tails in M, N and K, the largest sums, streams, graphs, new lengths."""

import itertools

import pytest
import torch

from int8kit import Int8Linear, Int8SwiGLU, gpus, reference
from int8kit.kernels import gemm
from int8kit.lookup import Plan
from int8kit.spec import GemmShape, Kernel, TileConfig, why_illegal
from int8kit.verify import executors, implementations
from int8kit.verify.compare import operands
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.properties import gemm as gemm_properties


def mma_sync(*tile, **more):
    return TileConfig(*tile, kernel=Kernel.MMA_SYNC, **more)


def wgmma(block_m, block_n, stages, **more):
    return TileConfig(block_m, block_n, 128, 8, stages, kernel=Kernel.WGMMA, **more)


CONFIGS = [
    TileConfig(128, 128, 64, 8, 4),
    TileConfig(16, 64, 128, 4, 4),
    mma_sync(128, 128, 128, 4, 2),
    mma_sync(128, 128, 128, 4, 3, stream_k=2),
    mma_sync(128, 256, 64, 8, 4, stream_k=1),
    mma_sync(256, 128, 64, 8, 3),
    mma_sync(64, 64, 128, 4, 3, stream_k=3),
    mma_sync(16, 64, 128, 4, 4, stream_k=4),
    mma_sync(32, 256, 64, 8, 2),
    wgmma(128, 128, 6),
    wgmma(128, 128, 6, stream_k=1),
    wgmma(256, 128, 4),
    wgmma(256, 128, 4, stream_k=1),
    wgmma(64, 128, 8, group_m=3),
    wgmma(64, 64, 10, stream_k=1),
    wgmma(256, 64, 4, group_m=1),
]
SHAPES = [  # one row; tails in M, N and K; a wave and a bit; few tiles and many steps
    GemmShape(1, 64, 64),
    GemmShape(1, 136, 4608),
    GemmShape(77, 448, 4608),
    GemmShape(129, 4616, 400),
    GemmShape(1000, 4624, 1088),
    GemmShape(300, 1152, 53248),
    GemmShape(2304, 2304, 272),
]


def cases():
    """Pairs of configuration and executor: wgmma as native code, the other kernels as native and as sm_86 code."""
    if not torch.cuda.is_available():
        return []
    available = executors.available(gpus.get("rtx3090"))
    own = gpus.present()
    found = []
    for config, executor in itertools.product(CONFIGS, available):
        arch = own.arch if executor.arch is None else 86
        if why_illegal(config, arch=arch, shared_memory=own.shared_memory) is None:
            found.append(pytest.param(config, executor, id=f"{config}, {executor}"))
    return found


@pytest.mark.parametrize(("config", "executor"), cases())
def test_every_shape(config, executor):
    for shape, kind in itertools.product(SHAPES, ("positive", "extremes")):
        d = Draw(shape, config, kind, 1, torch.bfloat16, torch.bfloat16, padding=16)
        assert gemm_properties.accumulators(d, implementations.int8kit(executor)) is None
        assert gemm_properties.output(d, implementations.int8kit(executor)) is None
    for dtype in (torch.float32, torch.float16):
        d = Draw(GemmShape(129, 4616, 400), config, "normal", 2, None, dtype)
        assert gemm_properties.output(d, implementations.int8kit(executor)) is None
        assert gemm_properties.swiglu(d, implementations.int8kit(executor)) is None


@pytest.mark.parametrize(("config", "executor"), cases())
def test_largest_sums(config, executor):
    """Operands of -128 only: the sum of the largest K just fits int32, so saturation or overflow shows."""
    for m, k in ((1, 53248), (129, 53248), (17, 131056)):
        x = torch.full((m, k), -128, dtype=torch.int8, device="cuda")
        w = torch.full((136, k), -128, dtype=torch.int8, device="cuda")
        assert (gemm.accumulate(x, w, config=config, arch=executor.arch) == 128 * 128 * k).all()


@pytest.mark.parametrize(("config", "executor"), [c for c in cases() if c.values[0].stream_k])
def test_stream_k_is_deterministic_on_two_concurrent_streams(config, executor):
    d = Draw(GemmShape(400, 1160, 8192), config, "normal", 0, None, torch.float32)
    x, w, sx, sw, _ = operands(d, "cuda")
    want = reference.scaled_mm(x, w, sx, sw, out_dtype=torch.float32)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(gemm.scaled_mm(x, w, sx, sw, config=config, out_dtype=torch.float32, arch=executor.arch))
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in results)


@pytest.mark.parametrize("config", [c.values[0] for c in cases() if c.values[1].arch is None])
def test_captures_in_a_graph(config):
    d = Draw(GemmShape(300, 520, 1040), config, "normal", 0, torch.bfloat16, torch.bfloat16)
    x, w, sx, sw, bias = operands(d, "cuda")
    want = gemm.scaled_mm(x, w, sx, sw, bias, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gemm.scaled_mm(x, w, sx, sw, bias, config=config)
    for _ in range(3):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("config", [c.values[0] for c in cases() if c.values[1].arch is None])
def test_runs_on_the_device_of_its_operands(config):
    d = Draw(GemmShape(300, 520, 1040), config, "normal", 0, torch.bfloat16, torch.bfloat16)
    here, there = (operands(d, device) for device in ("cuda:0", "cuda:1"))
    want = reference.scaled_mm(*here)
    for own in (here, there, here):
        got = gemm.scaled_mm(*own, config=config)
        assert got.device == own[0].device
        assert torch.equal(got.cpu(), want.cpu())
    layer = Int8Linear.from_linear(
        torch.nn.Linear(1040, 520, device="cuda:1", dtype=torch.bfloat16),
        Plan.fixed((GemmShape(300, 520, 1040), config)),
    )
    rows = torch.randn(300, 1040, device="cuda:1", dtype=torch.bfloat16)
    assert torch.equal(layer(rows).cpu(), layer.to("cpu")(rows.cpu()))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("config", [c.values[0] for c in cases() if c.values[1].arch is None])
def test_new_prompt_lengths_compile_nothing(config):
    layer = Int8Linear.from_linear(
        torch.nn.Linear(416, 512, device="cuda", dtype=torch.bfloat16), Plan.fixed((GemmShape(2010, 512, 416), config))
    )
    kernel = {Kernel.TRITON: "_gemm_triton", Kernel.MMA_SYNC: "_gemm_mma_sync", Kernel.WGMMA: "_gemm_wgmma"}[
        config.kernel
    ]
    function = getattr(gemm.module(config.kernel), kernel)

    def compiled():
        return sum(len(cache[0]) for cache in function.device_caches.values())

    layer(torch.randn(2000, 416, device="cuda", dtype=torch.bfloat16))
    before = compiled()
    assert before > 0
    for m in (*range(2001, 2020), 4224):  # the last has no leftover tile
        layer(torch.randn(m, 416, device="cuda", dtype=torch.bfloat16))
    assert compiled() == before


@pytest.mark.parametrize("config", [mma_sync(128, 128, 64, 4, 3), wgmma(128, 128, 6)])
def test_triton_kernel_serves_unaligned_rows(config):
    buffer = torch.randint(-128, 128, (300, 431), dtype=torch.int8, device="cuda")
    x, w = buffer[:100, 3:403], buffer[100:300, 3:403]
    gemm._notice.cache_clear()
    with pytest.warns(UserWarning, match="do not start at multiples of 16 bytes|is no sm_90"):
        got = gemm.accumulate(x, w, config=config)
    assert torch.equal(got, reference.accumulate(x, w))


def test_swiglu_layer_equals_the_reference_compiled_and_captured():
    torch.manual_seed(0)
    gate, up = (torch.nn.Linear(416, 520, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    layer = Int8SwiGLU.from_linears(gate, up)
    x = torch.randn(2, 77, 416, device="cuda", dtype=torch.bfloat16)
    want = reference.linear_swiglu(x, layer.weight, layer.weight_scale)
    assert torch.equal(layer(x), want)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layer(x)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)
