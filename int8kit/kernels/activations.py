"""Activation functions of fp32 values in registers, for every kernel. They access no memory.

    silu(g) = g / (1 + exp(-g))          the bits of `int8kit.reference.silu`

A library's exponential differs between GPU and CPU and between versions. This one consists of IEEE operations that
plain torch has too, in one order:

    h = max(g, -86), t = min(h, 86)                             NaN stays in h
    n = rint(-t log2(e)),  f = (t + n C1) + n C2                |f| <= ln(2) / 2; C1 + C2 = ln(2), both products exact
    a = E + f, b = E - f with E = 2 + f f (P1 + f f P2)         b / a = exp(-f) to 5e-10
    sigma = a * (1 / (a + 2**n b)),  silu = h * sigma           an IEEE reciprocal; 2**n by adding to the exponent

The quotient b / a replaces a polynomial of degree 5 and costs no extra division, since sigma needs one anyway. A
reciprocal takes three instructions, a division eight; one silu takes 20. The error is below 4 units in the last place
(3.4 measured). Below -86, and at -inf, silu stays at silu(-86) = -3.8e-36, while the true value approaches zero.
silu(inf) = inf, and silu(NaN) is NaN.

A fused multiply-add is used where the product is exact, because there it rounds like the two operations. It is also
used for n, where rint of the exact product is defined to round once. No value is negated: that would be an extra
operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from int8kit.kernels.row_primitives import INTERPRETED, ROUNDER

LIMIT: tl.constexpr = tl.constexpr(86.0)
MINUS_LOG2_E: tl.constexpr = tl.constexpr(-1.4426950216293335)
ROUNDER_64: tl.constexpr = tl.constexpr(6755399441055744.0)  # ROUNDER for float64
C1: tl.constexpr = tl.constexpr(0.693145751953125)  # 16 bits
C2: tl.constexpr = tl.constexpr(1.428605173714459e-06)  # 17 bits: times n, of 7 bits, still exact
P1: tl.constexpr = tl.constexpr(0.166666179895401)
P2: tl.constexpr = tl.constexpr(-0.002765987068414688)


_RECIPROCAL: tl.constexpr = tl.constexpr(
    "{ .reg .f32 r, e, d;"
    "  rcp.approx.ftz.f32 r, $1;"
    "  neg.f32 d, $1;"
    "  fma.rn.f32 e, d, r, 0f3F800000;"  # 1 - d r
    "  fma.rn.f32 $0, e, r, r; }"
)


@triton.jit
def reciprocal(d):
    """1 / d, correctly rounded, for d from 1 to 2**126: the compiler's fast path without its range test."""
    if INTERPRETED:
        return tl.div_rn(tl.full(d.shape, 1.0, tl.float32), d)
    return tl.inline_asm_elementwise(_RECIPROCAL, "=r,r", [d], tl.float32, is_pure=True, pack=1)


@triton.jit
def _rounded(t):
    """rint(-t log2(e)) + ROUNDER of the exact product."""
    if INTERPRETED:  # its fma rounds twice; in float64 the product is exact, and the sum is an integer
        return ((t.to(tl.float64) * MINUS_LOG2_E + ROUNDER_64) - ROUNDER_64).to(tl.float32) + ROUNDER
    return tl.fma(t, MINUS_LOG2_E, ROUNDER)


@triton.jit
def silu(g):
    """g / (1 + exp(-g)) for a tensor of fp32, bit-equal to `int8kit.reference.silu`. Needs enable_fp_fusion=False."""
    h = tl.maximum(g, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    t = tl.minimum(h, LIMIT)
    m = _rounded(t)
    n = m - ROUNDER
    f = tl.fma(n, C2, tl.fma(n, C1, t))
    w = f * f
    e = w * (w * P2 + P1) + 2.0
    a = e + f
    b = ((e - f).to(tl.int32, bitcast=True) + (m.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return h * (a * reciprocal(a + b))
