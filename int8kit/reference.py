"""The definition of every kernel's result to the bit, in plain torch. It is also the CPU backend of `int8kit run`.

    x [M, K] bf16 | fp16 | fp32  --quantize-->  xq [M, K] int8, sx [M] fp32
    w [N, K]                     --quantize-->  wq [N, K] int8, sw [N] fp32      (once)
    y[m, n] = out_dtype((fp32(sum_k xq[m, k] * wq[n, k]) * sx[m]) * sw[n] + fp32(bias[n]))

Each float32 operation is rounded by itself, in this order, without fused multiply-add. The sum is exact. So the result
does not depend on a tile shape, on M, or on the device.

Products are summed in float64. Its 53 bits hold any int32 sum exactly, in any order. That is faster than int64 on a
CPU, and independent of `torch._int_mm`, the second reference. This module imports nothing that it judges.
"""

from __future__ import annotations

import torch

from int8kit.errors import ShapeError
from int8kit.spec import GemmShape

_ROWS = 4096  # rows of x in float64 at once: bounds the memory and changes no bit


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 quantization with one scale per row.

    x: [M, K], bf16, fp16 or fp32. Returns q [M, K] int8 and s [M] fp32 with x ~ q * s[:, None]:

        s = max|x[m, :]| / 127            IEEE float32 division
        q = clamp(rint(x / s), -127, 127) IEEE float32 division, ties to even

    A row of zeros, or one so small that s underflows to zero, has s = 0 and q = 0. A row that holds a NaN or an
    infinity has s = NaN and q = 0, so that its whole output row is NaN. Subnormal numbers are kept: flushing them to
    zero would turn a subnormal row into a row of zeros.
    """
    xf = x.float()
    amax = xf.abs().amax(dim=-1) if x.shape[-1] else xf.new_zeros(x.shape[:-1])
    # a tensor as divisor: on CUDA torch multiplies by the reciprocal of a Python number, which rounds differently
    s = torch.where(amax.isfinite(), amax / torch.full_like(amax, 127.0), torch.nan)
    usable = (s > 0)[:, None]
    q = torch.where(usable, xf / torch.where(usable, s[:, None], 1.0), 0.0)
    return q.round().clamp(-127, 127).to(torch.int8), s


def accumulate(xq: torch.Tensor, wq: torch.Tensor) -> torch.Tensor:
    """The exact accumulators: xq [M, K] int8, wq [N, K] int8 -> [M, N] int32. Raises ShapeError for K > 131071."""
    GemmShape(max(xq.shape[0], 1), wq.shape[0], xq.shape[1])
    w = wq.double().t()
    out = torch.empty(xq.shape[0], wq.shape[0], dtype=torch.int32, device=xq.device)
    for rows, block in zip(out.split(_ROWS), xq.split(_ROWS), strict=True):
        rows.copy_(block.double() @ w)
    return out


def dequantize(
    acc: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """The epilogue: acc [M, N] int32, sx [M] and sw [N] fp32, bias [N] or None -> [M, N] out_dtype."""
    y = (acc.float() * sx[:, None]) * sw
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def scaled_mm(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`dequantize(accumulate(xq, wq), sx, sw, bias, out_dtype)`: [M, N]. Raises ShapeError for K > 131071."""
    return dequantize(accumulate(xq, wq), sx, sw, bias, out_dtype)


