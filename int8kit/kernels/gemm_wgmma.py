"""GEMM for `wgmma` in Triton's Gluon dialect: sm_90, warp-specialized and persistent.

One program per multiprocessor computes tiles p, p + P, p + 2P, ... and its range of the leftover tiles (`stream_k`):
`_work` counts its items, `_item` gives one of them. Three groups of warps work on shared memory:

  producer       1 warp, 24 registers per thread. It issues TMA copies of block_m x 128 of x and block_n x 128 of w
                 into a ring of num_stages slots, for every step of every tile, as far ahead as slots are free. TMA
                 fills with zeros past M, N and K, and clips stores. There is no tail code. A row of zeros costs at
                 least as much as another row, so a box of x wholly past M is not copied. Its slot keeps older values,
                 which are multiplied and not stored. Tiles of 64 rows have boxes of 16 rows, others one per consumer.
  consumers      2 warpgroups of 4 warps, 240 registers per thread. They issue m64n128k32 wgmma from the slots into up
                 to 128 accumulators per thread. The epilogue runs in chunks of 64 bytes per row through two staging
                 buffers per consumer, which TMA stores.

`TileConfig.schedule` names the way in which the consumers share the work:

  ping-pong      block_m is 64 or 128. The consumers take alternate tiles: one multiplies while the other is in its
                 epilogue.
  cooperative    block_m is 256. Each consumer computes half of every tile. Both read each slot, so a product costs a
                 quarter less traffic from L2 and less power. Only a lag of a few steps hides the epilogue. If the tiles
                 of the last wave are at most half as many as the programs, they are halved: each half goes to one
                 consumer of its own program.

Which schedule is faster depends on K, on the waves, and on the power that the GPU has left.

Each mbarrier completes once per phase. A wait for parity 1 passes at once in a barrier's first phase:

  full[slot]     The producer sets its byte count; TMA completes it. A consumer waits for it before its wgmma.
  empty[slot]    A consumer arrives when the wgmma that read the slot has retired, one step late since one wgmma stays
                 in flight. The producer waits for it before it loads.
  order[c]       Consumer c waits for it before the steps of a tile. Ping-pong: the other consumer arrives when it has
                 issued its last wgmma, so that tiles pass through the ring in order. Each consumer counts the steps for
                 itself. Cooperative: consumer 0 arrives at order[1] CONSUMER_LAG steps into the tile. Consumer 1
                 arrives at order[0] when it begins the tile. Consumer 0 is never two tiles ahead. Else order[1] could
                 complete two phases, which look like none, and consumer 1 would wait for ever.

The kernel is launched as a programmatic dependent of the kernel before it in the stream. It starts as the last
programs of that kernel end and sets up its barriers. It waits (`gdc_wait`) for their writes before it touches global
memory. Without this overlap a launch of few rows takes 0.3 us longer, up to a thirtieth.

Scales and bias are fetched before the steps. Column scales and bias are kept in shared memory to save registers.
block_n is at most 128: Triton asserts on int8 wgmma of 256 columns. TMA must be able to address the rows (`why_not`).
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

from int8kit.kernels import triton_compat
from int8kit.kernels.epilogue import add_bias, dequantize, swiglu
from int8kit.kernels.l2_swizzle import tile_corner
from int8kit.kernels.launch import COMPILE_OPTIONS, cdiv, divisibility, launch_cached
from int8kit.kernels.operands import Operands
from int8kit.kernels.stream_k import fix_up, multiprocessors, range_start, segment, segment_count, stream_k
from int8kit.spec import Schedule, TileConfig, consumer_rows

tma = triton_compat.alias(
    hopper.tma, async_copy_global_to_shared="async_load", async_copy_shared_to_global="async_store"
)
# Steps by which consumer 1 of a cooperative tile lags, so that one consumer's epilogue overlaps the other's products.
# At most num_stages: consumer 0 would wait for slots that consumer 1, which waits for consumer 0, has yet to release.
CONSUMER_LAG: gl.constexpr = gl.constexpr(3)
CHUNK_BYTES = 64  # of a row, in one TMA store
BOX_ROWS = 16  # of x, in one TMA copy of a tile of 64 rows
LAUNCH_OPTIONS = {"num_warps": 4, "launch_pdl": True}  # warps of consumer 0; the kernel itself adds the other groups


@gluon.jit
def _work(
    M, N, K, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STREAM_K: gl.constexpr,
    COOPERATIVE: gl.constexpr,
):  # fmt: skip
    """Returns (steps per tile, stream-K steps of the grid, this program's segments, whole tiles, half tiles).

    Without stream-K, leftover cooperative tiles are halved where all programs then end half a tile sooner.
    """
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(K, BLOCK_K)
    if STREAM_K:
        total = tiles % programs * steps
        return steps, total, segment_count(pid, total, programs, steps), tiles // programs, 0
    else:
        halves = 2 * (tiles % programs)
        if COOPERATIVE and halves <= programs:
            return steps, 0, 0, tiles // programs, gl.where(pid < halves, 1, 0)
        else:
            return steps, 0, 0, gl.cdiv(tiles - pid, programs), 0


@gluon.jit
def _item(i, steps, total, segments, whole_tiles, STREAM_K: gl.constexpr):
    """Work item i of this program: tile number, K-step range [k0, k1), and number of steps in earlier items.

    Order: stream-K segments, whole tiles, half tile.
    """
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    if STREAM_K:
        index, k0, k1 = segment(pid, i, total, programs, steps)
        first = range_start(pid, total, programs)
        is_segment = i < segments
        tile = gl.where(is_segment, whole_tiles * programs + index, pid + (i - segments) * programs)
        before = gl.where(
            is_segment,
            index * steps + k0 - first,
            range_start(pid + 1, total, programs) - first + (i - segments) * steps,
        )
        return tile, gl.where(is_segment, k0, 0), gl.where(is_segment, k1, steps), before
    else:
        return gl.where(i < whole_tiles, pid + i * programs, whole_tiles * programs + pid // 2), 0, steps, i * steps


@gluon.jit
def _chunks(x, WIDTH: gl.constexpr):
    """x [rows, columns] as a tuple of its column chunks. Moves nothing between threads."""
    if x.shape[1] == WIDTH:
        return (x,)
    else:
        left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        return _chunks(left, WIDTH) + _chunks(right, WIDTH)


@gluon.jit
def _produce(
    x_desc, w_desc, x_ring, w_ring, full, empty, M, N, K, group_m,
    STREAM_K: gl.constexpr, COOPERATIVE: gl.constexpr,
):  # fmt: skip
    """Producer warp: copy the operands of every step into the ring."""
    STAGES: gl.constexpr = x_ring.shape[0]
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    ROWS: gl.constexpr = x_desc.block_shape[0]
    BOXES: gl.constexpr = BLOCK_M // ROWS
    steps, total, segments, whole_tiles, half = _work(M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, STREAM_K, COOPERATIVE)
    step = 0
    for i in range(segments + whole_tiles + half):
        tile, k0, k1, _ = _item(i, steps, total, segments, whole_tiles, STREAM_K)
        row, col = tile_corner(tile, M, N, group_m, BLOCK_M, BLOCK_N)
        whole = i < segments + whole_tiles
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
    CONSUMER: gl.constexpr, x_ring, w_ring, full, empty, order, parity, first, last, alone,
    COOPERATIVE: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Accumulators of this program's steps from `first` up to `last`: of the tile, or of this consumer's half of it.

    alone: the other consumer, which shares the slots, has no part in this tile.
    """
    STAGES: gl.constexpr = x_ring.shape[0]
    ROWS: gl.constexpr = x_ring.shape[1] // 2 if COOPERATIVE else x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    lag: gl.constexpr = CONSUMER_LAG if CONSUMER_LAG < STAGES else STAGES
    acc = gl.zeros([ROWS, BLOCK_N], gl.int32, layout)
    mbarrier.wait(order.index(CONSUMER), parity)
    if COOPERATIVE and CONSUMER == 1:
        mbarrier.arrive(order.index(0))
    for step in range(first, last):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        x = x_ring.index(slot)
        if COOPERATIVE:
            x = x.slice(CONSUMER * ROWS, ROWS, dim=0)
        acc = hopper.warpgroup_mma(x, w_ring.index(slot).permute((1, 0)), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
        if COOPERATIVE and CONSUMER == 0:
            mbarrier.arrive(order.index(1), pred=(step == gl.minimum(first + lag, last) - 1) & (not alone))
        # computed anew: Triton 3.6 takes a variable with the previous slot for loop-invariant
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > first)
        if COOPERATIVE and CONSUMER == 0:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=(step > first) & alone)
    if not COOPERATIVE:
        mbarrier.arrive(order.index(1 - CONSUMER))
    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((last - 1) % STAGES))
    if COOPERATIVE and CONSUMER == 0:
        mbarrier.arrive(empty.index((last - 1) % STAGES), pred=alone)
    return acc


