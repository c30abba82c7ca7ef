"""The kernel for `mma.sync`, in Triton's Gluon dialect: sm_80, 86, 89 and 120, where plain Triton leaves a seventh.

One program makes one tile, or its share of the leftover tiles (`schedule`). Per step of block_k, for 128 x 128 x 128:

    global --cp.async, 16 bytes a thread--> ring of num_stages slots in shared memory (x 16 KB, w 16 KB), swizzled
    slot --ldmatrix--> fragments of 32 columns of K: 32 registers of A and B a warp's 64 x 64 --mma.sync--> sums

What plain Triton's pipeliner does otherwise, and what that costs (docs/kernels.md):
  one barrier a step   Each slot is an allocation of its own and the loop is unrolled over the slots, so the compiler
                       sees that a slot's copy and another slot's reads do not meet. It puts two barriers otherwise.
  fragments ahead      The next 32 columns are loaded before the present ones are multiplied, across steps too: the last
                       of a step loads the first of the next slot. Only between two passes of the unrolled loop nothing
                       is in flight: int8 fragments that cross a loop's edge are unpacked byte by byte, and spill.
  copies spread        x and w are copied at two places of a step. In one bunch they keep the loads of fragments behind
                       them waiting, for all warps at the same time.
  stores of 16 bytes   A thread's sums are pairs of columns, 8 apart. The rows of w are therefore read in an order that
                       makes each thread's columns neighbours: no shuffle and no shared memory in the epilogue.

Copies past K are filled with zeros and read nothing; rows past M or N repeat the last and are not stored.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from int8kit.kernels import tile_scheduler
from int8kit.kernels.activations import silu
from int8kit.kernels.gemm_triton import aligned
from int8kit.kernels.launch import COMPILE_OPTIONS, cdiv, launch_cached
from int8kit.kernels.operands import Operands
from int8kit.kernels.tile_scheduler import combine, part, parts_of, tile_corner
from int8kit.spec import TileConfig, warp_grid

async_copy = tile_scheduler.with_names(ampere.async_copy, async_copy_global_to_shared="async_load")
FRAGMENT_K = 32  # columns of K that one int8 mma.sync takes
STRIDE_MAX = 2**23  # a tile has up to 256 rows, addressed in 31 bits
PASS_K = {64: 384, 128: 768}  # by block_k: columns of K in one pass of the unrolled loop, at least; half costs 2 to 4 %


@gluon.jit
def _copy(slot, ptr, offsets, ks, k, end):
    """Start the copy of one operand's step into its slot."""
    async_copy.async_copy_global_to_shared(slot, ptr + (offsets + k), mask=ks + k < end)


@gluon.jit
def _fragments(x_slot, w_slot, PIECE: gl.constexpr, WIDTH: gl.constexpr, mma: gl.constexpr):
    a = x_slot.slice(PIECE * WIDTH, WIDTH, dim=1).load(gl.DotOperandLayout(0, mma, 4))
    b = w_slot.slice(PIECE * WIDTH, WIDTH, dim=1).permute((1, 0)).load(gl.DotOperandLayout(1, mma, 4))
    return a, b


