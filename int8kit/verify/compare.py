"""The operands of a GEMM example, and the bitwise comparison of two results."""

from __future__ import annotations

import torch

from int8kit.verify.examples.guarded_buffers import huge_stride_matrix, in_poison, tile_guard
from int8kit.verify.examples.strategies import Draw, int8_matrix, scales

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""x [M, K] int8, w [N, K] int8, sx [M] fp32, sw [N] fp32, and the bias [N] or None."""


def bitwise_diff(got: torch.Tensor, want: torch.Tensor) -> str | None:
    """None if two tensors are bit-equal, where any NaN equals any NaN; else the number of differences and the first."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[want.element_size()]
    wrong = got.view(bits) != want.view(bits)
    if want.is_floating_point():
        wrong &= ~(got.isnan() & want.isnan())
    count = int(wrong.sum())
    if not count:
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    place = ", ".join(map(str, first))
    return f"{count} of {want.numel()} differ, first [{place}]: got {got[first].item()!r}, want {want[first].item()!r}"


def operands(d: Draw, device: str) -> Operands:
    """The operands of the example `d`, in buffers of poison."""
    m, n, k = d.shape.m, d.shape.n, d.shape.k
    x = in_poison(int8_matrix(m, k, d.kind, d.seed, device), d.padding, tile_guard(k))
    if d.scales == "nan":
        x[::3] = 0  # as `quantize` leaves a row with a NaN: 0 * NaN is NaN, not the bias
    w = in_poison(int8_matrix(n, k, d.kind, d.seed + 100, device), 2 * d.padding, tile_guard(k))
    if d.huge_stride == "x":
        x = huge_stride_matrix(m, k, x.dtype, device).copy_(x)
    elif d.huge_stride == "w":
        w = huge_stride_matrix(n, k, w.dtype, device).copy_(w)
    g = torch.Generator(device).manual_seed(d.seed)
    bias = None if d.bias is None else torch.randn(n, generator=g, device=device).to(d.bias)
    return x, w, scales(m, d.scales, d.seed, device), scales(n, d.scales, d.seed + 7, device), bias
