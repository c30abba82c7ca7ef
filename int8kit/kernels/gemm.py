"""W8A8 matrix product with fused dequantization, in Triton, for sm_80 and later.

    out[m, n] = out_dtype((fp32(sum_k x[m, k] * w[n, k]) * sx[m]) * sw[n] + fp32(bias[n]))

    x [M, K] int8, w [N, K] int8    contiguous along K, any stride between rows
    sx [M] fp32, sw [N] fp32, bias [N] bf16 | fp16 | fp32 or absent
    out [M, N] bf16 | fp16 | fp32, or the int32 sums themselves, contiguous along N, any stride between rows

One program makes one tile of block_m x block_n. Loads past M or N wrap around to rows that exist, and the store's mask,
made from the coordinates before wrapping, drops what they give; loads past K are masked to zero, in kernels of a
K that is no multiple of block_k only. Padded copies of the operands were rejected: they cost a pass over memory.

Programs go down the columns of bands of group_m tile rows, so that the operands in flight stay in L2.

M is never specialized: a new prompt length compiles nothing. `enable_fp_fusion=False` keeps ptxas from contracting
the epilogue's product and sum into one rounding. sm_80 to sm_89 and sm_120 run `mma.sync ... s32.s8.s8.s32.satfinite`,
sm_90 runs `wgmma`: saturating and wrapping agree because no sum leaves int32 for K <= 131071.
"""

from __future__ import annotations

import io
import tokenize
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from int8kit.spec import ConfigError, GemmShape, ShapeError, TileConfig

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BIAS_DTYPES = OUT_DTYPES
COMPILE_OPTIONS = {"enable_fp_fusion": False}


