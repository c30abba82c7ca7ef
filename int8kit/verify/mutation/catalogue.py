"""The catalogue of seeded faults: what the verifier must catch, each one replacement in one kernel source file.

    Mutant("k-tail-dropped", "kernels/gemm_triton.py",
           old="for k in range(0, K, BLOCK_K):", new="for k in range(0, K - BLOCK_K + 1, BLOCK_K):",
           fault="the last, partial step of K is left out", expected="accumulator")

`old` stands exactly once in its file, which a test holds, so that the catalogue cannot go stale unseen. The faults are
those that a person makes in such kernels, one by one. Operators that a tool applies everywhere (swap + and -) were
rejected: most of what they give does not compile or changes nothing, and nobody reads the list. It is one table, and so
one file.

A fault that changes no bit by definition is not in it: reading past M or N, which the store's mask drops anyway.

`card` is the reason why Triton's interpreter cannot show a fault, for a mutant that only a GPU judges: what the
compiler does, what the interpreter does by itself, or a path that it does not take.
"""

from __future__ import annotations

from dataclasses import dataclass

from int8kit.spec import Kernel, TileConfig

_GLUON = "written in Gluon, which the interpreter does not run"
_FILES = {
    "kernels/gemm_mma_sync.py": Kernel.MMA_SYNC, "kernels/gemm_wgmma.py": Kernel.WGMMA,
    "kernels/tile_scheduler.py": Kernel.MMA_SYNC,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` becomes `new` at its only place in `file`, a path within the package."""

    name: str
    file: str
    old: str
    new: str
    fault: str  # what is wrong, in one line
    expected: str  # the property of `checks` that should differ, tried first
    gpu_only: str = ""  # why only a GPU shows it; "" if the interpreter does too

    @property
    def kernel(self) -> Kernel:
        """The kernel whose configurations run the fault. `schedule` serves two; Ampere's runs on more cards."""
        return _FILES.get(self.file, Kernel.TRITON)

    @property
    def needs_gpu(self) -> str:
        """Why Triton's interpreter cannot show the fault, or ""."""
        return _GLUON if self.kernel is not Kernel.TRITON else self.gpu_only


TILES = {  # small, so that a small matrix has many of them; whole tiles and stream-K
    Kernel.MMA_SYNC: (
        TileConfig(16, 64, 64, num_warps=4, num_stages=2, group_m=2, kernel=Kernel.MMA_SYNC),
        TileConfig(64, 64, 128, num_warps=4, num_stages=3, group_m=1, kernel=Kernel.MMA_SYNC),
        TileConfig(16, 64, 64, num_warps=4, num_stages=3, group_m=3, kernel=Kernel.MMA_SYNC, stream_k=1),
        TileConfig(32, 64, 128, num_warps=4, num_stages=2, group_m=8, kernel=Kernel.MMA_SYNC, stream_k=2),
    ),
    Kernel.WGMMA: (
        TileConfig(64, 64, 128, num_warps=8, num_stages=3, group_m=2, kernel=Kernel.WGMMA),
        TileConfig(256, 64, 128, num_warps=8, num_stages=4, group_m=1, kernel=Kernel.WGMMA),
        TileConfig(64, 128, 128, num_warps=8, num_stages=4, group_m=8, kernel=Kernel.WGMMA, stream_k=1),
        TileConfig(256, 64, 128, num_warps=8, num_stages=3, group_m=3, kernel=Kernel.WGMMA, stream_k=1),
    ),
}
"""Configurations of the Gluon kernels that their mutants run with; those of the plain one are `checks.SMALL_TILES`."""


def _pointer(name: str, old: str, new: str, fault: str, expected: str = "accumulator", gpu_only: str = "") -> Mutant:
    return Mutant(name, "kernels/gemm_triton.py", old, new, fault, expected, gpu_only)


_POINTER = (
    _pointer("scale-row-wraps", "sx = tl.load(sx_ptr + rows, mask", "sx = tl.load(sx_ptr + rows % 32768, mask",
             "rows from 32768 on take the scales of the first", "output"),
    _pointer(
        "tile-rows-floored",
        "tiles_m = (M + BLOCK_M - 1) // BLOCK_M", "tiles_m = tl.maximum(M // BLOCK_M, 1)",
        "the partial tile row at the bottom is not counted",
    ),
    _pointer(
        "tile-columns-one-more",
        "tiles_n = (N + BLOCK_N - 1) // BLOCK_N", "tiles_n = N // BLOCK_N + 1",
        "one tile column too many where N is a multiple of the tile",
    ),
    _pointer(
        "last-band-too-high",
        "height = tl.minimum(tiles_m - first_m, group_m)", "height = group_m",
        "the last band of tile rows is taken for a full one",
    ),
    _pointer(
        "grid-short-of-a-row",
        "grid = cdiv(o.m, config.block_m)", "grid = max(o.m // config.block_m, 1)",
        "the launcher starts no programs for the partial tile row",
    ),
    _pointer(
        "k-mask-off-by-one",
        "mask=(ks < K - k)[None, :], other=0)\n            w = tl.load(w_ptrs, mask=(ks < K - k)[:, None]",
        "mask=(ks <= K - k)[None, :], other=0)\n            w = tl.load(w_ptrs, mask=(ks <= K - k)[:, None]",
        "both loads take one element past K",
    ),
    _pointer("k-tail-unmasked", "if EVEN_K:", "if K > 0:", "the partial step of K is loaded without a mask"),
    _pointer(
        "k-tail-dropped",
        "for k in range(0, K, BLOCK_K):", "for k in range(0, K - BLOCK_K + 1, BLOCK_K):",
        "the partial step of K is left out",
    ),
    _pointer(
        "sum-of-the-last-step",
        "acc = tl.dot(x, w, acc, out_dtype=tl.int32)", "acc = tl.dot(x, w, out_dtype=tl.int32)",
        "each step of K overwrites the sums of those before",
    ),
    _pointer(
        "int16-overflow",
        "acc = tl.dot(x, w, acc, out_dtype=tl.int32)",
        "acc = tl.dot(x, w, acc, out_dtype=tl.int32).to(tl.int16).to(tl.int32)",
        "sums are kept in 16 bits",
    ),
    _pointer(
        "fp32-accumulate",
        "acc = tl.dot(x, w, acc, out_dtype=tl.int32)",
        "acc = (acc.to(tl.float32) + tl.dot(x, w, out_dtype=tl.int32).to(tl.float32)).to(tl.int32)",
        "sums are kept in float32, which rounds beyond 2**24",
    ),
    _pointer(
        "load-offsets-of-32-bits",
        "(rows % M).to(tl.int64)[:, None] * stride_xm", "((rows % M)[:, None] * stride_xm)",
        "offsets of the rows of x overflow beyond 2**31 bytes",
    ),
    _pointer(
        "store-offsets-of-32-bits",
        "out_ptr + rows.to(tl.int64)[:, None] * stride_om", "out_ptr + rows[:, None] * stride_om",
        "offsets of the output's rows overflow beyond 2**31 elements", "output",
    ),
    _pointer(
        "strides-swapped",
        "tl.int64)[None, :] * stride_wn", "tl.int64)[None, :] * stride_xm",
        "rows of w are stepped through with the stride of x",
    ),
    _pointer(
        "store-a-row-too-far",
        "tl.store(out_ptrs + cols[None, :], acc, mask=(rows < M)[:, None]",
        "tl.store(out_ptrs + cols[None, :], acc, mask=(rows <= M)[:, None]",
        "the store's mask lets one row past M through",
    ),
    _pointer(
        "racy-store",
        "y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :]",
        "y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols >= 0)[None, :]",
        "columns past N are stored into the next row, which another program writes too", "output",
    ),
    _pointer(
        "scales-swapped",
        "acc.to(tl.float32) * sx[:, None] * sw[None, :]", "acc.to(tl.float32) * sw[None, :] * sx[:, None]",
        "the column's scale is multiplied before the row's", "output",
    ),
    _pointer(
        "scales-joined",
        "acc.to(tl.float32) * sx[:, None] * sw[None, :]", "acc.to(tl.float32) * (sx[:, None] * sw[None, :])",
        "the two scales are multiplied with each other first", "output",
    ),
    _pointer(
        "stale-scale-row",
        "tl.load(sx_ptr + rows, mask=rows < M", "tl.load(sx_ptr + rows % BLOCK_M, mask=rows < M",
        "every tile takes the row scales of the first", "output",
    ),
    _pointer(
        "bias-before-scale",
        "y = y + bias[None, :]", "y = y + bias[None, :] * sw[None, :]",
        "the bias is added before the column's scale is multiplied", "output",
    ),
    _pointer(
        "bias-in-half-precision",
        "tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)",
        "tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float16).to(tl.float32)",
        "the bias is rounded to float16", "output",
    ),
    _pointer(
        "truncating-cast",
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "        if out_ptr.dtype.element_ty == tl.float16:\n"
        "            y = (y.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)\n"
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "float16 output is cut off instead of rounded", "output",
    ),
    _pointer(
        "truncating-cast-to-bfloat16",
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "        if out_ptr.dtype.element_ty == tl.bfloat16:\n"
        "            y = (y.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)\n"
        "        tl.store(\n            out_ptrs + cols[None, :], y.to",
        "bfloat16 output is cut off instead of rounded", "output",
        "the interpreter itself cuts bfloat16 off, so torch rounds there",
    ),
    _pointer("gate-and-up-swapped", "gate, up = tl.split", "up, gate = tl.split",
             "silu is applied to the up half", "swiglu"),
    _pointer("swiglu-columns", "cols = col // 2 + tl.arange", "cols = col + tl.arange",
             "half as many columns are stored at the places of all", "swiglu"),
    _pointer("swiglu-store-mask", "N = N // 2", "N = (N + BLOCK_N) // 2",
             "the store's mask lets half a tile past N / 2 through", "swiglu"),
)  # fmt: skip

_SILU = (
    Mutant(
        "silu-drops-nan", "kernels/activations.py",
        "h = tl.maximum(g, -LIMIT, propagate_nan=tl.PropagateNan.ALL)", "h = tl.where(g > -LIMIT, g, -LIMIT)",
        "a NaN gate becomes a number", "swiglu",
    ),
    Mutant(
        "silu-unlimited", "kernels/activations.py", "t = tl.minimum(h, LIMIT)", "t = h",
        "the exponent of a large gate overflows", "swiglu",
    ),
    Mutant(
        "silu-short-ln2", "kernels/activations.py",
        "f = tl.fma(n, C2, tl.fma(n, C1, t))", "f = tl.fma(n, C1, t)",
        "ln(2) without its low bits", "swiglu",
    ),
    Mutant(
        "silu-approximate-reciprocal", "kernels/activations.py",
        "fma.rn.f32 $0, e, r, r; }", "mov.f32 $0, r; }",
        "the reciprocal is not refined to IEEE's", "swiglu",
        "PTX, which the interpreter does not run",
    ),
)  # fmt: skip

_ROWS = (
    Mutant(
        "reciprocal-for-division", "kernels/row_primitives.py",
        "tl.div_rn(ys[c], divisor)", "ys[c] * tl.div_rn(1.0, divisor)",
        "quotients are products with a rounded reciprocal", "quantize",
    ),
    Mutant(
        "half-away-rounding", "kernels/row_primitives.py",
        "q = tl.where(s > 0, q, 0.0) + ROUNDER",
        "q = tl.where(s > 0, tl.where(q < 0, tl.ceil(q - 0.5), tl.floor(q + 0.5)), 0.0) + ROUNDER",
        "ties are rounded away from zero", "quantize",
    ),
    Mutant(
        "max-drops-nan", "kernels/row_primitives.py",
        "tl.maximum(top, tl.abs(y), propagate_nan=tl.PropagateNan.ALL)", "tl.maximum(top, tl.abs(y))",
        "a row with a NaN gets the scale of its other elements", "quantize",
        "the interpreter's maximum keeps NaN in either mode",
    ),
    Mutant(
        "max-by-comparison", "kernels/row_primitives.py",
        "tl.maximum(top, tl.abs(y), propagate_nan=tl.PropagateNan.ALL)", "tl.where(tl.abs(y) > top, tl.abs(y), top)",
        "a NaN compares as no larger and is dropped from the maximum", "quantize",
    ),
    Mutant(
        "max-is-signed", "kernels/row_primitives.py",
        "tl.maximum(top, tl.abs(y), propagate", "tl.maximum(top, y, propagate",
        "negative elements do not count for the scale", "quantize",
    ),
    Mutant(
        "infinite-scale", "kernels/row_primitives.py", "tl.where(bits < 0x7F800000", "tl.where(bits <= 0x7F800000",
        "a row with an infinity gets an infinite scale instead of NaN", "quantize",
    ),
    Mutant(
        "scale-by-reciprocal", "kernels/row_primitives.py",
        "tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)", "bits.to(tl.float32, bitcast=True) * (1.0 / 127.0)",
        "the scale is a product with 1 / 127", "quantize",
    ),
    Mutant(
        "flush-to-zero", "kernels/row_primitives.py",
        "tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)",
        "tl.div_rn(tl.where(bits < 0x800000, 0, bits).to(tl.float32, bitcast=True), 127.0)",
        "a row of subnormal numbers is taken for zeros", "quantize",
    ),
    Mutant(
        "clamp-to-minus-128", "kernels/row_primitives.py",
        "tl.div_rn(ys[c], divisor), -127.0)", "tl.div_rn(ys[c], divisor), -128.0)",
        "-128 is let through, in rows whose scale is subnormal", "quantize",
    ),
    Mutant(
        "nan-row-keeps-values", "kernels/row_primitives.py",
        "q = tl.where(s > 0, q, 0.0) + ROUNDER", "q = q + ROUNDER",
        "a row whose scale is NaN or 0 keeps its clamped elements", "quantize",
    ),
    Mutant(
        "row-load-off-by-one", "kernels/row_primitives.py",
        "tl.load(ptr + at, mask=at < K, other=0.0)", "tl.load(ptr + at, mask=at <= K, other=0.0)",
        "the element past a row's end counts for its scale", "quantize",
    ),
    Mutant(
        "row-store-off-by-one", "kernels/row_primitives.py",
        "tl.store(ptr + at, value, mask=at < K)", "tl.store(ptr + at, value, mask=at <= K)",
        "the element past a row's end is written", "quantize",
    ),
    Mutant(
        "row-strides-swapped", "kernels/quantize.py",
        "store_quantized(q_ptr + row * stride_qm, xs", "store_quantized(q_ptr + row * stride_xm, xs",
        "rows of q are stepped through with the stride of x", "quantize",
    ),
    Mutant(
        "max-of-all-but-a-chunk", "kernels/quantize.py",
        "for c in tl.static_range(len(xs)):", "for c in tl.static_range((len(xs) + 1) // 2 * 2 - 1):",
        "the last of an even number of chunks does not count for the scale", "quantize",
    ),
    Mutant(
        "long-row-tail", "kernels/quantize.py",
        "for k in range(0, K, CHUNK):\n        top", "for k in range(0, K - CHUNK + 1, CHUNK):\n        top",
        "the partial chunk of a long row does not count for its scale", "quantize",
    ),
    Mutant(
        "long-row-strides", "kernels/quantize.py", "    q_ptr += row * stride_qm", "    q_ptr += row * stride_xm",
        "long rows of q are stepped through with the stride of x", "quantize",
    ),
    Mutant(
        "uncorrected-quotient", "kernels/row_primitives.py",
        "q = tl.fma(tl.fma(-s, q, ys[c]), r, q) + ROUNDER", "q = q + ROUNDER",
        "the quotient's last correction is missing", "quantize",
        "a path of fused operations, which the interpreter has not",
    ),
    Mutant(
        "bfloat16-pair-swapped", "kernels/row_primitives.py",
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "shl.b32 $1, $2, 16; and.b32 $0, $2, 0xffff0000;",
        "two neighbouring bfloat16 numbers are exchanged", "quantize",
        "PTX, which the interpreter does not run",
    ),
    Mutant(
        "fma-contraction", "kernels/launch.py",
        'COMPILE_OPTIONS = {"enable_fp_fusion": False}', 'COMPILE_OPTIONS = {"enable_fp_fusion": True}',
        "the compiler may contract the epilogue's product and sum", "output",
        "done by the compiler, which the interpreter is not",
    ),
)  # fmt: skip


_FUSED = (
    Mutant(
        "long-subnormal-scale", "kernels/quantize.py",
        "divisor = tl.where(s > 0, s, 1.0)", "divisor = tl.where(s > 1e-38, s, 1.0)",
        "rows of more than 16384 elements are not divided by a subnormal scale", "quantize",
    ),
    Mutant(
        "root-of-the-reciprocal", "kernels/row_primitives.py",
        "tl.div_rn(1.0, tl.sqrt_rn(mean + eps))", "tl.sqrt_rn(tl.div_rn(1.0, mean + eps))",
        "the norm's two roundings are taken in the other order", "rms_norm_quantize",
    ),
    Mutant(
        "mean-over-padding", "kernels/row_primitives.py",
        "_sum_eighths(parts[0]), K * 1.0)", "_sum_eighths(parts[0]), (K + CHUNK - 1) // CHUNK * CHUNK * 1.0)",
        "the zeros that fill the last chunk count in the mean of squares", "rms_norm_quantize",
    ),
    Mutant(
        "first-images-modulation", "kernels/rms_norm_quantize.py", ".to(tl.int64) * stride_mb", ".to(tl.int64) * 0",
        "every image gets the modulation of the first", "rms_norm_quantize",
    ),
    Mutant(
        "residual-not-rounded", "kernels/residual_norm_quantize.py", "new = round_to(new, DTYPE)", "new = new * 1.0",
        "the next norm is of the sum before it was rounded to what is stored", "residual_norm_quantize",
    ),
    Mutant(
        "gate-for-up", "kernels/swiglu_quantize.py", "g, u = tl.split", "u, g = tl.split",
        "gate and up are exchanged before the quantization", "swiglu_quantize",
    ),
    Mutant(
        "rotation-the-other-way", "kernels/qk_norm_rope.py",
        "x_1 * cos_1 + x_0 * sin_1", "x_1 * cos_1 - x_0 * sin_1",
        "the second half of a head is rotated by the opposite angle", "qk_norm_rope",
    ),
)  # fmt: skip


def _ampere(name: str, old: str, new: str, fault: str, expected: str = "accumulator") -> Mutant:
    return Mutant(name, "kernels/gemm_mma_sync.py", old, new, fault, expected)


def _schedule(name: str, old: str, new: str, fault: str) -> Mutant:
    return Mutant(name, "kernels/tile_scheduler.py", old, new, fault, "accumulator")


def _hopper(name: str, old: str, new: str, fault: str, expected: str = "accumulator") -> Mutant:
    return Mutant(name, "kernels/gemm_wgmma.py", old, new, fault, expected)


_AMPERE = (
    _ampere("ampere-copy-past-k", "mask=ks + k < end)", "mask=ks + k < end + 16)",
            "16 bytes past the end of K are copied"),
    _ampere("ampere-dropped-wait",
            "STEPS * BLOCK_K):\n        async_copy.wait_group(STAGES - 2)\n", "STEPS * BLOCK_K):\n",
            "the first fragments of a pass are read before their copy is known to be complete"),
    _ampere("ampere-dropped-steps", "if rest + i * BLOCK_K < end:", "if rest + (i + 1) * BLOCK_K < end:",
            "the last step of K that fills no pass is left out"),
    _ampere("ampere-columns-exchanged", "+ i // 2 % 4) + 2 * j + i % 2", "+ i // 2 % 4) + 2 * (RUN - 1 - j) + i % 2",
            "a thread's columns come in another order than they are stored"),
    _ampere("ampere-scales-joined", "y = acc.to(gl.float32) * gl.expand_dims(sx, 1) * gl.expand_dims(sw, 0)",
            "y = acc.to(gl.float32) * (gl.expand_dims(sx, 1) * gl.expand_dims(sw, 0))",
            "the two scales are multiplied with each other first", "output"),
    _ampere("ampere-missing-reduction", "if k1 - k0 < steps:", "if k1 - k0 < 0:",
            "each part of a stream-K tile is stored as if it were the whole sum"),
    _schedule("naive-owner", "return gl.cdiv((step + 1) * workers, total) - 1", "return step * workers // total",
              "the share's inverse is off where shares are uneven: a part's sums are missed"),
    _schedule("stale-slot", "slot = 2 * other + index - start // steps", "slot = 2 * other",
              "a worker's first slot is read for its second tile too"),
    _schedule("reduction-short-of-one", "owner(index * steps + steps - 1, total, workers) + 1)",
              "owner(index * steps + steps - 1, total, workers))",
              "the last worker of a stream-K tile is left out of its sum"),
    _schedule("own-part-twice", "if other != worker and share", "if share",
              "the worker that completes a tile adds its own part twice"),
    _schedule("counters-not-zeroed", "torch.zeros(max(leftover, 1)", "torch.ones(max(leftover, 1)",
              "the counts of finished steps do not start at zero"),
)  # fmt: skip

_HOPPER = (
    _hopper("hopper-wrong-phase", "mbarrier.wait(full.index(slot), step // STAGES & 1)",
            "mbarrier.wait(full.index(slot), step // STAGES & 1 ^ 1)",
            "a slot is read in the phase before it is full"),
    _hopper("hopper-deadlock", "mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)",
            "mbarrier.wait(empty.index(slot), step // STAGES & 1)",
            "the loader waits for a first slot that nobody will empty"),
    _hopper("hopper-same-half", "x = x.slice(ME * ROWS, ROWS, dim=0)", "x = x.slice(0, ROWS, dim=0)",
            "the second multiplier of a shared tile takes the first one's rows"),
    _hopper("hopper-half-tiles", "waves * programs + pid // 2)", "waves * programs + pid)",
            "the halves of the last wave's tiles are taken for tiles"),
    _hopper("hopper-racy-store", "buffer = staging.index(2 * ME + i % 2)", "buffer = staging.index(i % 2)",
            "the two multipliers stage their stores in the same buffers", "output"),
    _hopper("hopper-partial-box", "gl.minimum(gl.cdiv(M - row, ROWS), BOXES)",
            "gl.minimum(gl.maximum((M - row) // ROWS, 1), BOXES)",
            "the last rows of x, which fill no box, are not copied"),
    _hopper("hopper-store-column", "[row, col + i * WIDTH], buffer)", "[row, col], buffer)",
            "every chunk of a tile is stored over the first"),
    _hopper("hopper-bias-over-scale", "bias_buffer = vectors.index(2 * ME + 1)", "bias_buffer = vectors.index(2 * ME)",
            "the bias overwrites the column scales in shared memory", "output"),
    _hopper("hopper-no-wait", "gdc_wait()  #", "pass  #",
            "a launch that begins early reads what the kernel before it has yet to write", "order"),
)  # fmt: skip

CATALOGUE: tuple[Mutant, ...] = (*_POINTER, *_SILU, *_ROWS, *_FUSED, *_AMPERE, *_HOPPER)
"""Every fault that `int8kit verify --mutate` seeds."""