@gluon.jit
def _store(
    CONSUMER: gl.constexpr, acc, row, col, sx, sw_buffer, bias_buffer, staging, out_desc,
    HAS_BIAS: gl.constexpr, INT32_OUT: gl.constexpr, SWIGLU: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Epilogue of this consumer's rows, chunk by chunk, and their TMA stores."""
    WIDTH: gl.constexpr = staging.shape[2] * (2 if SWIGLU else 1)  # columns of the product that fill a staging buffer
    chunks = _chunks(acc, WIDTH)
    for i in gl.static_range(len(chunks)):
        y = gl.convert_layout(chunks[i], layout, assert_trivial=True)
        if not INT32_OUT:
            sw = gl.expand_dims(sw_buffer.slice(i * WIDTH, WIDTH).load(gl.SliceLayout(0, layout)), 0)
            y = dequantize(y, gl.expand_dims(sx, 1), sw)
            if HAS_BIAS:
                y = add_bias(y, gl.expand_dims(bias_buffer.slice(i * WIDTH, WIDTH).load(gl.SliceLayout(0, layout)), 0))
            if SWIGLU:
                y = swiglu(y)
        # until the store that last read this buffer has done so: the last store but one, or the last one of a tile of
        # one chunk, whose stores all read the same buffer
        tma.store_wait(0 if len(chunks) == 1 else 1)
        buffer = staging.index(2 * CONSUMER + i % 2)
        buffer.store(y.to(out_desc.dtype))
        hopper.fence_async_shared()
        if SWIGLU:
            tma.async_copy_shared_to_global(out_desc, [row, col // 2 + i * (WIDTH // 2)], buffer)
        else:
            tma.async_copy_shared_to_global(out_desc, [row, col + i * WIDTH], buffer)


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, STREAM_K: gl.constexpr, COOPERATIVE: gl.constexpr, HAS_BIAS: gl.constexpr,
    INT32_OUT: gl.constexpr, SWIGLU: gl.constexpr, out_desc, x_ring, w_ring, staging, vectors, full, empty, order,
    sx_ptr, sw_ptr, bias_ptr, workspace_ptr, arrived_ptr, M, N, K, group_m,
):  # fmt: skip
    """Consumer warpgroup: accumulators, fix-up and epilogue of its tiles."""
    BLOCK_M: gl.constexpr = x_ring.shape[1]
    BLOCK_N: gl.constexpr = w_ring.shape[1]
    ROWS: gl.constexpr = x_ring.shape[1] // 2 if COOPERATIVE else x_ring.shape[1]
    WIDTH: gl.constexpr = staging.shape[2] * (2 if SWIGLU else 1)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    chunk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    sw_buffer = vectors.index(2 * CONSUMER)
    bias_buffer = vectors.index(2 * CONSUMER + 1)
    steps, total, segments, whole_tiles, half = _work(M, N, K, BLOCK_M, BLOCK_N, x_ring.shape[2], STREAM_K, COOPERATIVE)
    items = segments + whole_tiles
    if CONSUMER == 0:
        items += half
    parity = 1 - CONSUMER
    for i in range(0 if COOPERATIVE else CONSUMER, items, 1 if COOPERATIVE else 2):
        tile, k0, k1, first = _item(i, steps, total, segments, whole_tiles, STREAM_K)
        row, col = tile_corner(tile, M, N, group_m, BLOCK_M, BLOCK_N)
        alone = i >= segments + whole_tiles
        if COOPERATIVE:
            row += gl.where(alone, gl.program_id(0) % 2, CONSUMER) * ROWS
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, chunk_layout))
        cols = col + gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [4], [0]))
        if INT32_OUT:
            sx = rows
        else:
            sx = gl.load(sx_ptr + rows, mask=rows < M, other=0.0)
            sw = gl.load(sw_ptr + cols, mask=cols < N, other=0.0)
            if HAS_BIAS:
                bias = gl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(gl.float32)
        acc = _multiply(
            CONSUMER, x_ring, w_ring, full, empty, order, parity, first, first + k1 - k0, alone, COOPERATIVE, acc_layout
        )
        parity ^= 1
        complete = True
        if STREAM_K:
            if k1 - k0 < steps:
                pid = gl.program_id(0)
                programs = gl.num_programs(0)
                index = tile - whole_tiles * programs
                complete, acc = fix_up(
                    acc, workspace_ptr, arrived_ptr, pid, i, index, k1 - k0, total, programs, steps,
                    2 if COOPERATIVE else 1, CONSUMER if COOPERATIVE else 0,
                )  # fmt: skip
        if not INT32_OUT:
            sw_buffer.store(sw)
            if HAS_BIAS:
                bias_buffer.store(bias)
        if complete:
            _store(
                CONSUMER, acc, row, col, sx, sw_buffer, bias_buffer, staging, out_desc, HAS_BIAS, INT32_OUT, SWIGLU,
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
    workspace_ptr,
    arrived_ptr,
    M,
    N,
    K,
    group_m,
    STAGES: gl.constexpr,
    STREAM_K: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    INT32_OUT: gl.constexpr,
    SWIGLU: gl.constexpr,
):
    BLOCK_M: gl.constexpr = out_desc.block_shape[0] * (2 if COOPERATIVE else 1)
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, x_desc.block_shape[1]], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES] + w_desc.block_shape, w_desc.layout)
    staging = gl.allocate_shared_memory(out_desc.dtype, [4] + out_desc.block_shape, out_desc.layout)
    vectors = gl.allocate_shared_memory(gl.float32, [4, w_desc.block_shape[0]], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2 if COOPERATIVE else 1)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    gdc_wait()  # until earlier kernels have ended and their writes are visible; nothing above touches global memory
    # the constexprs are passed by themselves: in a tuple they would become run-time values
    args = (out_desc, x_ring, w_ring, staging, vectors, full, empty, order, sx_ptr, sw_ptr, bias_ptr, workspace_ptr,
            arrived_ptr, M, N, K, group_m)  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (0, STREAM_K, COOPERATIVE, HAS_BIAS, INT32_OUT, SWIGLU) + args),
            (_consume, (1, STREAM_K, COOPERATIVE, HAS_BIAS, INT32_OUT, SWIGLU) + args),
            (_produce, (x_desc, w_desc, x_ring, w_ring, full, empty, M, N, K, group_m, STREAM_K, COOPERATIVE)),
        ],
        [4, 1],
        [240, 24],  # warps and registers of the last two groups; consumer 0 has num_warps and the rest of the registers
    )


