"""The plain kernel, in Triton, for sm_80 and later and for Triton's interpreter: serves every shape that there is.

One program makes one tile of block_m x block_n. Loads past M or N wrap around to rows that exist, and the store's mask,
made from the coordinates before wrapping, drops what they give; loads past K are masked to zero, in kernels of a
K that is no multiple of block_k only. Padded copies of the operands were rejected: they cost a pass over memory.

Programs go down the columns of bands of group_m tile rows, so that the operands in flight stay in L2.

M is never specialized: a new prompt length compiles nothing. sm_80 to sm_89 and sm_120 run
`mma.sync ... s32.s8.s8.s32.satfinite`, sm_90 runs `wgmma`: saturating and wrapping agree because no sum leaves int32
for K <= 131071.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

from int8kit.kernels.activations import silu
from int8kit.kernels.launch import COMPILE_OPTIONS, DO_NOT_SPECIALIZE, cdiv, launch_cached
from int8kit.kernels.operands import Operands
from int8kit.spec import TileConfig


@triton.jit(do_not_specialize=["M", "group_m"])
def _gemm(
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
    SUMS_ONLY: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    band = group_m * tiles_n
    first_m = pid // band * group_m
    height = tl.minimum(tiles_m - first_m, group_m)
    rows = (first_m + pid % band % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = pid % band // height * BLOCK_N
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
    if SUMS_ONLY:
        tl.store(out_ptrs + cols[None, :], acc, mask=(rows < M)[:, None] & (cols < N)[None, :])
    else:
        sx = tl.load(sx_ptr + rows, mask=rows < M, other=0.0)
        sw = tl.load(sw_ptr + cols, mask=cols < N, other=0.0)
        y = acc.to(tl.float32) * sx[:, None] * sw[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
            y = y + bias[None, :]
        if SWIGLU:
            gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
            y = silu(gate) * up
            cols = col // 2 + tl.arange(0, BLOCK_N // 2)
            N = N // 2
        tl.store(
            out_ptrs + cols[None, :], y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :]
        )


@cache
def _constants(
    config: TileConfig, even_k: bool, has_bias: bool, sums_only: bool = False, swiglu: bool = False
) -> tuple[tuple[str, Any], ...]:
    """The kernel's compile-time values, as the launcher and the offline compiler pass them."""
    return (
        ("BLOCK_M", config.block_m),
        ("BLOCK_N", config.block_n),
        ("BLOCK_K", config.block_k),
        ("EVEN_K", even_k),
        ("HAS_BIAS", has_bias),
        ("SUMS_ONLY", sums_only),
        ("SWIGLU", swiglu),
    )


def why_not(operands: Operands) -> str | None:
    """None: the plain kernel serves all that `Operands` admits."""
    return None


def launch(operands: Operands, config: TileConfig, options: dict[str, Any]) -> None:
    """Launch the kernel on the present device and stream. options: further compile options of Triton."""
    o = operands
    values = _constants(config, o.k % config.block_k == 0, o.bias is not None, o.sums_only, o.swiglu)
    args = (
        o.xq, o.wq, *o.vectors, o.out, o.m, o.n, o.k, o.xq.stride(0), o.wq.stride(0), o.out.stride(0),
        config.group_m,
    )  # fmt: skip
    compile_options = {"num_warps": config.num_warps, "num_stages": config.num_stages} | options
    grid = cdiv(o.m, config.block_m) * cdiv(o.n, config.block_n)
    key = o.key and (config, o.k % config.block_k == 0, *o.key)
    launch_cached(_gemm, (grid, 1), args, values, tuple(compile_options.items()), key)


def source(config: TileConfig, *, even_k: bool = True, swiglu: bool = False) -> tuple[Any, dict[str, Any]]:
    """What Triton's compiler is given for `config` with bias and bf16 output, and its options: see `tune.offline`."""
    from triton.compiler import ASTSource

    values = dict(_constants(config, even_k, True, swiglu=swiglu))
    pointers = {"x": "*i8", "w": "*i8", "sx": "*fp32", "sw": "*fp32", "bias": "*bf16", "out": "*bf16"}
    signature = {f"{name}_ptr": kind for name, kind in pointers.items()}
    signature |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om", "group_m"), "i32")
    signature |= dict.fromkeys(values, "constexpr")
    options = dict(COMPILE_OPTIONS, num_warps=config.num_warps, num_stages=config.num_stages)
    return ASTSource(_gemm, signature, values, aligned(signature)), options


def aligned(signature: dict[str, str]) -> dict[tuple[int], list[list[Any]]]:
    """Attributes for the offline compiler: what the launcher finds at run time for aligned pointers and extents.

    Spelt as the launcher does, so that what is compiled offline is in Triton's cache when a launch looks for it: from
    3.7 on, with an empty list for a constant.
    """
    found: dict[tuple[int], list[list[Any]]] = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            found |= {} if triton.__version__.startswith("3.6.") else {(i,): []}
        elif name not in DO_NOT_SPECIALIZE and not kind.startswith("tensordesc"):
            found[i,] = [["tt.divisibility", 16]]
    return found
