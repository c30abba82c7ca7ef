"""One shape's tensors, the same bytes for every contestant, and the truth that their results are held against.

    x [M, K] bf16 --quantize--> xq int8, sx [M] fp32          w [N, K] bf16 --quantize--> wq int8, sw [N] fp32
    bias [N] bf16

Data are normal, never zeros or uniform bytes: power, and with it the clock, depends on them. In a model every layer's
weight is cold, so each weight exists in as many copies as pass twice the card's L2, and a contestant goes through them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch

from int8kit import ops, reference
from int8kit.gpus import Gpu
from int8kit.spec import GemmShape

Result = Literal["output", "no bias", "sums"]
"""What a contestant returns: bf16 with scales and bias, bf16 with scales only, or the int32 sums."""

MOST_COPIES = 512  # weights under 200 KiB are not worth an int8 linear; thousands of copies only cost time


class Operands:
    """The tensors of one shape on one device; raises torch.OutOfMemoryError if they do not fit."""

    def __init__(
        self, shape: GemmShape, card: Gpu, *, device: str = "cuda", copies: int | None = None, seed: int = 0
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, device=device, dtype=torch.bfloat16, generator=generator)

        self.shape, self.card, self.device = shape, card, device
        self.copies = copies or min(1 - -2 * card.l2_bytes // (shape.n * shape.k), MOST_COPIES)
        self.x, self.w, self.bias = normal(shape.m, shape.k), normal(shape.n, shape.k), normal(shape.n)
        self.xq, self.sx = ops.quantize(self.x)
        wq, self.sw = ops.quantize(self.w)
        self.weights = self.copied(wq)
        self._truths: dict[Result, torch.Tensor] = {}

    @cached_property
    def weights16(self) -> list[torch.Tensor]:
        """The copies of the bf16 weight [N, K]."""
        return self.copied(self.w)

    def copied(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """`weight` and clones of it, strides kept, `copies` in all."""
        return [weight, *(weight.clone() for _ in range(self.copies - 1))]

    def output(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """A new [M, N] full of poison: what a launch fails to write does not equal the truth."""
        return poison(torch.empty(self.shape.m, self.shape.n, device=self.device, dtype=dtype))

    def truth(self, result: Result) -> torch.Tensor:
        """What the reference gives for these operands: [M, N], int32 for "sums", else bf16."""
        if result not in self._truths:
            if result == "sums":
                self._truths[result] = reference.accumulate(self.xq, self.weights[0])
            else:
                bias = self.bias if result == "output" else None
                self._truths[result] = reference.dequantize(self.truth("sums"), self.sx, self.sw, bias, torch.bfloat16)
        return self._truths[result]


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with a value that no result has: NaN, or the least integer."""
    with torch.inference_mode():  # a contestant may return an inference tensor, which nothing else may write
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def poisoned(tensor: torch.Tensor) -> bool:
    """True if an element of `tensor` is still poison."""
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    return bool((tensor == torch.iinfo(tensor.dtype).min).any())


def differing(got: torch.Tensor, want: torch.Tensor) -> int:
    """How many elements differ in a bit; two NaNs are equal. Raises ValueError if shape or dtype differ."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(f"returned {got.dtype} {tuple(got.shape)}; {want.dtype} {tuple(want.shape)} is the result")
    if not got.is_floating_point():
        return int((got != want).sum())
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return int(((got.contiguous().view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())).sum())
