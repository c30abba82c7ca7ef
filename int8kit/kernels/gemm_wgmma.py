"""The kernel for `wgmma`, in Triton's Gluon dialect: sm_90, warp-specialized and persistent.

One program a multiprocessor makes tiles p, p + P, p + 2P, ... and its share of the leftover ones (`schedule`), with
three groups of warps that meet in shared memory:

  loader         1 warp, 24 registers a thread: TMA copies of block_m x 128 of x and block_n x 128 of w into the next of
                 num_stages slots of a ring, for every step of every tile, as far ahead as slots are free. TMA fills
                 with zeros past M, N and K and clips what is stored: there is no tail code. But a row of zeros costs
                 as much as a row or more, so a box of x wholly past M is not copied: what its slot held before is
                 multiplied, and not stored. A tile of 64 rows has boxes of 16, others one a multiplier.
  multipliers    2 x 4 warps, 240 registers a thread: m64n128k32 wgmma out of the slots into up to 128 sums a thread,
                 then epilogue in chunks of 64 bytes a row through two staging buffers, stored by TMA.

block_m of 64 and 128, "in turn": the two multipliers take alternate tiles, one multiplies while the other scales and
stores. block_m of 256, "shared": both make half of each tile; a slot is read by both, so a product costs a quarter less
traffic out of L2, and less power, but only a few steps' lag hides the epilogue. If the tiles of the last wave, which is
seldom full, are at most half as many as programs, they are halved: each half is one multiplier's of a program of its
own. Which way is faster depends on K, on the waves, and on the power that the card has left.

mbarriers, each of one completion a phase (a wait for parity 1 passes at once in a barrier's first phase):
  full[slot]   armed with its bytes by the loader, completed by TMA; a multiplier waits for it before its wgmma
  empty[slot]  a multiplier arrives when the wgmma that read the slot has retired, one step late since one stays in
               flight; the loader waits for it before it loads
  turn[c]      multiplier c waits for it before a tile's steps. In turn: the other arrives when its last wgmma is
               issued, so that the tiles pass through the ring in order, and each group counts the steps for itself.
               Shared: the first arrives at turn[1] some steps into the tile (LAG).

Launched as a programmatic dependent of the kernel before it in the stream: it begins as that one's last programs end,
sets up its barriers meanwhile, and waits (`gdc_wait`) for what they wrote before it touches global memory. Without
overlap a launch of a few rows is 0.3 us, up to a thirtieth, slower.

Scales and bias are fetched before the steps; those of the columns wait in shared memory, since registers are short.
block_n is at most 128: Triton asserts on int8 wgmma of 256 columns. Needs rows that TMA can address (`why_not`).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from int8kit.kernels import tile_scheduler
from int8kit.kernels.activations import silu
from int8kit.kernels.gemm_triton import aligned
from int8kit.kernels.launch import COMPILE_OPTIONS, cdiv, launch_cached
from int8kit.kernels.operands import Operands
from int8kit.kernels.tile_scheduler import combine, part, parts_of, share, tile_corner
from int8kit.spec import TileConfig

tma = tile_scheduler.with_names(
    hopper.tma, async_copy_global_to_shared="async_load", async_copy_shared_to_global="async_store"
)
# Steps that the second multiplier of a shared tile stays behind, so that one's epilogue meets the other's products. At
# most num_stages: the first would wait for slots that the second, which waits for the first, has yet to release.
LAG: gl.constexpr = gl.constexpr(3)
CHUNK_BYTES = 64  # of a row, in one TMA store
BOX_ROWS = 16  # of x, in one TMA copy of a tile of 64
LAUNCH_OPTIONS = {"num_warps": 4, "launch_pdl": True}  # warps of the first multiplier; the others are the kernel's own


@gluon.jit
def _work(M, N, K, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STREAM_K: gl.constexpr):
    """What this program does: steps of a tile, leftover steps of all, its parts of leftover tiles, tiles, half tiles.

    Without stream-K, leftover tiles of 256 rows are halved where that lets all programs end half a tile sooner.
    """
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(K, BLOCK_K)
    if STREAM_K:
        total = tiles % programs * steps
        return steps, total, parts_of(pid, total, programs, steps), tiles // programs, 0
    else:
        halves = 2 * (tiles % programs)
        if BLOCK_M == 256 and halves <= programs:
            return steps, 0, 0, tiles // programs, gl.where(pid < halves, 1, 0)
        else:
            return steps, 0, 0, gl.cdiv(tiles - pid, programs), 0


@gluon.jit
def _item(i, steps, total, parts, waves, STREAM_K: gl.constexpr):
    """This program's item i, parts first, half last -> tile, its first and last + 1 step, all steps before it."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    if STREAM_K:
        index, k0, k1 = part(pid, i, total, programs, steps)
        first = share(pid, total, programs)
        is_part = i < parts
        tile = gl.where(is_part, waves * programs + index, pid + (i - parts) * programs)
        before = gl.where(
            is_part, index * steps + k0 - first, share(pid + 1, total, programs) - first + (i - parts) * steps
        )
        return tile, gl.where(is_part, k0, 0), gl.where(is_part, k1, steps), before
    else:
        return gl.where(i < waves, pid + i * programs, waves * programs + pid // 2), 0, steps, i * steps


@gluon.jit
def _chunks(x, WIDTH: gl.constexpr):
    """x [rows, columns] as a tuple of its column chunks; moves nothing between threads."""
    if x.shape[1] == WIDTH:
        return (x,)
    else:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        return _chunks(left, WIDTH) + _chunks(right, WIDTH)


@gluon.jit
def _load(x_desc, w_desc, x_ring, w_ring, full, empty, M, N, K, group_m, STREAM_K: gl.constexpr):
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    ROWS: gl.constexpr = x_desc.block_shape[0]
    BOXES: gl.constexpr = BLOCK_M // ROWS
    steps, total, parts, waves, half = _work(M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, STREAM_K)
    step = 0
    for i in range(parts + waves + half):
        tile, k0, k1, _ = _item(i, steps, total, parts, waves, STREAM_K)
        row, col = tile_corner(tile, M, N, group_m, BLOCK_M, BLOCK_N)
        whole = i < parts + waves
        row += gl.where(whole, 0, gl.program_id(0) % 2 * ROWS)
        boxes = gl.where(whole, gl.minimum(gl.cdiv(M - row, ROWS), BOXES), 1)
        for k in range(k0, k1):
            slot = step % STAGES
            x_slot = x_ring.index(slot)
            mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)
            # TMA counts the zeros that it fills in, too
            for box in gl.static_range(BOXES):
                mbarrier.expect(full.index(slot), ((box + 1) * ROWS + BLOCK_N) * BLOCK_K, pred=boxes == box + 1)
            tma.async_copy_global_to_shared(w_desc, [col, k * BLOCK_K], full.index(slot), w_ring.index(slot))
            for box in gl.static_range(BOXES):
                tma.async_copy_global_to_shared(
                    x_desc, [row + box * ROWS, k * BLOCK_K], full.index(slot), x_slot.slice(box * ROWS, ROWS, dim=0),
                    pred=box < boxes,
                )  # fmt: skip
            step += 1


