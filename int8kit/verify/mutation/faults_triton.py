"""Faults of the Triton GEMM kernel, and of the L2 swizzle and the epilogue that all GEMM kernels share."""

from __future__ import annotations

from int8kit.verify.mutation.mutant import Mutant


def _triton(name: str, old: str, new: str, fault: str, expected: str = "accumulator", gpu_only: str = "") -> Mutant:
    return Mutant(name, "kernels/gemm_triton.py", old, new, fault, expected, gpu_only)


def _swizzle(name: str, old: str, new: str, fault: str) -> Mutant:
    return Mutant(name, "kernels/l2_swizzle.py", old, new, fault, "accumulator")


def _epilogue(name: str, old: str, new: str, fault: str, expected: str = "output") -> Mutant:
    return Mutant(name, "kernels/epilogue.py", old, new, fault, expected)


FAULTS = (
    _triton("scale-row-wraps", "sx = tl.load(sx_ptr + rows, mask", "sx = tl.load(sx_ptr + rows % 32768, mask",
             "rows from 32768 on take the scales of the first rows", "output"),
    _swizzle(
        "tile-rows-floored",
        "tiles_m = tl.cdiv(M, BLOCK_M)", "tiles_m = tl.maximum(M // BLOCK_M, 1)",
        "the partial tile row at the bottom is not counted",
    ),
    _swizzle(
        "tile-columns-one-more",
        "group = group_m * tl.cdiv(N, BLOCK_N)", "group = group_m * (N // BLOCK_N + 1)",
        "one tile column too many where N is a multiple of the tile",
    ),
    _swizzle(
        "last-swizzle-group-too-high",
        "height = tl.minimum(tiles_m - first, group_m)", "height = group_m",
        "the last swizzle group of tile rows is treated as a full one",
    ),
    _triton(
        "grid-short-of-a-row",
        "grid = cdiv(o.m, config.block_m)", "grid = max(o.m // config.block_m, 1)",
        "the launcher starts no programs for the partial tile row",
    ),
    _triton(
        "k-mask-off-by-one",
        "mask=(ks < K - k)[None, :], other=0)\n            w = tl.load(w_ptrs, mask=(ks < K - k)[:, None]",
        "mask=(ks <= K - k)[None, :], other=0)\n            w = tl.load(w_ptrs, mask=(ks <= K - k)[:, None]",
        "both loads take one element past K",
    ),
    _triton("k-tail-unmasked", "if EVEN_K:", "if K > 0:", "the partial k-step is loaded without a mask"),
    _triton(
        "k-tail-dropped",
        "for k in range(0, K, BLOCK_K):", "for k in range(0, K - BLOCK_K + 1, BLOCK_K):",
        "the partial k-step is left out",
    ),
    _triton(
        "sum-of-the-last-step",
        "acc = tl.dot(x, w, acc, out_dtype=tl.int32)", "acc = tl.dot(x, w, out_dtype=tl.int32)",
        "each k-step overwrites the sums of earlier k-steps",
    ),
    _triton(
        "int16-overflow",
        "acc = tl.dot(x, w, acc, out_dtype=tl.int32)",
        "acc = tl.dot(x, w, acc, out_dtype=tl.int32).to(tl.int16).to(tl.int32)",
        "sums are kept in 16 bits",
    ),
    _triton(
        "fp32-accumulate",
        "acc = tl.dot(x, w, acc, out_dtype=tl.int32)",
        "acc = (acc.to(tl.float32) + tl.dot(x, w, out_dtype=tl.int32).to(tl.float32)).to(tl.int32)",
        "sums are kept in float32, which rounds beyond 2**24",
    ),
    _triton(
        "load-offsets-of-32-bits",
        "(rows % M).to(tl.int64)[:, None] * stride_xm", "((rows % M)[:, None] * stride_xm)",
        "offsets of the rows of x overflow beyond 2**31 bytes",
    ),
    _triton(
        "store-offsets-of-32-bits",
        "out_ptr + rows.to(tl.int64)[:, None] * stride_om", "out_ptr + rows[:, None] * stride_om",
        "offsets of the output's rows overflow beyond 2**31 elements", "output",
    ),
    _triton(
        "strides-swapped",
        "tl.int64)[None, :] * stride_wn", "tl.int64)[None, :] * stride_xm",
        "rows of w are stepped through with the stride of x",
    ),
    _triton(
        "store-a-row-too-far",
        "tl.store(out_ptrs + cols[None, :], acc, mask=(rows < M)[:, None]",
        "tl.store(out_ptrs + cols[None, :], acc, mask=(rows <= M)[:, None]",
        "the store's mask lets one row past M through",
    ),
    _triton(
        "expanded-rows", "o.xq.stride(0), o.wq", "o.xq.stride(0) or o.k, o.wq",
        "the rows of an expanded x, which all lie in one place, are read as if they followed each other",
    ),
    _triton(
        "middle-k", "o.out, o.m, o.n, o.k, o.xq", "o.out, o.m, o.n, o.k - 16 * (20000 < o.k < 60000), o.xq",
        "the last elements of K are left out where K is of a middle size",
    ),
    _triton(
        "rows-of-a-wide-matrix",
        "grid = cdiv(o.m, config.block_m)", "grid = cdiv(min(o.m, 4096) if o.n > 64 else o.m, config.block_m)",
        "rows from 4096 on are not computed, unless N is small", "output",
    ),
    _triton(
        "racy-store",
        "y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :]",
        "y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols >= 0)[None, :]",
        "columns past N are stored into the next row, which another program writes too", "output",
    ),
    _epilogue(
        "scales-swapped",
        "acc.to(tl.float32) * sx * sw", "acc.to(tl.float32) * sw * sx",
        "the column's scale is multiplied before the row's", "output",
    ),
    _epilogue(
        "scales-joined",
        "acc.to(tl.float32) * sx * sw", "acc.to(tl.float32) * (sx * sw)",
        "the two scales are multiplied with each other first", "output",
    ),
    _triton(
        "stale-scale-row",
        "tl.load(sx_ptr + rows, mask=rows < M", "tl.load(sx_ptr + rows % BLOCK_M, mask=rows < M",
        "every tile takes the row scales of the first tile", "output",
    ),
    _triton(
        "bias-before-scale",
        "other=0.0)[None, :])", "other=0.0)[None, :] * sw[None, :])",
        "the bias is added before the column's scale is multiplied", "output",
    ),
    _epilogue(
        "bias-in-half-precision",
        "bias.to(tl.float32)",
        "bias.to(tl.float16).to(tl.float32)",
        "the bias is rounded to float16", "output",
    ),
    _triton(
        "truncating-cast",
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "        if out_ptr.dtype.element_ty == tl.float16:\n"
        "            y = (y.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)\n"
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "float16 output is truncated instead of rounded", "output",
    ),
    _triton(
        "truncating-cast-to-bfloat16",
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "        if out_ptr.dtype.element_ty == tl.bfloat16:\n"
        "            y = (y.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)\n"
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "bfloat16 output is truncated instead of rounded", "output",
        "the interpreter itself truncates bfloat16, so torch rounds there",
    ),
    _epilogue("gate-and-up-swapped", "gate, up = y.reshape", "up, gate = y.reshape",
             "silu is applied to the up half", "swiglu"),
    _triton("bias-wraps", "tl.load(bias_ptr + cols, mask", "tl.load(bias_ptr + cols % 32768, mask",
             "columns from 32768 on take the bias of the first columns", "output"),
    _swizzle(
        "swizzle-of-64-columns",
        "group = group_m * tl.cdiv(N, BLOCK_N)", "group = group_m * tl.minimum(tl.cdiv(N, BLOCK_N), 64)",
        "swizzle groups end after 64 tile columns, so some tiles are computed twice and others never",
    ),
    _triton(
        "flushed-output",
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "        if out_ptr.dtype.element_ty == tl.float32:\n"
        "            y = tl.where(tl.abs(y) < 1.1754943508222875e-38, y * 0.0, y)\n"
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "subnormal float32 results become zero", "output",
    ),
    _epilogue("bias-without-nan", "return y + bias.to(tl.float32)",
              "return y + tl.where(bias == bias, bias, 0.0).to(tl.float32)", "a NaN in the bias counts as zero"),
    _triton("swiglu-columns", "cols = col // 2 + tl.arange", "cols = col + tl.arange",
             "half as many columns are stored at the offsets of all columns", "swiglu"),
    _triton("swiglu-store-mask", "N = N // 2", "N = (N + BLOCK_N) // 2",
             "the store's mask lets half a tile past N / 2 through", "swiglu"),
)  # fmt: skip
