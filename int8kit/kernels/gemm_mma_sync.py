"""GEMM for `mma.sync` in Triton's Gluon dialect: sm_80 and later; the tuner leaves it out on sm_90.

As sm_86 code, plain Triton is a seventh slower. One program computes one tile, or its range of the leftover tiles
(`stream_k`). One step of block_k, for a tile of
128 x 128 x 128:

    global memory --cp.async, 16 bytes per thread--> one of num_stages slots in shared memory (x 16 KB, w 16 KB)
    slot --ldmatrix--> fragments of 32 columns of K (32 registers of A and B for a warp's 64 x 64) --mma.sync--> acc

The kernel does four things that Triton's pipeliner does not (figures: docs/kernel-experiments.md):

  one barrier per step    Each slot is its own allocation, and the loop is unrolled over the slots. The compiler then
                          sees that the copy into one slot and the reads of another do not meet. Otherwise it emits two
                          barriers.
  fragments ahead         The next 32 columns are loaded before the present ones are multiplied, also across steps: the
                          last fragments of a step load the first ones of the next slot. Nothing is in flight between
                          two passes of the unrolled loop: Triton unpacks int8 fragments that cross a loop's edge byte
                          by byte, and they spill.
  copies spread out       x and w are copied at two places of a step. Copies in one bunch delay the loads of fragments
                          behind them, for all warps at the same time.
  stores of 16 bytes      A thread's accumulators are pairs of columns, 8 apart. The rows of w are read in an order that
                          makes each thread's columns neighbours. The epilogue needs no shuffle and no shared memory.

Copies past K read nothing and fill with zeros. Rows past M or N repeat the last row and are not stored.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from int8kit.kernels import triton_compat
from int8kit.kernels.epilogue import add_bias, dequantize, swiglu
from int8kit.kernels.l2_swizzle import tile_corner
from int8kit.kernels.launch import COMPILE_OPTIONS, cdiv, divisibility, launch_cached
from int8kit.kernels.operands import Operands
from int8kit.kernels.stream_k import fix_up, segment, segment_count, stream_k
from int8kit.spec import TileConfig, warp_grid

async_copy = triton_compat.alias(ampere.async_copy, async_copy_global_to_shared="async_load")
FRAGMENT_K = 32  # columns of K of one int8 mma.sync
STRIDE_MAX = 2**23  # a tile has up to 256 rows, which 31-bit offsets must reach
PASS_K = {64: 384, 128: 768}  # by block_k: least columns of K in one pass of the unrolled loop; half costs 2 to 4 %


@gluon.jit
def _copy(slot, ptr, offsets, ks, k, end):
    """Start the asynchronous copy of one operand's step into its slot."""
    async_copy.async_copy_global_to_shared(slot, ptr + (offsets + k), mask=ks + k < end)


@gluon.jit
def _fragments(x_slot, w_slot, INDEX: gl.constexpr, WIDTH: gl.constexpr, mma: gl.constexpr):
    """Fragments of columns INDEX * WIDTH to (INDEX + 1) * WIDTH of a slot, in registers."""
    a = x_slot.slice(INDEX * WIDTH, WIDTH, dim=1).load(gl.DotOperandLayout(0, mma, 4))
    b = w_slot.slice(INDEX * WIDTH, WIDTH, dim=1).permute((1, 0)).load(gl.DotOperandLayout(1, mma, 4))
    return a, b