def scaled_mm_swiglu(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`silu(y[:, 0::2]) * y[:, 1::2]` of the fp32 product y: [M, N / 2] of out_dtype, rounded once.

    The rows of wq [N, K] alternate: gate (w1), up (w3). Raises ShapeError for an odd N or K > 131071.
    """
    if wq.shape[0] % 2:
        raise ShapeError(f"N = {wq.shape[0]}: expected an even number, one gate and one up row per output column")
    y = scaled_mm(xq, wq, sx, sw, bias, out_dtype=torch.float32)
    return (silu(y[:, 0::2]) * y[:, 1::2]).to(out_dtype)


def linear(x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer on x [..., K] with an int8 weight [N, K] -> [..., N] of x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    xq, sx = quantize(rows)
    return scaled_mm(xq, wq, sx, sw, bias, out_dtype=x.dtype).reshape(*x.shape[:-1], wq.shape[0])


def linear_swiglu(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear` with SwiGLU of its alternating columns: x [..., K], wq [2 F, K] -> [..., F] of x's dtype."""
    xq, sx = quantize(x.reshape(-1, x.shape[-1]))
    return scaled_mm_swiglu(xq, wq, sx, sw, bias, out_dtype=x.dtype).reshape(*x.shape[:-1], wq.shape[0] // 2)


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """mean(x * x) over the last axis of x [..., K] fp32 -> [...] fp32, every operation rounded, in one fixed order.

    The squares are padded with zeros to blocks of 2048 = 8 * 32 * 8. Blocks are added one to the next, in order. Then
    neighbours are added three times, which sums the eights; the halves of the eight 32s, three times; and neighbours,
    five times. These sizes are the ones of a GPU's thread, warp and eight warps, so a kernel can follow the order at no
    cost under any tile. The division by K is IEEE's.

    A term passes at most n = ceil(K / 2048) + 12 roundings: its square, the additions and the division. The relative
    error is at most n u / (1 - n u) with u = 2**-24 (Higham, 2002). That is 15 u for K = 4608; one chain has 4609 u.
    """
    k = x.shape[-1]
    v = torch.nn.functional.pad(x * x, (0, -k % 2048)).unflatten(-1, (-1, 8, 32, 8))
    total = v[..., 0, :, :, :]
    for block in range(1, v.shape[-4]):
        total = total + v[..., block, :, :, :]
    for _ in range(3):
        total = total[..., 0::2] + total[..., 1::2]
    total = total[..., 0]
    for half in (4, 2, 1):
        total = total[..., :half, :] + total[..., half:, :]
    total = total[..., 0, :]
    for _ in range(5):
        total = total[..., 0::2] + total[..., 1::2]
    total = total[..., 0]
    return torch.div(total, torch.full_like(total, k))


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """(x * rstd) * weight in fp32, with rstd = 1 / sqrt(mean_square(x) + eps), each operation rounded: [..., K] fp32.

    Squares that overflow float32 give rstd = 0 and a row of zeros, as in torch. A NaN or an infinity gives NaN.
    """
    x = x.float()
    square = mean_square(x) + torch.tensor(eps, dtype=torch.float32, device=x.device)
    # a float64 root rounded to float32 equals IEEE's float32 root; torch's own is wrong by a unit on some CPUs
    root = square.double().sqrt().float()
    y = x * (torch.ones_like(root) / root)[..., None]
    return y if weight is None else y * weight.float()


def _by_row(vector: torch.Tensor, m: int) -> torch.Tensor:
    """[B, K] -> [M, K] fp32, each row M / B times. Raises ShapeError if B does not divide M."""
    if m % max(vector.shape[0], 1):
        raise ShapeError(f"{vector.shape[0]} images in {m} rows: expected one row per image, and a divisor of M")
    return vector.float().repeat_interleave(m // max(vector.shape[0], 1), 0)


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None = None, modulation: torch.Tensor | None = None, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm and modulation, then `quantize`: x [M, K], weight [K], modulation [B, K] -> q [M, K] int8, s [M] fp32.

        y = ((x * rstd) * weight) * (1 + modulation[b])        b = m // (M // B), rstd as in `rms_norm`

    Each operation is fp32 and rounded by itself. y stays fp32; the eager model rounds it to bf16 three times.
    """
    y = rms_norm(x, eps, weight)
    return quantize(y if modulation is None else y * (1.0 + _by_row(modulation, x.shape[0])))


def residual_norm_quantize(
    residual: torch.Tensor,
    branch: torch.Tensor,
    branch_weight: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    modulation: torch.Tensor,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gated addition of a branch to the residual stream, and the next branch's quantized input.

        new = dtype(residual + gate[b] * ((branch * rstd) * branch_weight))      rstd of branch; one rounding to dtype
        q, s = rms_norm_quantize(new, weight, modulation)                        of the rounded new

    residual, branch [M, K]; branch_weight, weight [K]; gate, modulation [B, K] -> new [M, K] of residual's dtype, q, s.
    gate is the factor itself: where the model has tanh(value), pass the result of tanh, computed once per image.
    """
    scaled = _by_row(gate, residual.shape[0]) * rms_norm(branch, eps, branch_weight)
    new = (residual.float() + scaled).to(residual.dtype)
    return new, *rms_norm_quantize(new, weight, modulation, eps)


def silu(g: torch.Tensor) -> torch.Tensor:
    """g / (1 + exp(-g)) in fp32 by IEEE operations only, each rounded: the same bits on every device.

    `int8kit.kernels.activations` explains the steps and the result for g < -86.
    """
    h = g.float().clamp(min=-86.0)
    t = h.clamp(max=86.0)
    n = (t.double() * -1.4426950216293335).round().float()  # of the exact product, which float64 holds
    f = (t + n * 0.693145751953125) + n * 1.428605173714459e-06
    w = f * f
    e = w * (w * -0.002765987068414688 + 0.166666179895401) + 2.0
    a = e + f
    b = ((e - f).view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)
    d = a + b
    return h * (a * (torch.ones_like(d) / d))


def swiglu_quantize(gu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up in fp32, then `quantize`: gu [M, 2 F], column 2 j the gate and 2 j + 1 the up of feature j."""
    g, u = gu.float().unflatten(-1, (-1, 2)).unbind(-1)
    return quantize(silu(g) * u)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of each head of q and k, then the rotation by halves: qkv [M, 3 H D] -> q, k [M, H D] of qkv's dtype.

        x = (x * rstd) * weight                         over each head's D
        y[i] = x[i] * cos[i] - x[i + D/2] * sin[i]      i < D/2
        y[i + D/2] = x[i + D/2] * cos[i + D/2] + x[i] * sin[i + D/2]

    cos, sin [L, D], L a divisor of M: row m uses row m % L. Every operation is fp32 and rounded by itself; the result
    is rounded once, to the dtype. The eager model rounds to bf16 after the norm, the weight, both products and the sum.
    v is the last third of qkv, unchanged.
    """
    m, width = qkv.shape
    if m % max(cos.shape[0], 1) or width % (3 * heads):
        raise ShapeError(
            f"qkv {tuple(qkv.shape)}, {heads} heads, cos {tuple(cos.shape)}: expected [M, 3 H D] and [L, D], "
            "L a divisor of M"
        )
    c, s = (t.float().repeat(m // max(cos.shape[0], 1), 1)[:, None, :] for t in (cos, sin))
    out = []
    for third, weight in zip(qkv.chunk(3, -1), (q_weight, k_weight), strict=False):
        x = rms_norm(third.unflatten(-1, (heads, -1)), eps, weight)
        first, second = x.chunk(2, -1)
        y = x * c + torch.cat((-second, first), -1) * s
        out.append(y.flatten(1).to(qkv.dtype))
    return out[0], out[1]
