"""Bounds of the error of a quantized linear against x w^T in float64, from the roundings of its operands.

With |x' - x| <= dx and |w' - w| <= dw, |x' w'^T - x w^T| <= |x| dw^T + dx |w|^T + dx dw^T. Products are summed in
float32, and the result is rounded once to bf16.
"""

import torch

BF16 = 2.0**-8  # half a unit in the last place relative to the number, doubled: room for the roundings of float32
NF4_GAP = 0.1520  # half of the widest gap between two codes of NF4, from -1 to -0.6962


def int8_step(a):
    """Half a step of each row: [M, K] -> [M, K]."""
    return (a.abs().amax(-1, keepdim=True) / 254 * (1 + 2.0**-20)).expand_as(a)


def e4m3_step(a):
    """Half a unit of e4m3: 2**-4 of the number, or half of the smallest subnormal times the scale."""
    scale = a.abs().amax(-1, keepdim=True) / 448
    return torch.maximum(a.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)


def nf4_step(a, block=64):
    """Half of the widest gap of NF4 times the largest number of each block, which may cross rows."""
    flat = a.reshape(-1)
    whole = torch.nn.functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    return (NF4_GAP * whole.abs().amax(-1, keepdim=True)).expand_as(whole).reshape(-1)[: len(flat)].reshape(a.shape)


def then_bf16(a, step):
    """The error after a second rounding, to bf16."""
    return step + BF16 * (a.abs() + step)


def none(a):
    """No rounding."""
    return torch.zeros_like(a)


STEPS = {  # of x, of w
    "int8": (int8_step, int8_step),
    "unfused": (int8_step, int8_step),
    "fp8": (lambda x: then_bf16(x, none(x)), lambda w: then_bf16(w, e4m3_step(w))),
    "fp8-native": (e4m3_step, e4m3_step),
    "nf4": (lambda x: then_bf16(x, none(x)), lambda w: then_bf16(w, nf4_step(w) + BF16 * w.abs())),
    "fake-quant": (lambda x: then_bf16(x, int8_step(x)), lambda w: then_bf16(w, int8_step(w))),
}


def exact_and_bound(x, w, kind, accumulated=2.0**-24):
    """x w^T [M, N] in float64, and the bound of its error. accumulated: relative rounding of each of K additions."""
    x, w = x.double(), w.double()
    dx, dw = (step(a) for step, a in zip(STEPS[kind], (x, w), strict=True))
    exact, size = x @ w.t(), (x.abs() + dx) @ (w.abs() + dw).t()
    error = x.abs() @ dw.t() + dx @ w.abs().t() + dx @ dw.t() + x.shape[1] * accumulated * size
    return exact, error + BF16 * (exact.abs() + error)
