"""Device functions that the row kernels share: a row in registers, its mean of squares, its quantization.

The row kernels are `quantize` and four kernels that do the work of several eager operations. `bench fused` and some
test files call these four the fused kernels.

A program holds one row as a tuple of chunks, each [CHUNK] fp32. Every input byte is read once. K = 4608 is nine chunks
of 512 without a masked lane; one power of two would be 8192 wide and almost half empty. Several rows per program, which
would load the weight once for all of them, were rejected: Triton then gives the two shapes different layouts and
exchanges them through shared memory.

**The mean of squares is defined to the bit**, so that no result depends on the tile, the GPU or the compiler. The
squares, padded with zeros to blocks of 2048, are added in one order:

    [J, 8, 32, 8]  blocks added one to the next -> [8, 32, 8]  neighbours, three times -> [8, 32]
                   halves, three times -> [32]                 neighbours, five times  -> one

A reduction of more than two elements has an order that Triton derives from the layout. Here each reduction has exactly
two elements, and a + b = b + a to the bit. Whether the two are in one thread, in two lanes or in two warps changes the
cost only. The axes match the 16 bytes of a thread, a warp, and eight warps, so nearly all additions stay inside a
thread.

**A quotient y / s is correctly rounded and takes four instructions.** `div_rn` takes a dozen per element, one of them a
special-function instruction. But s belongs to the whole row. Let r = RN(1 / s), computed once per row, and let
l = (1 - s r) r be the rest of 1 / s:

    q0 = RN(y r + RN(y l))    error below one unit in the last place
    d = y - s q0              exact in one fused operation
    q = RN(q0 + d r)          RN(y / s), by Markstein's theorem (Markstein, 1990)

The theorem needs a representable d. That holds for s >= 2**-100 and q >= 1/4, and a smaller q rounds to 0 in any case.
Other rows take `div_rn` and a clamp. So do all rows in Triton's interpreter, which has no fused operation. Where s is a
normal number, RN(y / s) <= 127 + 2**-17 needs no clamp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
import triton
import triton.language as tl

from int8kit.errors import ConfigError, ShapeError
from int8kit.kernels.launch import aligned_dtypes, launch_cached, on_device

FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
CHUNKS = (256, 512, 1024, 2048, 4096)
WARPS = (1, 2, 4, 8, 16)
K_MAX_HELD = 16384
BLOCK: tl.constexpr = tl.constexpr(2048)
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, ties to even
S_ORDINARY: tl.constexpr = tl.constexpr(2.0**-100)


@dataclass(frozen=True)
class RowTile:
    """Tile configuration of a row kernel. Any legal value gives the same bits; only the time differs.

    Raises ConfigError for an illegal value.
    """

    chunk: int  # elements of a row per instruction of the program; 256 per warp are 16 bytes per thread
    num_warps: int  # warps that share a row

    def __post_init__(self) -> None:
        if self.chunk not in CHUNKS or self.num_warps not in WARPS:
            raise ConfigError(
                f"{self}: expected powers of two, chunk {CHUNKS[0]} to {CHUNKS[-1]} and num_warps 1 to 16"
            )

    def __str__(self) -> str:
        return f"c{self.chunk} w{self.num_warps}"


def default_tile(k: int, held: int = 96) -> RowTile:
    """The default tile of a row of k elements: 256 elements per warp, at most `held` per thread, the least padding.

    If two chunks pad equally, the smaller one is taken: each thread repeats the work that is done once per row.
    """
    fitting = [chunk for chunk in CHUNKS[:4] if k * 8 <= held * chunk] or [CHUNKS[3]]
    chunk = min(fitting, key=lambda c: (-(-k // c) * c, c))
    return RowTile(chunk, chunk // 256)


@triton.jit
def _neighbours(v):
    """[n] -> [n / 2]: v[0] + v[1], v[2] + v[3], ..."""
    return tl.sum(tl.reshape(v, [v.shape[0] // 2, 2]), 1)


INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(_neighbours, triton.JITFunction))


@triton.jit
def _halves(v):
    """[n] -> [n / 2]: the first half plus the second half."""
    return tl.sum(tl.reshape(v, [2, v.shape[0] // 2]), 0)


@triton.jit
def widen(x):
    """x as fp32, exactly.

    A bf16 number is the upper half of its fp32, which one instruction extracts. Triton's conversion takes two.
    """
    if x.dtype == tl.bfloat16 and not INTERPRETED:
        x = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    return x.to(tl.float32)


@triton.jit
def load_chunk(ptr, c: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk c of the row at ptr, [CHUNK] of the stored dtype; zeros past K."""
    at = c * CHUNK + tl.arange(0, CHUNK)
    if (c + 1) * CHUNK <= K:
        return tl.load(ptr + at)
    return tl.load(ptr + at, mask=at < K, other=0.0)