@gluon.jit
def _accumulate(
    x_slots, w_slots, x_ptr, w_ptr, x_offsets, w_offsets, ks, first, end,
    mma: gl.constexpr, WIDTH: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """Accumulators of K from `first` up to `end`, in layout mma.

    The loop is unrolled UNROLL steps, a multiple of STAGES. The copies of a step start at these places between the
    loads of fragments L and the products P:

        FRAGMENTS = 4       L1 x P0   L2 w P1   L3 P2   L0' P3        (L0': the first fragments of the next slot)
        FRAGMENTS = 2       w L1 P0   x L0' P1
        STAGES = 2          w x L1 P0 ...                              a later copy would arrive too late
    """
    STAGES: gl.constexpr = len(x_slots)
    BLOCK_K: gl.constexpr = x_slots[0].shape[1]
    BLOCK_M: gl.constexpr = x_slots[0].shape[0]
    BLOCK_N: gl.constexpr = w_slots[0].shape[0]
    FRAGMENTS: gl.constexpr = BLOCK_K // WIDTH
    # the index of the fragments before or behind whose load a copy starts; -1: at no such place
    AT_ONCE: gl.constexpr = STAGES == 2
    W_BEFORE: gl.constexpr = 0 if AT_ONCE or FRAGMENTS == 2 else -1
    X_BEFORE: gl.constexpr = 0 if AT_ONCE else 1 if FRAGMENTS == 2 else -1
    X_BEHIND: gl.constexpr = -1 if AT_ONCE or FRAGMENTS == 2 else 0
    W_BEHIND: gl.constexpr = -1 if AT_ONCE or FRAGMENTS == 2 else 1
    LAST_COPY: gl.constexpr = 0 if AT_ONCE else 1
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, mma)
    for i in gl.static_range(STAGES - 1):
        _copy(x_slots[i], x_ptr, x_offsets, ks, first + i * BLOCK_K, end)
        _copy(w_slots[i], w_ptr, w_offsets, ks, first + i * BLOCK_K, end)
        async_copy.commit_group()
    rest = first + (end - first + BLOCK_K - 1) // BLOCK_K // UNROLL * (UNROLL * BLOCK_K)
    for k in range(first, rest, UNROLL * BLOCK_K):
        async_copy.wait_group(STAGES - 2)
        a, b = _fragments(x_slots[0], w_slots[0], 0, WIDTH, mma)
        for i in gl.static_range(UNROLL):
            later = k + (i + STAGES - 1) * BLOCK_K  # its slot is the one of the step before, which all warps have read
            for j in gl.static_range(FRAGMENTS):
                if j == W_BEFORE:
                    _copy(w_slots[(i + STAGES - 1) % STAGES], w_ptr, w_offsets, ks, later, end)
                if j == X_BEFORE:
                    _copy(x_slots[(i + STAGES - 1) % STAGES], x_ptr, x_offsets, ks, later, end)
                if j + 1 < FRAGMENTS:
                    next_a, next_b = _fragments(x_slots[i % STAGES], w_slots[i % STAGES], j + 1, WIDTH, mma)
                if j == X_BEHIND:
                    _copy(x_slots[(i + STAGES - 1) % STAGES], x_ptr, x_offsets, ks, later, end)
                if j == W_BEHIND:
                    _copy(w_slots[(i + STAGES - 1) % STAGES], w_ptr, w_offsets, ks, later, end)
                if j == LAST_COPY:
                    async_copy.commit_group()
                if j + 1 == FRAGMENTS and i + 1 < UNROLL:
                    async_copy.wait_group(STAGES - 2)
                    next_a, next_b = _fragments(x_slots[(i + 1) % STAGES], w_slots[(i + 1) % STAGES], 0, WIDTH, mma)
                acc = mma_v2(a, b, acc)
                if j + 1 < FRAGMENTS or i + 1 < UNROLL:
                    a = next_a
                    b = next_b
    for i in gl.static_range(UNROLL - 1):  # steps that do not fill a pass
        if rest + i * BLOCK_K < end:
            async_copy.wait_group(STAGES - 2)
            later = rest + (i + STAGES - 1) * BLOCK_K
            _copy(x_slots[(i + STAGES - 1) % STAGES], x_ptr, x_offsets, ks, later, end)
            _copy(w_slots[(i + STAGES - 1) % STAGES], w_ptr, w_offsets, ks, later, end)
            async_copy.commit_group()
            for j in gl.static_range(FRAGMENTS):
                a, b = _fragments(x_slots[i % STAGES], w_slots[i % STAGES], j, WIDTH, mma)
                acc = mma_v2(a, b, acc)
    async_copy.wait_group(0)
    return acc