@lru_cache(maxsize=64)
def _layout(dtype: torch.dtype, block: tuple[int, int]) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))


def _blocks(config: TileConfig, out_dtype: torch.dtype) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Blocks of x, w and out that one TMA copy moves."""
    rows = consumer_rows(config)
    chunk = CHUNK_BYTES // out_dtype.itemsize
    box = rows if config.block_m > 64 else BOX_ROWS
    return (box, config.block_k), (config.block_n, config.block_k), (rows, chunk)


@cache
def _constants(
    config: TileConfig, has_bias: bool, int32_out: bool = False, swiglu: bool = False
) -> tuple[tuple[str, Any], ...]:
    """Compile-time values of the kernel, the same for the launcher and for the cross-compiler."""
    return (
        ("STAGES", config.num_stages),
        ("STREAM_K", config.stream_k > 0),
        ("COOPERATIVE", config.schedule is Schedule.COOPERATIVE),
        ("HAS_BIAS", has_bias),
        ("INT32_OUT", int32_out),
        ("SWIGLU", swiglu),
    )


def why_not(operands: Operands) -> str | None:
    """The reason why TMA cannot address these tensors or the GPU has no wgmma; or None."""
    if (reason := _why_not_sm90(operands.xq.device)) is not None:
        return reason
    if operands.k % 16:
        return f"K = {operands.k} is not a multiple of 16"
    for name, matrix in (("x", operands.xq), ("w", operands.wq), ("out", operands.out)):
        if matrix.data_ptr() % 16 or matrix.stride(0) * matrix.itemsize % 16:
            return f"{name}'s rows do not start at multiples of 16 bytes"
    if operands.out.shape[1] * operands.out.itemsize % 16:
        return "out's rows do not end at multiples of 16 bytes: TMA stores 16 bytes at once, also past N"
    return None


@lru_cache(maxsize=16)
def _why_not_sm90(device: torch.device) -> str | None:
    if torch.cuda.get_device_capability(device) == (9, 0):
        return None
    return f"{torch.cuda.get_device_name(device)} is not sm_90"


def launch(operands: Operands, config: TileConfig, options: dict[str, Any]) -> None:
    """Launch the kernel on the current device and stream. options: further compile options of Triton."""
    o = operands
    tiles = cdiv(o.m, config.block_m) * cdiv(o.n, config.block_n)
    pieces = 2 if config.schedule is Schedule.COOPERATIVE else 1  # halves of a tile that two programs can compute
    shared = stream_k(tiles, config, o.xq.device, pieces)
    programs = shared.workers if shared else min(tiles * pieces, multiprocessors(o.xq.device))
    workspace, arrived = (shared.workspace, shared.arrived) if shared else (o.xq, o.xq)
    descriptors = (
        TensorDescriptor.from_tensor(tensor, list(block), _layout(tensor.dtype, block))
        for tensor, block in zip((o.xq, o.wq, o.out), _blocks(config, o.out.dtype), strict=True)
    )
    values = _constants(config, o.bias is not None, o.int32_out, o.swiglu)
    args = (*descriptors, *o.vectors, workspace, arrived, o.m, o.n, o.k, config.group_m)
    key = o.key and (config, *o.key)
    launch_cached(_gemm_wgmma, (programs, 1), args, values, tuple((LAUNCH_OPTIONS | options).items()), key)


def compiler_source(config: TileConfig, *, swiglu: bool = False) -> tuple[Any, dict[str, Any]]:
    """Source and options that Triton compiles for `config` with bias and bf16 output: see `tune.cross_compile`."""
    from triton.experimental.gluon._runtime import GluonASTSource

    def descriptor(kind: str, dtype: torch.dtype, block: tuple[int, int]) -> str:
        return f"tensordesc<{kind}{list(block)},{_layout(dtype, block)!r}>"

    values = dict(_constants(config, True, swiglu=swiglu))
    x, w, out = _blocks(config, torch.bfloat16)
    signature = {"x_desc": descriptor("i8", torch.int8, x), "w_desc": descriptor("i8", torch.int8, w)}
    signature |= {"out_desc": descriptor("bf16", torch.bfloat16, out), "sx_ptr": "*fp32", "sw_ptr": "*fp32"}
    buffer = "*i32" if config.stream_k else "*i8"  # without stream-K, x stands in for workspace and counters
    signature |= {"bias_ptr": "*bf16", "workspace_ptr": buffer, "arrived_ptr": buffer}
    signature |= dict.fromkeys(("M", "N", "K", "group_m"), "i32")
    signature |= dict.fromkeys(values, "constexpr")
    return GluonASTSource(_gemm_wgmma, signature, values, divisibility(signature)), COMPILE_OPTIONS | LAUNCH_OPTIONS
