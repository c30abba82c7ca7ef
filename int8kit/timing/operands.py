"""Tensors of one GEMM shape for timing, used by the tuner and by the benchmark, and their exact results.

    x [M, K] bf16 --quantize--> xq int8, sx [M] fp32          w [N, K] bf16 --quantize--> wq int8, sw [N] fp32
    bias [N] bf16

The data are normal, never zeros or uniform bytes. The GPU's power depends on the data, and its clock depends on the
power: zeros raise the clock and give times that are too good.

In a model, every layer finds its weight in DRAM. So a small weight exists in several copies, and consecutive launches
use different ones: before a copy is used again, twice the GPU's L2 has been read (`weight_copies`).
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch

from int8kit import ops, reference
from int8kit.gpus import Gpu
from int8kit.spec import GemmShape

Result = Literal["output", "no bias", "sums"]
"""Result of a contestant: bf16 with scales and bias, bf16 with scales only, or the int32 accumulators."""

COPIES_MAX = 512  # reached by weights under 400 KB at the largest L2 (96 MiB): no INT8 linear is so small


def copies_past_l2(operand_bytes: int, l2_bytes: int) -> int:
    """Number of copies of an operand such that no launch finds its copy in L2: 1 to COPIES_MAX.

    An operand of twice the L2 or more evicts itself, so one copy is enough.
    """
    if operand_bytes >= 2 * l2_bytes:
        return 1
    return min(1 + -(-2 * l2_bytes // operand_bytes), COPIES_MAX)


def weight_copies(shape: GemmShape, l2_bytes: int) -> int:
    """`copies_past_l2` of the int8 weight [N, K]."""
    return copies_past_l2(shape.n * shape.k, l2_bytes)


class TimingOperands:
    """The tensors of one shape on one device. Raises torch.OutOfMemoryError if they do not fit."""

    def __init__(
        self, shape: GemmShape, gpu: Gpu, *, device: str = "cuda", copies: int | None = None, seed: int = 0
    ) -> None:
        """copies: of each weight; default: `weight_copies` of the shape."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, device=device, dtype=torch.bfloat16, generator=generator)

        self.shape, self.gpu, self.device = shape, gpu, device
        self.copies = copies or weight_copies(shape, gpu.l2_bytes)
        self.x, self.w, self.bias = normal(shape.m, shape.k), normal(shape.n, shape.k), normal(shape.n)
        self.xq, self.sx = ops.quantize(self.x)
        wq, self.sw = ops.quantize(self.w)
        self.weights = self.copied(wq)
        self._truths: dict[Result, torch.Tensor] = {}

    @cached_property
    def weights16(self) -> list[torch.Tensor]:
        """Copies of the bf16 weight [N, K], made at the first use."""
        return self.copied(self.w)

    def copied(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """`weight` and clones of it with the same strides, `copies` in all."""
        return [weight, *(weight.clone() for _ in range(self.copies - 1))]

    def output(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """New [M, N] tensor full of poison: an element that a launch does not write differs from the truth."""
        return poison(torch.empty(self.shape.m, self.shape.n, device=self.device, dtype=dtype))

    def truth(self, result: Result) -> torch.Tensor:
        """Result of the reference for these operands: [M, N], int32 for "sums", else bf16."""
        if result not in self._truths:
            if result == "sums":
                self._truths[result] = reference.accumulate(self.xq, self.weights[0])
            else:
                self._truths[result] = self.dequantized(self.truth("sums"), bias=result == "output")
        return self._truths[result]

    def dequantized(self, sums: torch.Tensor, *, bias: bool = True) -> torch.Tensor:
        """The reference's bf16 output [M, N] for int32 accumulators [M, N]."""
        return reference.dequantize(sums, self.sx, self.sw, self.bias if bias else None, torch.bfloat16)

    def gated(self, sums: torch.Tensor) -> torch.Tensor:
        """The reference's bf16 output [M, N / 2] with SwiGLU for int32 accumulators [M, N]."""
        wide = reference.dequantize(sums, self.sx, self.sw, self.bias, torch.float32)
        return (reference.silu(wide[:, 0::2]) * wide[:, 1::2]).to(torch.bfloat16)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill `tensor` with a value that no result has: NaN, or the least integer."""
    with torch.inference_mode():  # a contestant may return an inference tensor, which cannot be written otherwise
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def poisoned(tensor: torch.Tensor) -> bool:
    """True if an element of `tensor` is still poison."""
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    return bool((tensor == torch.iinfo(tensor.dtype).min).any())


def differing(got: torch.Tensor, want: torch.Tensor) -> int:
    """Number of elements that differ in a bit; two NaNs are equal. Raises ValueError if shape or dtype differ."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(f"returned {got.dtype} {tuple(got.shape)}: expected {want.dtype} {tuple(want.shape)}")
    if not got.is_floating_point():
        return int((got != want).sum())
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return int(((got.contiguous().view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())).sum())
