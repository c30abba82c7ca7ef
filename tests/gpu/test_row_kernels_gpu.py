"""The row kernels on a GPU: bit equality at full and odd sizes and for every tile; streams, graphs, torch.compile."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_helpers import assert_equal, assert_equals_reference
from kernel_helpers import operands as example_operands

from int8kit import ops, reference
from int8kit.kernels import activations, row_primitives
from int8kit.kernels.qk_norm_rope import HeadTile
from int8kit.kernels.rms_norm_quantize import _rms_norm_quantize, rms_norm_quantize
from int8kit.kernels.row_primitives import CHUNKS, WARPS, RowTile
from int8kit.kernels.swiglu_quantize import swiglu_quantize
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples.strategies import FLOAT_KINDS, OUT_DTYPES
from int8kit.verify.properties.row_kernels import KERNELS

TILES = [RowTile(chunk, warps) for chunk in CHUNKS for warps in WARPS if 2 * warps <= chunk // 64 <= 16 * warps]
SIZES = [(4352, 4608, 18), (2504, 4608, 18), (333, 416, 3), (17, 4607, 5), (1, 4600, 1), (64, 1, 2)]


def operands(name, m, k, heads, **more):
    """The arguments of a kernel. k: row width, F of SwiGLU; heads have the model's width from k = 4600 on, else 64."""
    if name == "qk_norm_rope":
        k = 256 if k >= 4600 else 64
    return example_operands(name, m, k, device="cuda", heads=heads, **more)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("m", "k", "heads"), SIZES)
def test_equals_the_reference(name, m, k, heads):
    for padding in (0, 3, 8):
        args = operands(name, m, k, heads, padding=padding)
        assert_equals_reference(name, *args)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_equals_the_reference_for_every_kind_of_data(name, dtype, kind):
    for seed, images in ((1, 1), (2, 2), (3, 3)):
        args = operands(name, 6, 4608, 18, kind=kind, dtype=dtype, images=images, seed=seed)
        assert_equals_reference(name, *args)


def test_ffn_at_full_size():
    args = operands("swiglu_quantize", 4352, 12288, 0)
    assert_equals_reference("swiglu_quantize", *args)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("k", [416, 4608])
def test_every_tile_gives_the_same_bits(tile, k):
    for name in ("rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize"):
        if name != "swiglu_quantize" and tile.chunk > 2048:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            args = operands(name, 21, k, 0, dtype=dtype, images=3)
            assert_equals_reference(name, *args, tile=tile)


@pytest.mark.parametrize(
    "tile", [(1, 1, 1), (2, 1, 1), (2, 3, 1), (2, 9, 1), (4, 3, 2), (4, 5, 2), (8, 3, 4), (32, 1, 8)]
)
def test_every_head_tile_gives_the_same_bits(tile):
    for k, heads in ((4608, 18), (416, 7)):
        args = operands("qk_norm_rope", 12, k, heads, images=3)
        assert_equals_reference("qk_norm_rope", *args, tile=HeadTile(*tile))


@triton.jit
def _reciprocals(d_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, activations.reciprocal(tl.load(d_ptr + at)))


@pytest.mark.parametrize("exponent", [0, 1, 2, 60, 124, 125])
def test_reciprocal_of_every_mantissa(exponent):
    """The special-function unit plus two FMAs against IEEE division, for all 2**23 mantissas of one exponent."""
    d = (torch.arange(2**23, dtype=torch.int32, device="cuda") + ((127 + exponent) << 23)).view(torch.float32)
    got = torch.empty_like(d)
    _reciprocals[(2**13,)](d, got, BLOCK=1024, enable_fp_fusion=False)
    assert bitwise_diff(got, torch.ones_like(d) / d) is None


@triton.jit
def _silus(g_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, activations.silu(tl.load(g_ptr + at)))