@gluon.jit
def _column(i, WARPS_N: gl.constexpr, PAIRS: gl.constexpr):
    """Output column computed from row i of the w slot.

    The mma gives a thread the columns 2q and 2q + 1 of every 8 (thread q of 4), in PAIRS groups of 8 that lie
    8 * WARPS_N apart. They become 2 * PAIRS neighbours:

        row i = 8 * WARPS_N * PAIRS * g + 8 * WARPS_N * j + 8 * w + 2 * q + e
        column  2 * PAIRS * (4 * (WARPS_N * g + w) + q) + 2 * j + e
    """
    g = i // (8 * WARPS_N * PAIRS)
    j = i // (8 * WARPS_N) % PAIRS
    warp = i // 8 % WARPS_N
    return 2 * PAIRS * (4 * (WARPS_N * g + warp) + i // 2 % 4) + 2 * j + i % 2


@gluon.jit
def _tile(
    x_slots, w_slots, x_ptr, w_ptr, row, col, first, end, M, N, stride_xm, stride_wn,
    mma: gl.constexpr, out_layout: gl.constexpr, PAIRS: gl.constexpr, UNROLL: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Accumulators of one tile over K from `first` up to `end`, in out_layout."""
    BLOCK_M: gl.constexpr = x_slots[0].shape[0]
    BLOCK_N: gl.constexpr = w_slots[0].shape[0]
    BLOCK_K: gl.constexpr = x_slots[0].shape[1]
    WARPS_N: gl.constexpr = mma.warps_per_cta[1]
    copy: gl.constexpr = gl.BlockedLayout(
        [1, 16], [512 // BLOCK_K, BLOCK_K // 16], [mma.warps_per_cta[0] * WARPS_N, 1], [1, 0]
    )
    ks = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, copy)), 0)
    # a 64-bit offset of the tile and 32-bit offsets within its 256 rows or fewer: 64-bit ones per row would spill
    x_rows = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(1, copy)), M - 1 - row)
    w_rows = gl.minimum(_column(gl.arange(0, BLOCK_N, gl.SliceLayout(1, copy)), WARPS_N, PAIRS), N - 1 - col)
    acc = _accumulate(
        x_slots, w_slots, x_ptr + row.to(gl.int64) * stride_xm, w_ptr + col.to(gl.int64) * stride_wn,
        gl.expand_dims(x_rows * stride_xm, 1) + ks, gl.expand_dims(w_rows * stride_wn, 1) + ks, ks, first, end,
        mma, WIDTH, UNROLL,
    )  # fmt: skip
    groups: gl.constexpr = BLOCK_N // (8 * WARPS_N * PAIRS)
    acc = acc.reshape(BLOCK_M, groups, PAIRS, WARPS_N, 4, 2).permute(0, 1, 3, 4, 2, 5).reshape(BLOCK_M, BLOCK_N)
    return gl.convert_layout(acc, out_layout)  # renames registers; moves nothing between threads


@gluon.jit
def _store(
    acc, row, col, sx_ptr, sw_ptr, bias_ptr, out_ptr, M, N, stride_om,
    HAS_BIAS: gl.constexpr, INT32_OUT: gl.constexpr, SWIGLU: gl.constexpr,
):  # fmt: skip
    """Epilogue of a tile, and its store."""
    layout: gl.constexpr = acc.type.layout
    BLOCK_N: gl.constexpr = acc.shape[1]
    rows = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    if INT32_OUT:
        y = acc
    else:
        sx = gl.load(sx_ptr + rows, mask=rows < M, other=0.0)
        sw = gl.load(sw_ptr + cols, mask=cols < N, other=0.0)
        y = dequantize(acc, gl.expand_dims(sx, 1), gl.expand_dims(sw, 0))
        if HAS_BIAS:
            y = add_bias(y, gl.expand_dims(gl.load(bias_ptr + cols, mask=cols < N, other=0.0), 0))
        if SWIGLU:
            y = swiglu(y)
            rows = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, y.type.layout))
            cols = col // 2 + gl.arange(0, BLOCK_N // 2, gl.SliceLayout(0, y.type.layout))
            N = N // 2
    ptrs = out_ptr + gl.expand_dims(rows.to(gl.int64) * stride_om, 1) + gl.expand_dims(cols, 0)
    mask = gl.expand_dims(rows < M, 1) & gl.expand_dims(cols < N, 0)
    gl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["M", "workers", "group_m"])
def _gemm_mma_sync(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    out_ptr,
    workspace_ptr,
    arrived_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_om,
    workers,
    group_m,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    WIDTH: gl.constexpr,
    PAIRS: gl.constexpr,
    STREAM_K: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    INT32_OUT: gl.constexpr,
    SWIGLU: gl.constexpr,
    mma: gl.constexpr,
    out_layout: gl.constexpr,
):
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // BLOCK_K, BLOCK_K // 16, [1, 0])
    x_slots = ()
    w_slots = ()
    for _ in gl.static_range(STAGES):
        x_slots = x_slots + (gl.allocate_shared_memory(gl.int8, [BLOCK_M, BLOCK_K], swizzled),)
        w_slots = w_slots + (gl.allocate_shared_memory(gl.int8, [BLOCK_N, BLOCK_K], swizzled),)
    pid = gl.program_id(0)
    if STREAM_K:
        # the first programs share the leftover tiles; every further program computes a whole tile
        steps = gl.cdiv(K, BLOCK_K)
        tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
        total = tiles % workers * steps
        is_worker = pid < workers
        for i in range(gl.where(is_worker, segment_count(pid, total, workers, steps), 1)):
            index, k0, k1 = segment(pid, i, total, workers, steps)
            tile = gl.where(is_worker, tiles - tiles % workers + index, pid - workers)
            k0 = gl.where(is_worker, k0, 0)
            k1 = gl.where(is_worker, k1, steps)
            row, col = tile_corner(tile, M, N, group_m, BLOCK_M, BLOCK_N)
            acc = _tile(
                x_slots, w_slots, x_ptr, w_ptr, row, col, k0 * BLOCK_K, gl.minimum(k1 * BLOCK_K, K), M, N,
                stride_xm, stride_wn, mma, out_layout, PAIRS, UNROLL, WIDTH,
            )  # fmt: skip
            complete = True
            if k1 - k0 < steps:
                complete, acc = fix_up(
                    acc, workspace_ptr, arrived_ptr, pid, i, index, k1 - k0, total, workers, steps, 1, 0
                )
            if complete:
                _store(acc, row, col, sx_ptr, sw_ptr, bias_ptr, out_ptr, M, N, stride_om, HAS_BIAS, INT32_OUT, SWIGLU)
    else:
        row, col = tile_corner(pid, M, N, group_m, BLOCK_M, BLOCK_N)
        acc = _tile(
            x_slots, w_slots, x_ptr, w_ptr, row, col, 0, K, M, N, stride_xm, stride_wn, mma, out_layout, PAIRS, UNROLL,
            WIDTH,
        )  # fmt: skip
        _store(acc, row, col, sx_ptr, sw_ptr, bias_ptr, out_ptr, M, N, stride_om, HAS_BIAS, INT32_OUT, SWIGLU)


def _pairs(config: TileConfig) -> int:
    """Pairs of neighbouring columns per thread: 4, for stores of 16 bytes of bf16, where the tile allows it."""
    return min(4, config.block_n // (8 * warp_grid(config)[1]))


def _out_layout(config: TileConfig) -> gl.DistributedLinearLayout:
    """Layout of the accumulators after `_column`'s exchange: as the mma's, a thread's neighbouring columns first."""

    def doubling(start: int, stop: int) -> list[int]:
        return [start << i for i in range((stop // start).bit_length() - 1)]

    (warps_m, warps_n), pairs = warp_grid(config), _pairs(config)
    columns = 8 * pairs  # of one warp, before the columns of the next warp
    registers = [[0, c] for c in doubling(1, 2 * pairs)] + [[8, 0]]
    registers += [[0, c] for c in doubling(columns * warps_n, config.block_n)]
    registers += [[r, 0] for r in doubling(16 * warps_m, config.block_m)]
    lanes = [[0, 2 * pairs], [0, 4 * pairs], [1, 0], [2, 0], [4, 0]]
    warps = [[0, c] for c in doubling(columns, columns * warps_n)] + [[r, 0] for r in doubling(16, 16 * warps_m)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [config.block_m, config.block_n])


@cache
def _constants(
    config: TileConfig, has_bias: bool, int32_out: bool = False, swiglu: bool = False
) -> tuple[tuple[str, Any], ...]:
    """Compile-time values of the kernel, the same for the launcher and for the cross-compiler."""
    return (
        ("BLOCK_M", config.block_m),
        ("BLOCK_N", config.block_n),
        ("BLOCK_K", config.block_k),
        ("STAGES", config.num_stages),
        ("UNROLL", config.num_stages * cdiv(PASS_K[config.block_k], config.num_stages * config.block_k)),
        ("WIDTH", FRAGMENT_K),
        ("PAIRS", _pairs(config)),
        ("STREAM_K", config.stream_k > 0),
        ("HAS_BIAS", has_bias),
        ("INT32_OUT", int32_out),
        ("SWIGLU", swiglu),
        ("mma", gl.NVMMADistributedLayout([2, 0], list(warp_grid(config)), [16, 8])),
        ("out_layout", _out_layout(config)),
    )


def why_not(operands: Operands) -> str | None:
    """The reason why 16-byte copies cannot read these tensors, or None."""
    if operands.k % 16:
        return f"K = {operands.k} is not a multiple of 16"
    for name, matrix in (("x", operands.xq), ("w", operands.wq)):
        if matrix.data_ptr() % 16 or matrix.stride(0) % 16:
            return f"{name}'s rows do not start at multiples of 16 bytes"
        if matrix.stride(0) >= STRIDE_MAX:
            return f"{name}'s rows are {matrix.stride(0)} bytes apart, {STRIDE_MAX} or more"
    return None


def launch(operands: Operands, config: TileConfig, options: dict[str, Any]) -> None:
    """Launch the kernel on the current device and stream. options: further compile options of Triton."""
    o = operands
    tiles = cdiv(o.m, config.block_m) * cdiv(o.n, config.block_n)
    workers, leftover, workspace, arrived = stream_k(tiles, config, o.xq.device) or (0, 0, o.xq, o.xq)
    values = _constants(config, o.bias is not None, o.int32_out, o.swiglu)
    args = (
        o.xq, o.wq, *o.vectors, o.out, workspace, arrived, o.m, o.n, o.k, o.xq.stride(0), o.wq.stride(0),
        o.out.stride(0), workers, config.group_m,
    )  # fmt: skip
    compile_options = {"num_warps": config.num_warps} | options
    launch_cached(
        _gemm_mma_sync,
        (tiles - leftover + workers, 1),
        args,
        values,
        tuple(compile_options.items()),
        o.key and (config, *o.key),
    )


def compiler_source(config: TileConfig, *, swiglu: bool = False) -> tuple[Any, dict[str, Any]]:
    """Source and options that Triton compiles for `config` with bias and bf16 output: see `tune.cross_compile`."""
    from triton.experimental.gluon._runtime import GluonASTSource

    values = dict(_constants(config, True, swiglu=swiglu))
    pointers = {"x": "*i8", "w": "*i8", "sx": "*fp32", "sw": "*fp32", "bias": "*bf16", "out": "*bf16"}
    buffer = "*i32" if config.stream_k else "*i8"  # without stream-K, x stands in for workspace and counters
    pointers |= {"workspace": buffer, "arrived": buffer}
    signature = {f"{name}_ptr": kind for name, kind in pointers.items()}
    signature |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om", "workers", "group_m"), "i32")
    signature |= dict.fromkeys(values, "constexpr")
    options = dict(COMPILE_OPTIONS, num_warps=config.num_warps)
    return GluonASTSource(_gemm_mma_sync, signature, values, divisibility(signature)), options
