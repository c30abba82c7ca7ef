"""Faults of the row kernels, and of the activation and the launcher, which the GEMM kernels use too."""

from __future__ import annotations

from int8kit.verify.mutation.mutant import Mutant

ACTIVATION_FAULTS = (
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

ROW_FAULTS = (
    Mutant(
        "reciprocal-for-division", "kernels/row_primitives.py",
        "tl.div_rn(y, tl.where(s > 0, s, 1.0))", "y * tl.div_rn(1.0, tl.where(s > 0, s, 1.0))",
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
        "a comparison with NaN is false, so the maximum drops the NaN", "quantize",
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
        "a row of subnormal numbers is treated as zeros", "quantize",
    ),
    Mutant(
        "clamp-to-minus-128", "kernels/row_primitives.py",
        "tl.where(s > 0, s, 1.0)), -127.0)", "tl.where(s > 0, s, 1.0)), -128.0)",
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
        "q = tl.fma(tl.fma(-s, q, y), r, q) + ROUNDER", "q = q + ROUNDER",
        "the quotient's last correction is missing", "quantize",
        "a path of fused operations, which the interpreter lacks",
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
        "the compiler does it, and the interpreter does not",
    ),
)  # fmt: skip


FUSED_FAULTS = (
    Mutant(
        "long-subnormal-scale", "kernels/quantize.py",
        "clamped_quotient(x, s)", "clamped_quotient(x, tl.where(s < 1e-38, 1.0, s))",
        "rows of more than 16384 elements are not divided by a subnormal scale", "quantize",
    ),
    Mutant(
        "root-of-the-reciprocal", "kernels/row_primitives.py",
        "tl.div_rn(1.0, tl.sqrt_rn(mean + eps))", "tl.sqrt_rn(tl.div_rn(1.0, mean + eps))",
        "the norm's two roundings are in the other order", "rms_norm_quantize",
    ),
    Mutant(
        "mean-over-padding", "kernels/row_primitives.py",
        "_sum_eighths(parts[0]), K * 1.0)", "_sum_eighths(parts[0]), (K + CHUNK - 1) // CHUNK * CHUNK * 1.0)",
        "the zeros that fill the last chunk count in the mean of squares", "rms_norm_quantize",
    ),
    Mutant(
        "modulation-of-first-image", "kernels/rms_norm_quantize.py", ".to(tl.int64) * stride_mb", ".to(tl.int64) * 0",
        "every image gets the modulation of the first", "rms_norm_quantize",
    ),
    Mutant(
        "residual-not-rounded", "kernels/residual_norm_quantize.py", "new = round_to(new, DTYPE)", "new = new * 1.0",
        "the next norm uses the sum before it was rounded to the stored dtype", "residual_norm_quantize",
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
    Mutant(
        "dense-modulation", "kernels/rms_norm_quantize.py", ".to(tl.int64) * stride_mb", ".to(tl.int64) * K",
        "the modulation of further images is read as if its rows were dense", "rms_norm_quantize",
    ),
    Mutant(
        "sine-by-the-cosine-stride", "kernels/qk_norm_rope.py",
        "sin_ptr += at * stride_sl", "sin_ptr += at * stride_cl",
        "rows of sin are stepped through with the stride of cos", "qk_norm_rope",
    ),
    Mutant(
        "quantize-4096-rows", "kernels/quantize.py",
        "_quantize if held else _quantize_long, (m, 1)", "_quantize if held else _quantize_long, (min(m, 4096), 1)",
        "rows from 4096 on are not written", "quantize",
    ),
    Mutant(
        "squares-of-four-groups", "kernels/row_primitives.py",
        "for c in tl.static_range(g + GROUPS, len(xs), GROUPS):",
        "for c in tl.static_range(g + GROUPS, len(xs) if len(xs) < 4 * GROUPS else 4 * GROUPS, GROUPS):",
        "elements from 8192 on are left out of the mean of squares", "rms_norm_quantize",
    ),
    Mutant(
        "long-row-tail-of-one", "kernels/quantize.py",
        "top = larger(top, widen(tl.load(x_ptr + k + ks, mask=ks < K - k, other=0.0)))",
        "top = larger(top, widen(tl.load(x_ptr + k + ks, mask=ks < K - k - (K % CHUNK == 1), other=0.0)))",
        "a partial chunk of one element does not count for the scale of a long row", "quantize",
    ),
    Mutant(
        "residual-offsets-of-32-bits", "kernels/residual_norm_quantize.py",
        "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)",
        "offsets of rows overflow beyond 2**31 elements", "residual_norm_quantize",
    ),
    Mutant(
        "heads-wrap-at-32", "kernels/qk_norm_rope.py",
        "tl.arange(0, HEADS)\n        ptrs = ptr + head", "tl.arange(0, HEADS)\n        ptrs = ptr + head % 32",
        "heads from 32 on are read from the first heads", "qk_norm_rope",
    ),
    Mutant(
        "fused-quotients-of-any-scale", "kernels/row_primitives.py",
        "tl.constexpr(2.0**-100)", "tl.constexpr(2.0**-126)",
        "the short quotient serves rows whose remainder is not representable", "quantize",
        "a path of fused operations, which the interpreter lacks",
    ),
    Mutant(
        "expanded-modulation", "kernels/rms_norm_quantize.py",
        "0 if modulation is None else modulation.stride(0)", "0 if modulation is None else modulation.stride(0) or k",
        "an expanded modulation is read as if it had a row for each image", "rms_norm_quantize",
    ),
    Mutant(
        "sum-clamped-to-float16", "kernels/row_primitives.py",
        "    return widen(x.to(DTYPE))",
        "    if DTYPE == tl.float16:\n"
        "        x = tl.where(tl.abs(x) < float('inf'), tl.minimum(tl.maximum(x, -65504.0), 65504.0), x)\n"
        "    return widen(x.to(DTYPE))",
        "a sum beyond the largest float16 becomes that number and not infinity", "residual_norm_quantize",
    ),
    Mutant(
        "least-eps", "kernels/qk_norm_rope.py",
        "floats=(eps,)", "floats=(eps if eps == 0 or eps > 1e-7 else 1e-7,)",
        "an eps below 1e-7 becomes 1e-7", "qk_norm_rope",
    ),
    Mutant(
        "row-key-without-constants", "kernels/row_primitives.py",
        "dtypes and (*dtypes, values),", "dtypes and (*dtypes,),",
        "a compiled row kernel is launched for another K", "row launches",
    ),
)  # fmt: skip