@gluon.jit
def _accumulate(
    x_slots, w_slots, x_ptr, w_ptr, x_offsets, w_offsets, ks, first, end,
    mma: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Sums over K from `first` up to `end`, in mma's own layout; the loop is unrolled STEPS, a multiple of STAGES."""
    STAGES: gl.constexpr = len(x_slots)
    BLOCK_K: gl.constexpr = x_slots[0].shape[1]
    BLOCK_M: gl.constexpr = x_slots[0].shape[0]
    BLOCK_N: gl.constexpr = w_slots[0].shape[0]
    PIECES: gl.constexpr = BLOCK_K // WIDTH
    # where in a step the copies start: before, or behind, the load of the fragments that follow piece j; -1: not there
    AT_ONCE: gl.constexpr = STAGES == 2  # a copy that starts late would not be there in time
    W_BEFORE: gl.constexpr = 0 if AT_ONCE or PIECES == 2 else -1
    X_BEFORE: gl.constexpr = 0 if AT_ONCE else 1 if PIECES == 2 else -1
    X_BEHIND: gl.constexpr = -1 if AT_ONCE or PIECES == 2 else 0
    W_BEHIND: gl.constexpr = -1 if AT_ONCE or PIECES == 2 else 1
    LAST_COPY: gl.constexpr = 0 if AT_ONCE else 1
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, mma)
    for i in gl.static_range(STAGES - 1):
        _copy(x_slots[i], x_ptr, x_offsets, ks, first + i * BLOCK_K, end)
        _copy(w_slots[i], w_ptr, w_offsets, ks, first + i * BLOCK_K, end)
        async_copy.commit_group()
    rest = first + (end - first + BLOCK_K - 1) // BLOCK_K // STEPS * (STEPS * BLOCK_K)
    for k in range(first, rest, STEPS * BLOCK_K):
        async_copy.wait_group(STAGES - 2)
        a, b = _fragments(x_slots[0], w_slots[0], 0, WIDTH, mma)
        for i in gl.static_range(STEPS):
            later = k + (i + STAGES - 1) * BLOCK_K  # goes into the slot of the step before, which all warps have read
            for j in gl.static_range(PIECES):
                if j == W_BEFORE:
                    _copy(w_slots[(i + STAGES - 1) % STAGES], w_ptr, w_offsets, ks, later, end)
                if j == X_BEFORE:
                    _copy(x_slots[(i + STAGES - 1) % STAGES], x_ptr, x_offsets, ks, later, end)
                if j + 1 < PIECES:
                    next_a, next_b = _fragments(x_slots[i % STAGES], w_slots[i % STAGES], j + 1, WIDTH, mma)
                if j == X_BEHIND:
                    _copy(x_slots[(i + STAGES - 1) % STAGES], x_ptr, x_offsets, ks, later, end)
                if j == W_BEHIND:
                    _copy(w_slots[(i + STAGES - 1) % STAGES], w_ptr, w_offsets, ks, later, end)
                if j == LAST_COPY:
                    async_copy.commit_group()
                if j + 1 == PIECES and i + 1 < STEPS:
                    async_copy.wait_group(STAGES - 2)
                    next_a, next_b = _fragments(x_slots[(i + 1) % STAGES], w_slots[(i + 1) % STAGES], 0, WIDTH, mma)
                acc = mma_v2(a, b, acc)
                if j + 1 < PIECES or i + 1 < STEPS:
                    a = next_a
                    b = next_b
    for i in gl.static_range(STEPS - 1):  # the steps that fill no pass
        if rest + i * BLOCK_K < end:
            async_copy.wait_group(STAGES - 2)
            later = rest + (i + STAGES - 1) * BLOCK_K
            _copy(x_slots[(i + STAGES - 1) % STAGES], x_ptr, x_offsets, ks, later, end)
            _copy(w_slots[(i + STAGES - 1) % STAGES], w_ptr, w_offsets, ks, later, end)
            async_copy.commit_group()
            for j in gl.static_range(PIECES):
                a, b = _fragments(x_slots[i % STAGES], w_slots[i % STAGES], j, WIDTH, mma)
                acc = mma_v2(a, b, acc)
    async_copy.wait_group(0)
    return acc


@gluon.jit
def _column(i, WARPS_N: gl.constexpr, RUN: gl.constexpr):
    """The tile's column whose row of w lies in row i of a slot.

    The mma leaves a thread columns 2q and 2q + 1 of each 8 (q of 4 threads), in RUN 8s that lie 8 * WARPS_N apart.
    They become 2 * RUN neighbours: i = 8 * WARPS_N * RUN * g + 8 * WARPS_N * j + 8 * w + 2 * q + e -> column
    2 * RUN * (4 * (WARPS_N * g + w) + q) + 2 * j + e.
    """
    g = i // (8 * WARPS_N * RUN)
    j = i // (8 * WARPS_N) % RUN
    warp = i // 8 % WARPS_N
    return 2 * RUN * (4 * (WARPS_N * g + warp) + i // 2 % 4) + 2 * j + i % 2


@gluon.jit
def _tile(
    x_slots, w_slots, x_ptr, w_ptr, row, col, first, end, M, N, stride_xm, stride_wn,
    mma: gl.constexpr, wide: gl.constexpr, RUN: gl.constexpr, STEPS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """One tile's sums over K from `first` up to `end`, in layout `wide`."""
    BLOCK_M: gl.constexpr = x_slots[0].shape[0]
    BLOCK_N: gl.constexpr = w_slots[0].shape[0]
    BLOCK_K: gl.constexpr = x_slots[0].shape[1]
    WARPS_N: gl.constexpr = mma.warps_per_cta[1]
    copy: gl.constexpr = gl.BlockedLayout(
        [1, 16], [512 // BLOCK_K, BLOCK_K // 16], [mma.warps_per_cta[0] * WARPS_N, 1], [1, 0]
    )
    ks = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, copy)), 0)
    # 64-bit offsets of the tile, 32-bit ones within its at most 256 rows: pairs of registers for each row would spill
    x_rows = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(1, copy)), M - 1 - row)
    w_rows = gl.minimum(_column(gl.arange(0, BLOCK_N, gl.SliceLayout(1, copy)), WARPS_N, RUN), N - 1 - col)
    acc = _accumulate(
        x_slots, w_slots, x_ptr + row.to(gl.int64) * stride_xm, w_ptr + col.to(gl.int64) * stride_wn,
        gl.expand_dims(x_rows * stride_xm, 1) + ks, gl.expand_dims(w_rows * stride_wn, 1) + ks, ks, first, end,
        mma, WIDTH, STEPS,
    )  # fmt: skip
    groups: gl.constexpr = BLOCK_N // (8 * WARPS_N * RUN)
    acc = acc.reshape(BLOCK_M, groups, RUN, WARPS_N, 4, 2).permute(0, 1, 3, 4, 2, 5).reshape(BLOCK_M, BLOCK_N)
    return gl.convert_layout(acc, wide)  # renames registers; moves nothing between threads


