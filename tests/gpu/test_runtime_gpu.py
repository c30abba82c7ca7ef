"""The operators and the pipeline on a GPU."""

import torch

from int8kit import Int8Linear, int8_linear, ops, reference
from int8kit.kernels import gemm_triton
from int8kit.lookup import Plan
from int8kit.runtime import generate
from int8kit.spec import GemmShape, TileConfig

PLAN = Plan.fixed(
    (GemmShape(64, 512, 416), TileConfig(64, 64, 64, 4, 3)), (GemmShape(4096, 512, 416), TileConfig(128, 128, 64, 8, 3))
)


def _layer(n=512, k=416):
    torch.manual_seed(0)
    return Int8Linear.from_linear(torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16), PLAN)


def test_linear_equals_the_reference_for_every_batch_and_stride():
    layer = _layer()
    for rows in (1, 5, 64, 333):
        wide = torch.randn(2, rows, 500, device="cuda", dtype=torch.bfloat16)
        for x in (wide[..., :416], wide[..., :416].contiguous(), wide[..., :416].transpose(0, 1)):
            want = reference.linear(x, layer.weight, layer.weight_scale, layer.bias)
            assert torch.equal(layer(x), want)


def test_rows_do_not_depend_on_their_neighbours():
    layer = _layer()
    x = torch.randn(301, 416, device="cuda", dtype=torch.bfloat16)
    whole = layer(x)
    for row in (0, 1, 150, 300):
        assert torch.equal(layer(x[row : row + 1]), whole[row : row + 1])


def test_compiles_without_a_graph_break_and_captures():
    layer = _layer()
    x = torch.randn(64, 416, device="cuda", dtype=torch.bfloat16)
    want = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layer(x)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


def test_a_new_prompt_length_compiles_nothing():
    layer = _layer()
    layer(torch.randn(2000, 416, device="cuda", dtype=torch.bfloat16))
    before = _compiled()
    for m in range(2001, 2021):
        layer(torch.randn(m, 416, device="cuda", dtype=torch.bfloat16))
    assert _compiled() == before


def _compiled():
    return sum(len(cache[0]) for cache in gemm_triton._gemm_triton.device_caches.values())


def test_another_stream_gives_the_same_bits():
    layer = _layer()
    x = torch.randn(64, 416, device="cuda", dtype=torch.bfloat16)
    want = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = layer(x)
    stream.synchronize()
    assert torch.equal(got, want)


def test_operators_pass_opcheck():
    layer = _layer(64, 64)
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    q, s = ops.quantize(x)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.int8kit.quantize.default, (x,), test_utils=tests)
    torch.library.opcheck(
        torch.ops.int8kit.linear.default, (x, layer.weight, layer.weight_scale, layer.bias, PLAN.text), test_utils=tests
    )
    args = (q, layer.weight, s, layer.weight_scale, layer.bias, torch.bfloat16, PLAN.text)
    torch.library.opcheck(torch.ops.int8kit.scaled_mm.default, args, test_utils=tests)
    assert torch.equal(
        int8_linear(x, layer.weight, layer.weight_scale, layer.bias),
        ops.scaled_mm(q, layer.weight, s, layer.weight_scale, layer.bias),
    )


def test_tiny_image(tmp_path):
    request = generate.ImageRequest("a red bicycle", height=256, width=256, steps=4)
    generated = generate.generate(request)
    generate.save(generated, tmp_path / "a.png")
    assert generate.is_ours(tmp_path / "a.png")
    assert generated.image.size == (256, 256)
    assert generated.peak_gib > 0
    assert generate.generate(request).image.tobytes() == generated.image.tobytes()
