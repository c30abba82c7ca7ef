"""GEMM in plain Triton: every shape, sm_80 and later, and Triton's interpreter.

One program computes one tile of block_m x block_n. Loads past M or N wrap around to existing rows; the mask of the
store is made from the coordinates before the wrap and drops their results. Loads past K are masked to zero, but only in
kernels for a K that is not a multiple of block_k. Padded copies of the operands were rejected: a copy costs a pass over
memory.

M is never specialized, so a new prompt length compiles nothing. sm_80 to sm_89 and sm_120 run
`mma.sync ... s32.s8.s8.s32.satfinite`, sm_90 runs `wgmma`. Saturating and wrapping additions agree, because no sum
leaves int32 for K <= 131071.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

from int8kit.kernels.epilogue import add_bias, dequantize, swiglu
from int8kit.kernels.l2_swizzle import tile_corner
from int8kit.kernels.launch import COMPILE_OPTIONS, cdiv, divisibility, launch_cached
from int8kit.kernels.operands import Operands
from int8kit.spec import TileConfig


@triton.jit(do_not_specialize=["M", "group_m"])
def _gemm_triton(
    x_ptr,
    w_ptr,
    sx_ptr,
    sw_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_om,
    group_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT32_OUT: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    row, col = tile_corner(tl.program_id(0), M, N, group_m, BLOCK_M, BLOCK_N)
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)

    # int64: M * K and M * N may pass 2**31
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_xm + ks[None, :]
    w_ptrs = w_ptr + (cols % N).to(tl.int64)[None, :] * stride_wn + ks[:, None]
    acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(ks < K - k)[None, :], other=0)
            w = tl.load(w_ptrs, mask=(ks < K - k)[:, None], other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om
    if INT32_OUT:
        tl.store(out_ptrs + cols[None, :], acc, mask=(rows < M)[:, None] & (cols < N)[None, :])
    else:
        sx = tl.load(sx_ptr + rows, mask=rows < M, other=0.0)
        sw = tl.load(sw_ptr + cols, mask=cols < N, other=0.0)
        y = dequantize(acc, sx[:, None], sw[None, :])
        if HAS_BIAS:
            y = add_bias(y, tl.load(bias_ptr + cols, mask=cols < N, other=0.0)[None, :])
        if SWIGLU:
            y = swiglu(y)
            cols = col // 2 + tl.arange(0, BLOCK_N // 2)
            N = N // 2
        tl.store(
            out_ptrs + cols[None, :], y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :]
        )


@cache
def _constants(
    config: TileConfig, even_k: bool, has_bias: bool, int32_out: bool = False, swiglu: bool = False
) -> tuple[tuple[str, Any], ...]:
    """Compile-time values of the kernel, the same for the launcher and for the cross-compiler."""
    return (
        ("BLOCK_M", config.block_m),
        ("BLOCK_N", config.block_n),
        ("BLOCK_K", config.block_k),
        ("EVEN_K", even_k),
        ("HAS_BIAS", has_bias),
        ("INT32_OUT", int32_out),
        ("SWIGLU", swiglu),
    )


def why_not(operands: Operands) -> str | None:
    """None: the Triton kernel serves all tensors that `Operands` admits."""
    return None


def launch(operands: Operands, config: TileConfig, options: dict[str, Any]) -> None:
    """Launch the kernel on the current device and stream. options: further compile options of Triton."""
    o = operands
    values = _constants(config, o.k % config.block_k == 0, o.bias is not None, o.int32_out, o.swiglu)
    args = (
        o.xq, o.wq, *o.vectors, o.out, o.m, o.n, o.k, o.xq.stride(0), o.wq.stride(0), o.out.stride(0),
        config.group_m,
    )  # fmt: skip
    compile_options = {"num_warps": config.num_warps, "num_stages": config.num_stages} | options
    grid = cdiv(o.m, config.block_m) * cdiv(o.n, config.block_n)
    key = o.key and (config, o.k % config.block_k == 0, *o.key)
    launch_cached(_gemm_triton, (grid, 1), args, values, tuple(compile_options.items()), key)


def compiler_source(config: TileConfig, *, even_k: bool = True, swiglu: bool = False) -> tuple[Any, dict[str, Any]]:
    """Source and options that Triton compiles for `config` with bias and bf16 output: see `tune.cross_compile`."""
    from triton.compiler import ASTSource

    values = dict(_constants(config, even_k, True, swiglu=swiglu))
    pointers = {"x": "*i8", "w": "*i8", "sx": "*fp32", "sw": "*fp32", "bias": "*bf16", "out": "*bf16"}
    signature = {f"{name}_ptr": kind for name, kind in pointers.items()}
    signature |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om", "group_m"), "i32")
    signature |= dict.fromkeys(values, "constexpr")
    options = dict(COMPILE_OPTIONS, num_warps=config.num_warps, num_stages=config.num_stages)
    return ASTSource(_gemm_triton, signature, values, divisibility(signature)), options