@gluon.jit
def _store(
    acc, row, col, sx_ptr, sw_ptr, bias_ptr, out_ptr, M, N, stride_om,
    HAS_BIAS: gl.constexpr, SUMS_ONLY: gl.constexpr, SWIGLU: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = acc.type.layout
    BLOCK_N: gl.constexpr = acc.shape[1]
    rows = row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    if SUMS_ONLY:
        y = acc
    else:
        sx = gl.load(sx_ptr + rows, mask=rows < M, other=0.0)
        sw = gl.load(sw_ptr + cols, mask=cols < N, other=0.0)
        y = acc.to(gl.float32) * gl.expand_dims(sx, 1) * gl.expand_dims(sw, 0)
        if HAS_BIAS:
            y += gl.expand_dims(gl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(gl.float32), 0)
        if SWIGLU:
            gate, up = y.reshape(acc.shape[0], BLOCK_N // 2, 2).split()
            y = silu(gate) * up
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
    slots_ptr,
    done_ptr,
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
    STEPS: gl.constexpr,
    WIDTH: gl.constexpr,
    RUN: gl.constexpr,
    STREAM_K: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SUMS_ONLY: gl.constexpr,
    SWIGLU: gl.constexpr,
    mma: gl.constexpr,
    wide: gl.constexpr,
):
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // BLOCK_K, BLOCK_K // 16, [1, 0])
    x_slots = ()
    w_slots = ()
    for _ in gl.static_range(STAGES):
        x_slots = x_slots + (gl.allocate_shared_memory(gl.int8, [BLOCK_M, BLOCK_K], swizzled),)
        w_slots = w_slots + (gl.allocate_shared_memory(gl.int8, [BLOCK_N, BLOCK_K], swizzled),)
    pid = gl.program_id(0)
    if STREAM_K:
        # the first programs share the leftover tiles, each further one makes a whole tile
        steps = gl.cdiv(K, BLOCK_K)
        tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
        total = tiles % workers * steps
        shares = pid < workers
        for i in range(gl.where(shares, parts_of(pid, total, workers, steps), 1)):
            index, k0, k1 = part(pid, i, total, workers, steps)
            tile = gl.where(shares, tiles - tiles % workers + index, pid - workers)
            k0 = gl.where(shares, k0, 0)
            k1 = gl.where(shares, k1, steps)
            row, col = tile_corner(tile, M, N, group_m, BLOCK_M, BLOCK_N)
            acc = _tile(
                x_slots, w_slots, x_ptr, w_ptr, row, col, k0 * BLOCK_K, gl.minimum(k1 * BLOCK_K, K), M, N,
                stride_xm, stride_wn, mma, wide, RUN, STEPS, WIDTH,
            )  # fmt: skip
            complete = True
            if k1 - k0 < steps:
                complete, acc = combine(acc, slots_ptr, done_ptr, pid, i, index, k1 - k0, total, workers, steps, 1, 0)
            if complete:
                _store(acc, row, col, sx_ptr, sw_ptr, bias_ptr, out_ptr, M, N, stride_om, HAS_BIAS, SUMS_ONLY, SWIGLU)
    else:
        row, col = tile_corner(pid, M, N, group_m, BLOCK_M, BLOCK_N)
        acc = _tile(
            x_slots, w_slots, x_ptr, w_ptr, row, col, 0, K, M, N, stride_xm, stride_wn, mma, wide, RUN, STEPS, WIDTH
        )
        _store(acc, row, col, sx_ptr, sw_ptr, bias_ptr, out_ptr, M, N, stride_om, HAS_BIAS, SUMS_ONLY, SWIGLU)


def _run(config: TileConfig) -> int:
    """How many pairs of columns a thread gathers: 4, for stores of 16 bytes of bf16, where the tile allows."""
    return min(4, config.block_n // (8 * warp_grid(config)[1]))


def _wide(config: TileConfig) -> gl.DistributedLinearLayout:
    """The layout of the sums after `_column`'s exchange: as mma's, a thread's neighbouring columns first."""

    def doubling(start: int, stop: int) -> list[int]:
        return [start << i for i in range((stop // start).bit_length() - 1)]

    (warps_m, warps_n), run = warp_grid(config), _run(config)
    columns = 8 * run  # of one warp, before the next warp's
    registers = [[0, c] for c in doubling(1, 2 * run)] + [[8, 0]]
    registers += [[0, c] for c in doubling(columns * warps_n, config.block_n)]
    registers += [[r, 0] for r in doubling(16 * warps_m, config.block_m)]
    lanes = [[0, 2 * run], [0, 4 * run], [1, 0], [2, 0], [4, 0]]
    warps = [[0, c] for c in doubling(columns, columns * warps_n)] + [[r, 0] for r in doubling(16, 16 * warps_m)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [config.block_m, config.block_n])


@cache
def _constants(
    config: TileConfig, has_bias: bool, sums_only: bool = False, swiglu: bool = False
) -> tuple[tuple[str, Any], ...]:
    """The kernel's compile-time values, as the launcher and the offline compiler pass them."""
    return (
        ("BLOCK_M", config.block_m),
        ("BLOCK_N", config.block_n),
        ("BLOCK_K", config.block_k),
        ("STAGES", config.num_stages),
        ("STEPS", config.num_stages * cdiv(PASS_K[config.block_k], config.num_stages * config.block_k)),
        ("WIDTH", FRAGMENT_K),
        ("RUN", _run(config)),
        ("STREAM_K", config.stream_k > 0),
        ("HAS_BIAS", has_bias),
        ("SUMS_ONLY", sums_only),
        ("SWIGLU", swiglu),
        ("mma", gl.NVMMADistributedLayout([2, 0], list(warp_grid(config)), [16, 8])),
        ("wide", _wide(config)),
    )


def why_not(operands: Operands) -> str | None:
    """The reason why these tensors cannot be copied in 16 bytes, or None."""
    if operands.k % 16:
        return f"K = {operands.k} is no multiple of 16"
    for name, matrix in (("x", operands.xq), ("w", operands.wq)):
        if matrix.data_ptr() % 16 or matrix.stride(0) % 16:
            return f"{name}'s rows do not start at multiples of 16 bytes"
        if matrix.stride(0) >= STRIDE_MAX:
            return f"{name}'s rows are {matrix.stride(0)} bytes apart, {STRIDE_MAX} or more"
    return None


def launch(operands: Operands, config: TileConfig, options: dict[str, Any]) -> None:
    """Launch the kernel on the present device and stream. options: further compile options of Triton."""
    o = operands
    tiles = cdiv(o.m, config.block_m) * cdiv(o.n, config.block_n)
    workers, leftover, slots, done = tile_scheduler.plan(tiles, config, o.xq.device) or (0, 0, o.xq, o.xq)
    values = _constants(config, o.bias is not None, o.sums_only, o.swiglu)
    args = (
        o.xq, o.wq, *o.vectors, o.out, slots, done, o.m, o.n, o.k, o.xq.stride(0), o.wq.stride(0), o.out.stride(0),
        workers, config.group_m,
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


def source(config: TileConfig, *, even_k: bool = True, swiglu: bool = False) -> tuple[Any, dict[str, Any]]:
    """What Triton's compiler is given for `config` with bias and bf16 output, and its options: see `tune.offline`."""
    from triton.experimental.gluon._runtime import GluonASTSource

    values = dict(_constants(config, True, swiglu=swiglu))
    pointers = {"x": "*i8", "w": "*i8", "sx": "*fp32", "sw": "*fp32", "bias": "*bf16", "out": "*bf16"}
    sums = "*i32" if config.stream_k else "*i8"  # without stream-K x stands for them
    signature = {f"{name}_ptr": kind for name, kind in (pointers | {"slots": sums, "done": sums}).items()}
    signature |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om", "workers", "group_m"), "i32")
    signature |= dict.fromkeys(values, "constexpr")
    options = dict(COMPILE_OPTIONS, num_warps=config.num_warps)
    return GluonASTSource(_gemm_mma_sync, signature, values, aligned(signature)), options
