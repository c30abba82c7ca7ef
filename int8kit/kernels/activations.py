"""Activation functions on fp32 values in registers, for any kernel to call: arithmetic alone, no memory.

    silu(g) = g / (1 + exp(-g))          the bits of `int8kit.reference.silu`

The exponential of a library differs between a GPU and a CPU, and between versions. This one is made of IEEE operations
that plain torch has too, in one order:

    h = max(g, -86), t = min(h, 86)                             NaN stays in h
    n = rint(-t log2(e)),  f = (t + n C1) + n C2                |f| <= ln(2) / 2; C1 + C2 = ln(2), both products exact
    a = E + f, b = E - f with E = 2 + f f (P1 + f f P2)         b / a = exp(-f) to 5e-10
    sigma = a * (1 / (a + 2**n b)),  silu = h * sigma           an IEEE reciprocal; 2**n by adding to the exponent

A quotient b / a in place of a polynomial of degree 5 costs no division, since one is needed anyway. A reciprocal takes
three instructions, a division eight: 20 a silu. The error is below 4 units in the last place (3.4 measured). Below -86,
silu stays at silu(-86) = -3.8e-36, where the truth goes on to zero; so it does at -inf. silu(inf) = inf, silu(NaN) is
NaN.

Fused multiply-adds serve where the product is exact, since there they round as the two operations do, and for n, where
rounding once is what rint of the exact product is. No value is negated: that would be an operation of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from int8kit.kernels.row_primitives import INTERPRETED, ROUNDER

LIMIT: tl.constexpr = tl.constexpr(86.0)
MINUS_LOG2_E: tl.constexpr = tl.constexpr(-1.4426950216293335)
ROUNDER_64: tl.constexpr = tl.constexpr(6755399441055744.0)  # as ROUNDER, of float64
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
    """1 / d, IEEE, for d from 1 to 2**126: the fast path of the compiler's own, without its test of the range."""
    if INTERPRETED:
        return tl.div_rn(tl.full(d.shape, 1.0, tl.float32), d)
    return tl.inline_asm_elementwise(_RECIPROCAL, "=r,r", [d], tl.float32, is_pure=True, pack=1)


@triton.jit
def _rounded(t):
    """rint(-t log2(e)) + ROUNDER, of the exact product."""
    if INTERPRETED:  # whose fma rounds twice; in float64 the product is exact, and this sum an integer
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
