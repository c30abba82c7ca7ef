"""The operators and the pipeline on a GPU."""

import pytest
import torch
from diffusers.hooks import apply_group_offloading

from int8kit import Int8Linear, Int8SwiGLU, ShapeError, int8_linear, ops, reference
from int8kit.kernels import gemm_triton
from int8kit.lookup import Plan
from int8kit.runtime import generate, png
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


def test_operands_on_several_devices_are_named():
    layer = _layer(64, 64)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match="x on cpu, wq on cuda:0, sw on cuda:0, bias on cuda:0: expected one device"):
        layer(x)
    with pytest.raises(ShapeError, match="x on meta, wq on cuda:0"):
        layer(x.to("meta"))
    q, s = ops.quantize(x.cuda())
    with pytest.raises(ShapeError, match="xq on cuda:0, wq on cuda:0, sx on cpu, sw on cuda:0"):
        ops.scaled_mm(q, layer.weight, s.cpu(), layer.weight_scale)
    with pytest.raises(ShapeError, match="x on cuda:0, weight on cpu"):
        ops.rms_norm_quantize(x.cuda(), torch.ones(64))
    with pytest.raises(ShapeError, match="wq on meta"):
        layer.to("meta")(x.cuda())


@pytest.mark.parametrize("shape", [(0, 416), (2, 0, 416), (0, 3, 416)])
def test_empty_batches(shape):
    layer = _layer()
    y = layer(torch.zeros(shape, device="cuda", dtype=torch.bfloat16))
    assert y.shape == (*shape[:-1], 512)
    assert y.dtype is torch.bfloat16


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_is_the_product_with_the_dequantized_weight(compiled):
    layer = _layer()
    layer.bias.requires_grad_(True)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(2, 33, 416, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 33, 512, device="cuda", dtype=torch.bfloat16)
    call(x).backward(grad)
    assert torch.equal(x.grad, grad @ (layer.weight * layer.weight_scale[:, None]).bfloat16())
    assert torch.equal(layer.bias.grad, grad.reshape(-1, 512).sum(0))


def test_gradient_of_swiglu_is_near_the_cpu():
    gate, up = (torch.nn.Linear(416, 256) for _ in range(2))
    grads = []
    for device in ("cpu", "cuda"):
        layer = Int8SwiGLU.from_linears(gate, up).to(device)
        torch.manual_seed(1)
        x, grad = torch.randn(33, 416).to(device).requires_grad_(), torch.randn(33, 256).to(device)
        layer(x).backward(grad)
        grads.append(x.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-4 * grads[0].abs().max().item())


def test_autocast_gives_its_dtype():
    layer = _layer()
    x = torch.randn(5, 416, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        got = layer(x)
    assert torch.equal(got, layer(x.half()))


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_moves_the_int8_weights(kind):
    model = torch.nn.Sequential(_layer(416, 416), _layer(416, 416))
    x = torch.randn(5, 416, device="cuda", dtype=torch.bfloat16)
    want = model(x)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(
        model, onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type=kind, **blocks
    )
    for _ in range(2):
        assert torch.equal(model(x), want)
        assert model[0].weight.device.type == "cpu"


def test_tiny_image(tmp_path):
    request = generate.ImageRequest(("a red bicycle",), height=256, width=256, steps=4)
    generated = generate.generate(request)
    png.save(generated, tmp_path / "a.png")
    assert png.is_ours(tmp_path / "a.png")
    assert generated.images[0].size == (256, 256)
    assert generated.peak_gib > 0
    assert generate.generate(request).images[0].tobytes() == generated.images[0].tobytes()
