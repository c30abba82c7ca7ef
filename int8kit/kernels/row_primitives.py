"""What the kernels over rows share: a row held in registers, its mean of squares, and its quantization.

A program holds one row as a tuple of chunks, each [CHUNK] fp32. Every input byte is read once; K = 4608 is nine chunks
of 512 without a masked lane, where one power of two would be 8192 wide and almost half empty. Several rows a program,
to load the weight once for all, were rejected: Triton then gives the two shapes different layouts, and exchanges them
through shared memory.

**The mean of squares is defined to the bit**, so that no result depends on the tile, the card or the compiler. The
squares, padded with zeros to blocks of 2048, are added in one order:

    [J, 8, 32, 8]  blocks added one to the next -> [8, 32, 8]  neighbours, three times -> [8, 32]
                   halves, three times -> [32]                 neighbours, five times  -> one

Any reduction of more than two elements has an order that Triton takes from the layout. Here each is of exactly two,
and a + b = b + a to the bit: whether the two are in one thread, in two lanes or in two warps changes the cost only. The
axes are what one thread's 16 bytes, a warp and eight warps hold, so nearly all additions stay inside a thread.

**Quotients y / s are IEEE's, at four instructions.** `div_rn` takes a dozen, a special-function one among them, for
each element, though s is the row's. With r = RN(1 / s), made once a row, and l = (1 - s r) r, what is left of 1 / s:

    q0 = RN(y r + RN(y l))    off by less than one unit in the last place
    d = y - s q0              exact in one fused operation
    q = RN(q0 + d r)          RN(y / s), by Markstein's theorem

which needs d to be representable: so it is for s >= 2**-100 and q >= 1/4, and a smaller q rounds to 0 anyway. Other
rows, and all rows in Triton's interpreter, which has no fused operation, go through `div_rn` and a clamp. Where s is a
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
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2**23: added, it rounds to an integer, ties to even
S_ORDINARY: tl.constexpr = tl.constexpr(2.0**-100)


@dataclass(frozen=True)
class RowTile:
    """How a kernel over rows is cut. Any legal value gives the same bits; only the time differs.

    Raises ConfigError for one that is not legal.
    """

    chunk: int  # elements of a row that one instruction of the program covers: 256 a warp are 16 bytes a thread
    num_warps: int  # warps that share a row

    def __post_init__(self) -> None:
        if self.chunk not in CHUNKS or self.num_warps not in WARPS:
            raise ConfigError(f"{self}: legal are chunk {CHUNKS[0]} to {CHUNKS[-1]}, num_warps 1 to 16, powers of two")

    def __str__(self) -> str:
        return f"c{self.chunk} w{self.num_warps}"


def default_tile(k: int, held: int = 96) -> RowTile:
    """256 elements a warp, in the chunks that pad K least, the smaller of equals, at most `held` elements a thread.

    The smaller, because what is done once a row is done by each of its threads.
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
    """[n] -> [n / 2]: the first half plus the second."""
    return tl.sum(tl.reshape(v, [2, v.shape[0] // 2]), 0)


@triton.jit
def widen(x):
    """x as fp32, exactly. A bf16 number is its own upper half: one instruction, where Triton's conversion takes two."""
    if x.dtype == tl.bfloat16 and not INTERPRETED:
        x = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    return x.to(tl.float32)


@triton.jit
def load_chunk(ptr, c: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk c of the row at ptr, [CHUNK], as it lies there; zeros past K."""
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
    """All chunks of the row at ptr as a tuple, as they lie there: every load is issued before the first is used."""
    xs = ()
    for c in tl.static_range((K + CHUNK - 1) // CHUNK):
        xs = xs + (load_chunk(ptr, c, K, CHUNK),)  # noqa: RUF005  Triton knows no unpacking
    return xs


@triton.jit
def widen_row(xs):
    """The tuple's chunks as fp32."""
    wide = ()
    for c in tl.static_range(len(xs)):
        wide = wide + (widen(xs[c]),)  # noqa: RUF005
    return wide


@triton.jit
def _fold(parts, HALF: tl.constexpr):
    """Each part of the first HALF plus the one HALF further on; a part that is not there is zero."""
    sums = ()
    for g in tl.static_range(HALF):
        if g + HALF < len(parts):
            sums = sums + (parts[g] + parts[g + HALF],)  # noqa: RUF005
        elif g < len(parts):
            sums = sums + (parts[g],)  # noqa: RUF005
    return sums


@triton.jit
def sums_of_rows(v):
    """[T, n] -> [T, 1], n a power of two up to 256: neighbours until one is left, which is the module's order there."""
    for _ in tl.static_range(8):
        if v.shape[1] > 1:
            v = tl.sum(tl.reshape(v, [v.shape[0], v.shape[1] // 2, 2]), 2)
    return v


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 x rounded to a value of DTYPE, ties to even, and still fp32."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return widen(x.to(DTYPE))


@triton.jit
def _sum_eighths(v):
    """The rest of the module's order, from the sums of eight neighbours on: [n] -> a scalar, n from 32 to 256."""
    for _ in tl.static_range(3):
        if v.shape[0] > 32:
            v = _halves(v)
    for _ in tl.static_range(5):
        if v.shape[0] > 1:
            v = _neighbours(v)
    return tl.sum(v, 0)  # of one element


@triton.jit
def mean_square(xs, K: tl.constexpr, CHUNK: tl.constexpr):
    """mean(x * x) over the row that the tuple holds, in the order of the module's docstring. CHUNK <= 2048."""
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
    """s = amax / 127, NaN for an infinite or NaN amax; top [n] holds maxima of |y|."""
    # as integers, whose order is that of the numbers with NaN on top: a reduction of floats would drop NaN
    bits = tl.max(top.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return tl.where(bits < 0x7F800000, tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0), float("nan"))


@triton.jit
def store_quantized(q_ptr, ys, s, K: tl.constexpr, CHUNK: tl.constexpr):
    """q = clamp(rint(y / s), -127, 127) for the row that the tuple holds; 0 where s is 0 or NaN."""
    ordinary = (s >= S_ORDINARY) | (s == 0)
    if INTERPRETED:
        ordinary = False
    if ordinary:
        r = tl.where(s > 0, tl.div_rn(1.0, tl.where(s > 0, s, 1.0)), 0.0)  # s = 0 gives q = 0, as it shall
        rest = tl.fma(-s, r, 1.0) * r
        for c in tl.static_range(len(ys)):
            q = tl.fma(ys[c], r, ys[c] * rest)
            q = tl.fma(tl.fma(-s, q, ys[c]), r, q) + ROUNDER
            store_chunk(q_ptr, q.to(tl.int32, bitcast=True).to(tl.int8), c, K, CHUNK)
    else:
        divisor = tl.where(s > 0, s, 1.0)
        for c in tl.static_range(len(ys)):
            q = tl.minimum(tl.maximum(tl.div_rn(ys[c], divisor), -127.0), 127.0)
            q = tl.where(s > 0, q, 0.0) + ROUNDER
            store_chunk(q_ptr, q.to(tl.int32, bitcast=True).to(tl.int8), c, K, CHUNK)


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
    """Launch a kernel whose parameters are tensors, free integers (not specialized on), strides, floats, constants."""
    dtypes = aligned_dtypes(tensors, strides)
    values = tuple(constants.items())
    with on_device(tensors[0]):
        launch_cached(
            function, grid, (*tensors, *free, *strides, *floats), values, (("num_warps", num_warps),),
            dtypes and (*dtypes, values),
        )  # fmt: skip


def check_matrix(name: str, x: torch.Tensor, shape: tuple[int, int] | None = None) -> None:
    """Raises ShapeError unless x is [M, K] (of `shape`, if given) of bf16, fp16 or fp32, contiguous along K."""
    legal = "[M, K]" if shape is None else str(list(shape))
    if x.dim() != 2 or x.dtype not in FLOATS or (shape is not None and tuple(x.shape) != shape):
        raise ShapeError(
            f"{name} {x.dtype} {tuple(x.shape)}: legal is {legal} of bf16, fp16 or fp32; reshape or cast first"
        )
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ShapeError(f"{name} has strides {x.stride()}: the last must be 1; call .contiguous() first")


def check_vector(name: str, v: torch.Tensor, length: int) -> None:
    """Raises ShapeError unless v is a contiguous [length] of bf16, fp16 or fp32."""
    if v.shape != (length,) or v.dtype not in FLOATS or not v.is_contiguous():
        raise ShapeError(f"{name} {v.dtype} {tuple(v.shape)}: legal is a contiguous [{length}] of bf16, fp16 or fp32")


def check_images(name: str, v: torch.Tensor, m: int, k: int) -> int:
    """The rows that one of v's B rows serves, M / B. Raises ShapeError unless v is [B, K] and B divides M."""
    check_matrix(name, v)
    if v.shape[1] != k or v.shape[0] < 1 or m % v.shape[0]:
        raise ShapeError(f"{name} {tuple(v.shape)}: legal is [B, {k}] with B a divisor of M = {m}; one row an image")
    return m // v.shape[0]


def check_held(k: int) -> None:
    """Raises ShapeError if a row is too long for registers."""
    if not 1 <= k <= K_MAX_HELD:
        raise ShapeError(f"K = {k}: legal is 1 to {K_MAX_HELD}, which registers hold; use torch, then `quantize`")


def check_one_device(*tensors: torch.Tensor | None) -> None:
    """Raises ShapeError if the tensors are on several devices."""
    if len({t.device for t in tensors if t is not None}) > 1:
        raise ShapeError("the tensors are on several devices; move them to one")


def check_tree(tile: RowTile) -> None:
    """Raises ConfigError if a chunk of `tile` is larger than the block that the mean of squares is defined by."""
    if tile.chunk > BLOCK.value:
        raise ConfigError(f"{tile}: chunk at most {BLOCK.value} in a kernel with a norm")


@overload
def exact(x: torch.Tensor) -> torch.Tensor: ...
@overload
def exact(x: None) -> None: ...
def exact(x: torch.Tensor | None) -> torch.Tensor | None:
    """x as the interpreter needs it, in fp32: it converts subnormal bf16 numbers wrongly. On a card, x itself."""
    return x.float() if x is not None and INTERPRETED.value else x
