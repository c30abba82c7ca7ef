"""Kernels that apply one device function of int8kit to many values and store its results.

The function is compiled as in the kernel that uses it, with the same options. Each launcher takes an `arch`, such as
"sm86", to run another GPU's code.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from int8kit.kernels.activations import silu
from int8kit.kernels.epilogue import dequantize
from int8kit.kernels.gemm_wgmma import _item, _work
from int8kit.kernels.l2_swizzle import tile_corner
from int8kit.kernels.launch import cdiv, launch_cached
from int8kit.kernels.row_primitives import interpreter_fp32, larger, row_scale, widen
from int8kit.kernels.stream_k import range_owner, range_start, segment, segment_count

BLOCK = 1024
INTERPRETED_BLOCK = 1 << 16  # numpy's operations cost by the call
WORK_BLOCKS = (64, 64, 128)  # block_m, block_n and block_k of `work_items`


@triton.jit
def _row_scales(x_ptr, out_ptr, COUNT, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = widen(tl.load(x_ptr + at, mask=at < COUNT, other=0.0))
    top = larger(tl.zeros([BLOCK], tl.float32), x)
    s = row_scale(tl.reshape(top, [1, BLOCK]))  # the maximum over an axis of one element
    tl.store(out_ptr + at, s, mask=at < COUNT)


@triton.jit
def _silus(g_ptr, out_ptr, COUNT, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + at, mask=at < COUNT, other=0.0)
    tl.store(out_ptr + at, silu(g), mask=at < COUNT)


@triton.jit
def _dequantized(acc_ptr, one_ptr, out_ptr, COUNT, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.load(acc_ptr + at, mask=at < COUNT, other=0)
    one = tl.load(one_ptr)  # unknown to the compiler
    tl.store(out_ptr + at, dequantize(acc, one, one), mask=at < COUNT)


@triton.jit
def _corners(cases_ptr, out_ptr, COUNT, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < COUNT
    tile = tl.load(cases_ptr + at, mask=mask, other=0)
    m = tl.load(cases_ptr + COUNT + at, mask=mask, other=1)
    n = tl.load(cases_ptr + 2 * COUNT + at, mask=mask, other=1)
    group_m = tl.load(cases_ptr + 3 * COUNT + at, mask=mask, other=1)
    row, col = tile_corner(tile, m, n, group_m, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + at, row, mask=mask)
    tl.store(out_ptr + COUNT + at, col, mask=mask)


@gluon.jit
def _stream_k(cases_ptr, out_ptr, COUNT):
    case = gl.program_id(0)
    worker = gl.load(cases_ptr + case)
    i = gl.load(cases_ptr + COUNT + case)
    step = gl.load(cases_ptr + 2 * COUNT + case)
    total = gl.load(cases_ptr + 3 * COUNT + case)
    workers = gl.load(cases_ptr + 4 * COUNT + case)
    steps = gl.load(cases_ptr + 5 * COUNT + case)
    index, k0, k1 = segment(worker, i, total, workers, steps)
    gl.store(out_ptr + case, range_start(worker, total, workers))
    gl.store(out_ptr + COUNT + case, range_owner(step, total, workers))
    gl.store(out_ptr + 2 * COUNT + case, segment_count(worker, total, workers, steps))
    gl.store(out_ptr + 3 * COUNT + case, index)
    gl.store(out_ptr + 4 * COUNT + case, k0)
    gl.store(out_ptr + 5 * COUNT + case, k1)


@gluon.jit
def _work_items(
    cases_ptr, out_ptr, COUNT, ITEMS, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STREAM_K: gl.constexpr, COOPERATIVE: gl.constexpr,
):  # fmt: skip
    for case in range(COUNT):
        M = gl.load(cases_ptr + case)
        N = gl.load(cases_ptr + COUNT + case)
        K = gl.load(cases_ptr + 2 * COUNT + case)
        steps, total, segments, whole_tiles, half = _work(M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, STREAM_K, COOPERATIVE)
        at = out_ptr + (case * gl.num_programs(0) + gl.program_id(0)) * (5 + 4 * ITEMS)
        gl.store(at, steps)
        gl.store(at + 1, total)
        gl.store(at + 2, segments)
        gl.store(at + 3, whole_tiles)
        gl.store(at + 4, half)
        for i in range(ITEMS):
            tile, k0, k1, before = _item(i, steps, total, segments, whole_tiles, STREAM_K)
            gl.store(at + 5 + 4 * i, tile)
            gl.store(at + 6 + 4 * i, k0)
            gl.store(at + 7 + 4 * i, k1)
            gl.store(at + 8 + 4 * i, before)


def _launch(function: Any, programs: int, args: tuple[Any, ...], arch: str | None, **constants: Any) -> None:
    options = () if arch is None else (("arch", arch),)
    launch_cached(function, (programs, 1), args, tuple(constants.items()), options, None)


def _each(function: Any, x: torch.Tensor, arch: str | None, *more: torch.Tensor) -> torch.Tensor:
    """fp32 results of an elementwise kernel."""
    out = torch.empty(x.numel(), dtype=torch.float32, device=x.device)
    block = BLOCK if x.is_cuda else INTERPRETED_BLOCK
    _launch(function, cdiv(x.numel(), block), (x, *more, out, x.numel()), arch, BLOCK=block)
    return out


def row_scales(x: torch.Tensor) -> torch.Tensor:
    """The scale of a row whose largest magnitude is |x|, for each element of x [n], bf16, fp16 or fp32."""
    return _each(_row_scales, interpreter_fp32(x), None)


def silus(g: torch.Tensor, arch: str | None = None) -> torch.Tensor:
    """`activations.silu` of g [n] fp32."""
    return _each(_silus, g, arch)


def dequantized(acc: torch.Tensor, arch: str | None = None) -> torch.Tensor:
    """`epilogue.dequantize` of acc [n] int32, with scales of 1."""
    return _each(_dequantized, acc, arch, torch.ones(1, device=acc.device))


def corners(cases: torch.Tensor, block_m: int, block_n: int, arch: str | None = None) -> torch.Tensor:
    """`tile_corner` of cases [4, n]: tile, M, N, group_m -> [2, n] int32."""
    count = cases.shape[1]
    out = torch.empty(2, count, dtype=torch.int32, device=cases.device)
    block = BLOCK if cases.is_cuda else INTERPRETED_BLOCK
    sizes = {"BLOCK": block, "BLOCK_M": block_m, "BLOCK_N": block_n}
    _launch(_corners, cdiv(count, block), (cases, out, count), arch, **sizes)
    return out


def stream_k_values(cases: torch.Tensor, arch: str | None = None) -> torch.Tensor:
    """Stream-K arithmetic of cases [6, n]: worker, i, step, total, workers, steps -> [6, n] int32.

    The results are range_start, range_owner, segment_count, and the three of `segment`.
    """
    out = torch.empty_like(cases)
    _launch(_stream_k, cases.shape[1], (cases, out, cases.shape[1]), arch)
    return out


def work_items(
    cases: torch.Tensor, programs: int, items: int, stream_k: bool, cooperative: bool, arch: str | None = None
) -> torch.Tensor:
    """`_work` and `_item` of the wgmma kernel for cases [3, n]: M, N, K -> [n, programs, 5 + 4 items] int32."""
    count = cases.shape[1]
    out = torch.empty(count, programs, 5 + 4 * items, dtype=torch.int32, device=cases.device)
    blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), WORK_BLOCKS, strict=True))
    constants = blocks | {"STREAM_K": stream_k, "COOPERATIVE": cooperative}
    _launch(_work_items, programs, (cases, out, count, items), arch, **constants)
    return out