@triton.jit(do_not_specialize=["M"])
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SUMS_ONLY: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    band = GROUP_M * tiles_n
    first_m = pid // band * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    rows = (first_m + pid % band % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid % band // height * BLOCK_N + tl.arange(0, BLOCK_N)

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

    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_om + cols[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if SUMS_ONLY:
        tl.store(out_ptrs, acc, mask=inside)
    else:
        sx = tl.load(sx_ptr + rows, mask=rows < M, other=0.0)
        sw = tl.load(sw_ptr + cols, mask=cols < N, other=0.0)
        y = acc.to(tl.float32) * sx[:, None] * sw[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
            y = y + bias[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)


def interpreted() -> bool:
    """True if Triton runs kernels on the CPU in this process (TRITON_INTERPRET=1 at its import)."""
    return not isinstance(_gemm, triton.JITFunction)


@lru_cache(maxsize=1)
def kernel_hash() -> str:
    """12 hexadecimal digits that change with the device code, and not with its comments or layout.

    Raises OSError where the source cannot be read.
    """
    import hashlib
    import inspect

    source = inspect.getsource(_gemm.fn)
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in layout]
    return hashlib.sha256(" ".join(tokens).encode()).hexdigest()[:12]


def constants(config: TileConfig, k: int, *, has_bias: bool, sums_only: bool = False) -> dict[str, Any]:
    """The kernel's compile-time values for `config` and K, as the launcher and the offline compiler pass them."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "EVEN_K": k % config.block_k == 0,
        "HAS_BIAS": has_bias,
        "SUMS_ONLY": sums_only,
    }


def accumulate(
    xq: torch.Tensor,
    wq: torch.Tensor,
    *,
    config: TileConfig,
    out: torch.Tensor | None = None,
    arch: str | None = None,
) -> torch.Tensor:
    """The int32 sums `xq @ wq.T`, for proofs.

    xq: [M, K] int8; wq: [N, K] int8; out: [M, N] int32, made if absent. arch: the code of another card, such as
    "sm86" on an sm_90. Raises ShapeError for tensors outside the kernel's domain, ConfigError if `config` cannot run.
    """
    out = _empty(xq, wq, torch.int32) if out is None else out
    _launch(xq, wq, None, None, None, out, config, arch)
    return out


def scaled_mm(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: TileConfig,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    arch: str | None = None,
) -> torch.Tensor:
    """The dequantized product, bit-equal to `int8kit.reference.scaled_mm` under every legal `config`.

    xq: [M, K] int8; wq: [N, K] int8; sx: [M] fp32; sw: [N] fp32; bias: [N] bf16, fp16 or fp32, or None.
    out: [M, N] of out_dtype (bf16, fp16 or fp32), made if absent. arch: the code of another card, such as "sm86" on an
    sm_90. Raises ShapeError for tensors outside the kernel's domain, ConfigError if `config` cannot run.
    """
    out = _empty(xq, wq, out_dtype) if out is None else out
    if interpreted() and out.dtype is torch.bfloat16:
        # Triton's interpreter truncates float32 to bfloat16 instead of rounding; let torch do that step.
        single = torch.empty_like(out, dtype=torch.float32)
        _launch(xq, wq, sx, sw, bias, single, config, arch)
        return out.copy_(single)
    _launch(xq, wq, sx, sw, bias, out, config, arch)
    return out


def _empty(xq: torch.Tensor, wq: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(xq.shape[0], wq.shape[0], dtype=dtype, device=xq.device)


def _check(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor | None,
    sw: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[int, int, int]:
    if xq.dim() != 2 or wq.dim() != 2 or xq.shape[1] != wq.shape[1]:
        raise ShapeError(f"x {tuple(xq.shape)} and w {tuple(wq.shape)}: legal are [M, K] and [N, K] of one K")
    if xq.dtype is not torch.int8 or wq.dtype is not torch.int8:
        raise ShapeError(f"x {xq.dtype} and w {wq.dtype}: both must be torch.int8; quantize first")
    (m, k), n = xq.shape, wq.shape[0]
    GemmShape(max(m, 1), n, k)
    for name, vector, length in (("sx", sx, m), ("sw", sw, n), ("bias", bias, n)):
        if vector is None:
            continue
        if vector.shape != (length,) or not vector.is_contiguous():
            raise ShapeError(f"{name} {tuple(vector.shape)}: legal is a contiguous [{length}]")
        legal = BIAS_DTYPES if name == "bias" else (torch.float32,)
        if vector.dtype not in legal:
            raise ShapeError(f"{name} {vector.dtype}: legal are {', '.join(map(str, legal))}")
    if out.shape != (m, n) or out.dtype not in ((torch.int32,) if sx is None else OUT_DTYPES):
        raise ShapeError(f"out {out.dtype} {tuple(out.shape)}: legal is [{m}, {n}] of bf16, fp16 or fp32 (int32: sums)")
    for name, matrix in (("x", xq), ("w", wq), ("out", out)):
        if matrix.stride(1) != 1 and matrix.shape[1] > 1:
            raise ShapeError(f"{name} has strides {matrix.stride()}: the last must be 1; call .contiguous() first")
    if len({t.device for t in (xq, wq, sx, sw, bias, out) if t is not None}) > 1:
        raise ShapeError("the tensors are on several devices; move them to one")
    return m, n, k


def _launch(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor | None,
    sw: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: TileConfig,
    arch: str | None,
) -> None:
    m, n, k = _check(xq, wq, sx, sw, bias, out)
    if m == 0:
        return
    options: dict[str, Any] = dict(COMPILE_OPTIONS, num_warps=config.num_warps, num_stages=config.num_stages)
    if arch is not None:
        options["arch"] = arch
    grid = (-(-m // config.block_m) * -(-n // config.block_n),)
    strides = xq.stride(0), wq.stride(0), out.stride(0)
    values = constants(config, k, has_bias=bias is not None, sums_only=sx is None)
    try:
        # `_gemm` reads no pointer whose part it does not compute; a tensor in its place keeps the signature of one kind
        with on_device(xq):
            _gemm[grid](
                xq, wq, xq if sx is None else sx, xq if sw is None else sw, xq if bias is None else bias, out,
                m, n, k, *strides, **values, **options,
            )  # fmt: skip
    except triton.runtime.errors.OutOfResources as error:
        raise ConfigError(f"{config} does not fit this card: {error}; take a smaller tile or fewer stages") from None


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which Triton launches on x's device; does nothing for a CPU tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