@gluon.jit
def _multiply(
    ME: gl.constexpr, x_ring, w_ring, full, empty, turn, parity, first, last, alone,
    SHARED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The sums of this program's steps from `first` up to `last`: of the tile, or of this multiplier's half of it.

    alone: the other multiplier, which shares the slots, sits this tile out.
    """
    STAGES: gl.constexpr = x_ring.shape[0]
    ROWS: gl.constexpr = x_ring.shape[1] // 2 if SHARED else x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    lag: gl.constexpr = LAG if LAG < STAGES else STAGES
    acc = gl.zeros([ROWS, BLOCK_N], gl.int32, layout)
    if ME == 1 or not SHARED:
        mbarrier.wait(turn.index(ME), parity)
    for step in range(first, last):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        x = x_ring.index(slot)
        if SHARED:
            x = x.slice(ME * ROWS, ROWS, dim=0)
        acc = hopper.warpgroup_mma(x, w_ring.index(slot).permute((1, 0)), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
        if SHARED and ME == 0:
            mbarrier.arrive(turn.index(1), pred=(step == gl.minimum(first + lag, last) - 1) & (not alone))
        # not by a variable that holds the slot before: Triton 3.6 takes that for loop-invariant
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > first)
        if SHARED and ME == 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=(step > first) & alone)
    if not SHARED:
        mbarrier.arrive(turn.index(1 - ME))
    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((last - 1) % STAGES))
    if SHARED and ME == 0:
        mbarrier.arrive(empty.index((last - 1) % STAGES), pred=alone)
    return acc


@gluon.jit
def _store(
    ME: gl.constexpr, acc, row, col, sx, sw_buffer, bias_buffer, staging, out_desc,
    HAS_BIAS: gl.constexpr, SUMS_ONLY: gl.constexpr, SWIGLU: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = staging.shape[2] * (2 if SWIGLU else 1)  # columns of the product that fill a staging buffer
    chunks = _chunks(acc, WIDTH)
    for i in gl.static_range(len(chunks)):
        y = gl.convert_layout(chunks[i], layout, assert_trivial=True)
        if not SUMS_ONLY:
            y = y.to(gl.float32) * gl.expand_dims(sx, 1)
            y *= gl.expand_dims(sw_buffer.slice(i * WIDTH, WIDTH).load(gl.SliceLayout(0, layout)), 0)
            if HAS_BIAS:
                y += gl.expand_dims(bias_buffer.slice(i * WIDTH, WIDTH).load(gl.SliceLayout(0, layout)), 0)
            if SWIGLU:
                gate, up = y.reshape(y.shape[0], WIDTH // 2, 2).split()
                y = silu(gate) * up
        tma.store_wait(1)  # the store before last has read its buffer, which is this one
        buffer = staging.index(2 * ME + i % 2)
        buffer.store(y.to(out_desc.dtype))
        hopper.fence_async_shared()
        if SWIGLU:
            tma.async_copy_shared_to_global(out_desc, [row, col // 2 + i * (WIDTH // 2)], buffer)
        else:
            tma.async_copy_shared_to_global(out_desc, [row, col + i * WIDTH], buffer)


@gluon.jit
def _consume(
    ME: gl.constexpr, STREAM_K: gl.constexpr, SHARED: gl.constexpr, HAS_BIAS: gl.constexpr,
    SUMS_ONLY: gl.constexpr, SWIGLU: gl.constexpr, out_desc, x_ring, w_ring, staging, vectors, full, empty, turn,
    sx_ptr, sw_ptr, bias_ptr, slots_ptr, done_ptr, M, N, K, group_m,
):  # fmt: skip
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    ROWS: gl.constexpr = x_ring.shape[1] // 2 if SHARED else x_ring.shape[1]
    WIDTH: gl.constexpr = staging.shape[2] * (2 if SWIGLU else 1)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    chunk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    sw_buffer = vectors.index(2 * ME)
    bias_buffer = vectors.index(2 * ME + 1)
    steps, total, parts, waves, half = _work(M, N, K, BLOCK_M, BLOCK_N, x_ring.shape[2], STREAM_K)
    items = parts + waves
    if ME == 0:
        items += half
    parity = 1 - ME
    for i in range(0 if SHARED else ME, items, 1 if SHARED else 2):
        tile, k0, k1, first = _item(i, steps, total, parts, waves, STREAM_K)
        row, col = tile_corner(tile, M, N, group_m, BLOCK_M, BLOCK_N)
        alone = i >= parts + waves
        if SHARED:
            row += gl.where(alone, gl.program_id(0) % 2, ME) * ROWS
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, chunk_layout))
        cols = col + gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [4], [0]))
        if SUMS_ONLY:
            sx = rows
        else:
            sx = gl.load(sx_ptr + rows, mask=rows < M, other=0.0)
            sw = gl.load(sw_ptr + cols, mask=cols < N, other=0.0)
            if HAS_BIAS:
                bias = gl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(gl.float32)
        acc = _multiply(
            ME, x_ring, w_ring, full, empty, turn, parity, first, first + k1 - k0, alone, SHARED, acc_layout
        )
        parity ^= 1
        complete = True
        if STREAM_K:
            if k1 - k0 < steps:
                pid = gl.program_id(0)
                programs = gl.num_programs(0)
                index = tile - waves * programs
                complete, acc = combine(
                    acc, slots_ptr, done_ptr, pid, i, index, k1 - k0, total, programs, steps,
                    2 if SHARED else 1, ME if SHARED else 0,
                )  # fmt: skip
        if not SUMS_ONLY:
            sw_buffer.store(sw)
            if HAS_BIAS:
                bias_buffer.store(bias)
        if complete:
            _store(
                ME, acc, row, col, sx, sw_buffer, bias_buffer, staging, out_desc, HAS_BIAS, SUMS_ONLY, SWIGLU,
                chunk_layout,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "group_m"])
def _gemm_wgmma(
    x_desc,
    w_desc,
    out_desc,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    slots_ptr,
    done_ptr,
    M,
    N,
    K,
    group_m,
    STAGES: gl.constexpr,
    STREAM_K: gl.constexpr,
    SHARED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SUMS_ONLY: gl.constexpr,
    SWIGLU: gl.constexpr,
):
    BLOCK_M: gl.constexpr = out_desc.block_shape[0] * (2 if SHARED else 1)
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, x_desc.block_shape[1]], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES] + w_desc.block_shape, w_desc.layout)
    staging = gl.allocate_shared_memory(out_desc.dtype, [4] + out_desc.block_shape, out_desc.layout)
    vectors = gl.allocate_shared_memory(gl.float32, [4, w_desc.block_shape[0]], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2 if SHARED else 1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    gdc_wait()  # until all that was launched before has ended and can be seen; nothing above touches global memory
    # the constexprs apart: in a tuple they would become run-time values
    args = (out_desc, x_ring, w_ring, staging, vectors, full, empty, turn, sx_ptr, sw_ptr, bias_ptr, slots_ptr,
            done_ptr, M, N, K, group_m)  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (0, STREAM_K, SHARED, HAS_BIAS, SUMS_ONLY, SWIGLU) + args),
            (_consume, (1, STREAM_K, SHARED, HAS_BIAS, SUMS_ONLY, SWIGLU) + args),
            (_load, (x_desc, w_desc, x_ring, w_ring, full, empty, M, N, K, group_m, STREAM_K)),
        ],
        [4, 1],
        [240, 24],  # warps and registers of the last two; the first has num_warps and the registers that are left
    )


@lru_cache(maxsize=64)
def _layout(dtype: torch.dtype, block: tuple[int, int]) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))


def _blocks(config: TileConfig, out_dtype: torch.dtype) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """What one TMA copy moves of x, w and out."""
    rows = min(config.block_m, 128)  # one multiplier's
    chunk = CHUNK_BYTES // out_dtype.itemsize
    box = rows if config.block_m > 64 else BOX_ROWS
    return (box, config.block_k), (config.block_n, config.block_k), (rows, chunk)


@cache
def _constants(
    config: TileConfig, has_bias: bool, sums_only: bool = False, swiglu: bool = False
) -> tuple[tuple[str, Any], ...]:
    """The kernel's compile-time values, as the launcher and the offline compiler pass them."""
    return (
        ("STAGES", config.num_stages),
        ("STREAM_K", config.stream_k > 0),
        ("SHARED", config.block_m == 256),
        ("HAS_BIAS", has_bias),
        ("SUMS_ONLY", sums_only),
        ("SWIGLU", swiglu),
    )


def why_not(operands: Operands) -> str | None:
    """The reason why TMA cannot address these tensors, or the card has no wgmma; or None."""
    if (reason := _why_not_sm90(operands.xq.device)) is not None:
        return reason
    if operands.k % 16:
        return f"K = {operands.k} is no multiple of 16"
    for name, matrix in (("x", operands.xq), ("w", operands.wq), ("out", operands.out)):
        if matrix.data_ptr() % 16 or matrix.stride(0) * matrix.itemsize % 16:
            return f"{name}'s rows do not start at multiples of 16 bytes"
    return None


@lru_cache(maxsize=16)
def _why_not_sm90(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) == (9, 0):
        return None
    return f"{torch.cuda.get_device_name(device)} is no sm_90"


def launch(operands: Operands, config: TileConfig, options: dict[str, Any]) -> None:
    """Launch the kernel on the present device and stream. options: further compile options of Triton."""
    o = operands
    tiles = cdiv(o.m, config.block_m) * cdiv(o.n, config.block_n)
    pieces = 2 if config.block_m == 256 else 1  # halves of a tile that can be made apart
    plan = tile_scheduler.plan(tiles, config, o.xq.device, pieces)
    programs = plan.workers if plan else min(tiles * pieces, tile_scheduler.multiprocessors(o.xq.device))
    slots, done = (plan.slots, plan.done) if plan else (o.xq, o.xq)
    descriptors = (
        TensorDescriptor.from_tensor(tensor, list(block), _layout(tensor.dtype, block))
        for tensor, block in zip((o.xq, o.wq, o.out), _blocks(config, o.out.dtype), strict=True)
    )
    values = _constants(config, o.bias is not None, o.sums_only, o.swiglu)
    args = (*descriptors, *o.vectors, slots, done, o.m, o.n, o.k, config.group_m)
    key = o.key and (config, *o.key)
    launch_cached(_gemm_wgmma, (programs, 1), args, values, tuple((LAUNCH_OPTIONS | options).items()), key)


def source(config: TileConfig, *, even_k: bool = True, swiglu: bool = False) -> tuple[Any, dict[str, Any]]:
    """What Triton's compiler is given for `config` with bias and bf16 output, and its options: see `tune.offline`."""
    from triton.experimental.gluon._runtime import GluonASTSource

    def descriptor(kind: str, dtype: torch.dtype, block: tuple[int, int]) -> str:
        return f"tensordesc<{kind}{list(block)},{_layout(dtype, block)!r}>"

    values = dict(_constants(config, True, swiglu=swiglu))
    x, w, out = _blocks(config, torch.bfloat16)
    signature = {"x_desc": descriptor("i8", torch.int8, x), "w_desc": descriptor("i8", torch.int8, w)}
    signature |= {"out_desc": descriptor("bf16", torch.bfloat16, out), "sx_ptr": "*fp32", "sw_ptr": "*fp32"}
    sums = "*i32" if config.stream_k else "*i8"  # without stream-K x stands for them
    signature |= {"bias_ptr": "*bf16", "slots_ptr": sums, "done_ptr": sums, "M": "i32", "N": "i32", "K": "i32"}
    signature |= {"group_m": "i32"}
    signature |= dict.fromkeys(values, "constexpr")
    return GluonASTSource(_gemm_wgmma, signature, values, aligned(signature)), COMPILE_OPTIONS | LAUNCH_OPTIONS