@triton.jit
def store_chunk(ptr, value, c: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Store chunk c of the row at ptr, up to K."""
    at = c * CHUNK + tl.arange(0, CHUNK)
    if (c + 1) * CHUNK <= K:
        tl.store(ptr + at, value)
    else:
        tl.store(ptr + at, value, mask=at < K)


@triton.jit
def load_row(ptr, K: tl.constexpr, CHUNK: tl.constexpr):
    """All chunks of the row at ptr as a tuple, in the stored dtype. Every load is issued before the first use."""
    xs = ()
    for c in tl.static_range((K + CHUNK - 1) // CHUNK):
        xs = xs + (load_chunk(ptr, c, K, CHUNK),)  # noqa: RUF005  Triton has no unpacking
    return xs


@triton.jit
def widen_row(xs):
    """The chunks of the tuple as fp32."""
    wide = ()
    for c in tl.static_range(len(xs)):
        wide = wide + (widen(xs[c]),)  # noqa: RUF005
    return wide


@triton.jit
def _fold(parts, HALF: tl.constexpr):
    """Each of the first HALF parts plus the part HALF further on; an absent part is zero."""
    sums = ()
    for g in tl.static_range(HALF):
        if g + HALF < len(parts):
            sums = sums + (parts[g] + parts[g + HALF],)  # noqa: RUF005
        elif g < len(parts):
            sums = sums + (parts[g],)  # noqa: RUF005
    return sums


@triton.jit
def sums_of_rows(v):
    """Row sums [T, n] -> [T, 1] in the order of the module's docstring; n is a power of two up to 256."""
    for _ in tl.static_range(8):
        if v.shape[1] > 1:
            v = tl.sum(tl.reshape(v, [v.shape[0], v.shape[1] // 2, 2]), 2)
    return v


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 x rounded to a value of DTYPE, ties to even; the result stays fp32."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return widen(x.to(DTYPE))


@triton.jit
def _sum_eighths(v):
    """The second half of the order of additions, after the sums of eight neighbours: [n] -> a scalar, n 32 to 256."""
    for _ in tl.static_range(3):
        if v.shape[0] > 32:
            v = _halves(v)
    for _ in tl.static_range(5):
        if v.shape[0] > 1:
            v = _neighbours(v)
    return tl.sum(v, 0)  # of one element


@triton.jit
def mean_square(xs, K: tl.constexpr, CHUNK: tl.constexpr):
    """mean(x * x) of the row in the tuple, in the order of the module's docstring. CHUNK <= 2048."""
    GROUPS: tl.constexpr = BLOCK // CHUNK
    parts = ()
    for g in tl.static_range(GROUPS):
        if g < len(xs):
            acc = xs[g] * xs[g]
            for c in tl.static_range(g + GROUPS, len(xs), GROUPS):
                acc += xs[c] * xs[c]
            parts = parts + (_neighbours(_neighbours(_neighbours(acc))),)  # noqa: RUF005
    for level in tl.static_range(1, 4):
        if (GROUPS >> level) > 0:
            parts = _fold(parts, GROUPS >> level)
    return tl.div_rn(_sum_eighths(parts[0]), K * 1.0)


@triton.jit
def reciprocal_root(mean, eps):
    """1 / sqrt(mean + eps): three IEEE operations."""
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def larger(top, y):
    """max(top, |y|), NaN if either is: one instruction."""
    return tl.maximum(top, tl.abs(y), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_scale(top):
    """s = amax / 127, or NaN for an infinite or NaN amax. top: [n] maxima of |y|."""
    # as integers: they sort like the numbers, with NaN on top. A reduction of floats would drop NaN.
    bits = tl.max(top.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.where(bits < 0x7F800000, tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0), float("nan"))


@triton.jit
def is_ordinary(s):
    """Whether `quotient` serves a row of scale s. False in the interpreter, which has no fused operation."""
    ordinary = (s >= S_ORDINARY) | (s == 0)
    if INTERPRETED:
        ordinary = False
    return ordinary


@triton.jit
def reciprocal_and_rest(s):
    """r = RN(1 / s) and l = (1 - s r) r, once per row; 0 for s = 0, so that its quotients are 0."""
    r = tl.where(s > 0, tl.div_rn(1.0, tl.where(s > 0, s, 1.0)), 0.0)
    return r, tl.fma(-s, r, 1.0) * r


@triton.jit
def quotient(y, s, r, rest):
    """rint(y / s) as int8, in four instructions, for an ordinary row: see the module's docstring."""
    q = tl.fma(y, r, y * rest)
    q = tl.fma(tl.fma(-s, q, y), r, q) + ROUNDER
    return q.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def clamped_quotient(y, s):
    """clamp(rint(y / s), -127, 127) as int8 by IEEE division, for any row; 0 where s is 0 or NaN."""
    q = tl.minimum(tl.maximum(tl.div_rn(y, tl.where(s > 0, s, 1.0)), -127.0), 127.0)
    q = tl.where(s > 0, q, 0.0) + ROUNDER
    return q.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def store_quantized(q_ptr, ys, s, K: tl.constexpr, CHUNK: tl.constexpr):
    """Store q = clamp(rint(y / s), -127, 127) of the row in the tuple; 0 where s is 0 or NaN."""
    if is_ordinary(s):
        r, rest = reciprocal_and_rest(s)
        for c in tl.static_range(len(ys)):
            store_chunk(q_ptr, quotient(ys[c], s, r, rest), c, K, CHUNK)
    else:
        for c in tl.static_range(len(ys)):
            store_chunk(q_ptr, clamped_quotient(ys[c], s), c, K, CHUNK)


def launch_rows(
    function: Any,
    grid: tuple[int, int],
    tensors: tuple[torch.Tensor, ...],
    strides: tuple[int, ...],
    *,
    free: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
    num_warps: int,
    **constants: Any,
) -> None:
    """Launch a row kernel with the parameters tensors, free, strides, floats, constants, in this order.

    free: integers that the kernel is not specialized on.
    """
    dtypes = aligned_dtypes(tensors, strides)
    values = tuple(constants.items())
    with on_device(tensors[0]):
        launch_cached(
            function, grid, (*tensors, *free, *strides, *floats), values, (("num_warps", num_warps),),
            dtypes and (*dtypes, values),
        )  # fmt: skip


def check_matrix(name: str, x: torch.Tensor, shape: tuple[int, int] | None = None) -> None:
    """Raises ShapeError unless x is [M, K] (of `shape`, if given) of bf16, fp16 or fp32, contiguous along K."""
    expected = "[M, K]" if shape is None else str(list(shape))
    if x.dim() != 2 or x.dtype not in FLOATS or (shape is not None and tuple(x.shape) != shape):
        raise ShapeError(
            f"{name} {x.dtype} {tuple(x.shape)}: expected {expected} of bf16, fp16 or fp32; reshape or cast first"
        )
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ShapeError(f"{name} has strides {x.stride()}: the last must be 1; call .contiguous() first")


def check_vector(name: str, v: torch.Tensor, length: int) -> None:
    """Raises ShapeError unless v is a contiguous [length] of bf16, fp16 or fp32."""
    if v.shape != (length,) or v.dtype not in FLOATS or not v.is_contiguous():
        raise ShapeError(f"{name} {v.dtype} {tuple(v.shape)}: expected a contiguous [{length}] of bf16, fp16 or fp32")


def check_images(name: str, v: torch.Tensor, m: int, k: int) -> int:
    """M / B, the rows of one image. Raises ShapeError unless v is [B, K] and B divides M."""
    check_matrix(name, v)
    if v.shape[1] != k or v.shape[0] < 1 or m % v.shape[0]:
        raise ShapeError(f"{name} {tuple(v.shape)}: expected [B, {k}], one row per image, with B a divisor of M = {m}")
    return m // v.shape[0]


def check_held(k: int) -> None:
    """Raises ShapeError if a row is too long for registers."""
    if not 1 <= k <= K_MAX_HELD:
        raise ShapeError(f"K = {k}: expected 1 to {K_MAX_HELD}, which registers hold; use torch, then `quantize`")


def check_one_device(*tensors: torch.Tensor | None) -> None:
    """Raises ShapeError if the tensors are on several devices."""
    if len({t.device for t in tensors if t is not None}) > 1:
        raise ShapeError("the tensors are on several devices; move them to one")


def check_tree(tile: RowTile) -> None:
    """Raises ConfigError if a chunk of `tile` is larger than the blocks in which the mean of squares is defined."""
    if tile.chunk > BLOCK.value:
        raise ConfigError(f"{tile}: expected a chunk of at most {BLOCK.value} in a kernel with a norm")


@overload
def interpreter_fp32(x: torch.Tensor) -> torch.Tensor: ...
@overload
def interpreter_fp32(x: None) -> None: ...
def interpreter_fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in fp32 for the interpreter, which converts subnormal bf16 numbers wrongly; x itself on a GPU."""
    return x.float() if x is not None and INTERPRETED.value else x