@pytest.mark.xdist_group("large")
def test_silu_of_every_float():
    """All 2**32 bit patterns against the reference on the GPU; every 4099th against the reference on the CPU."""
    step = 2**26
    for start in range(-(2**31), 2**31, step):
        g = torch.arange(start, start + step, device="cuda").to(torch.int32).view(torch.float32)
        got = torch.empty_like(g)
        _silus[(step // 1024,)](g, got, BLOCK=1024, enable_fp_fusion=False)
        want = reference.silu(g)
        assert bitwise_diff(got, want) is None
        some = slice(0, step, 4099)
        assert bitwise_diff(want[some].cpu(), reference.silu(g[some].cpu())) is None


@triton.jit
def _quantize_row(x_ptr, s_ptr, q_ptr, K: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0)
    xs = row_primitives.load_row(x_ptr + row * K, K, CHUNK)
    top = tl.zeros([CHUNK], tl.float32)
    for c in tl.static_range(len(xs)):
        top = row_primitives.larger(top, xs[c])
    s = row_primitives.row_scale(top)
    tl.store(s_ptr + row, s)
    row_primitives.store_quantized(q_ptr + row * K, xs, s, K, CHUNK)


@pytest.mark.parametrize("exponent", [-149, -130, -101, -99, -60, 0, 60, 119])
def test_quotients_near_ties(exponent):
    """Values within 3 units in the last place of every half step, at scales from the smallest to the largest."""
    g = torch.Generator("cuda").manual_seed(exponent + 200)
    m, k = 4096, 2048
    s = (torch.rand(m, 1, generator=g, device="cuda", dtype=torch.float64) + 1) * 2.0**exponent
    halves = torch.randint(-127, 127, (m, k), generator=g, device="cuda") + 0.5
    x = (s * halves).float()
    x = (x.view(torch.int32) + torch.randint(-3, 4, (m, k), generator=g, device="cuda", dtype=torch.int32)).view(
        x.dtype
    )
    x = torch.where(x.isfinite(), x, 0.0)
    x[:, 0] = (s[:, 0] * 127).float()
    got = torch.empty(m, device="cuda"), torch.empty(m, k, device="cuda", dtype=torch.int8)
    _quantize_row[(m,)](x, *got, K=k, CHUNK=512, num_warps=2, enable_fp_fusion=False)
    assert_equal(got[::-1], reference.quantize(x))


@pytest.mark.parametrize("name", KERNELS)
def test_captures_runs_on_another_stream_and_compiles(name):
    args = operands(name, 64, 4608, 18, images=2)
    call = getattr(ops, name)
    want = getattr(reference, name)(*args)
    assert_equal(call(*args), want)
    assert_equal(torch.compile(call, fullgraph=True)(*args), want)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = call(*args)
    stream.synchronize()
    assert_equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*args)
    for t in got:
        t.zero_()
    graph.replay()
    assert_equal(got, want)


@pytest.mark.parametrize("name", KERNELS)
def test_operators_pass_opcheck(name):
    args = operands(name, 12, 416, 3, images=2)
    if name in ("rms_norm_quantize", "residual_norm_quantize", "qk_norm_rope"):
        args = (*args, 1e-5)  # eps, for which the operators have no default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.int8kit, name).default, args, test_utils=checks)


def test_rows_do_not_depend_on_their_neighbours():
    args = operands("rms_norm_quantize", 301, 4608, 0)
    whole = rms_norm_quantize(*args)
    for row in (0, 150, 300):
        assert_equal(rms_norm_quantize(args[0][row : row + 1], *args[1:]), [t[row : row + 1] for t in whole])


def test_a_new_prompt_length_compiles_nothing():
    for m in (2000, 2001, 2016):
        if m == 2001:
            before = sum(len(cache[0]) for cache in _rms_norm_quantize.device_caches.values())
        rms_norm_quantize(*operands("rms_norm_quantize", m, 416, 0))
    assert sum(len(cache[0]) for cache in _rms_norm_quantize.device_caches.values()) == before


def test_offsets_beyond_32_bits():
    """The last rows of a matrix with more than 2**31 elements give the same bits as these rows alone."""
    long = torch.randn(2**31 // 8192 + 9, 8192, device="cuda", dtype=torch.bfloat16)
    assert_equal([t[-5:] for t in rms_norm_quantize(long)], reference.rms_norm_quantize(long[-5:]))
    assert_equal([t[-5:] for t in swiglu_quantize(long)], reference.swiglu_quantize(long[-5:]))
