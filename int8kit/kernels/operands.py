"""Checked tensors of one GEMM, for the kernel that the configuration names.

Results:

    out[m, n] = out_dtype((fp32(sum_k x[m, k] * w[n, k]) * sx[m]) * sw[n] + fp32(bias[n]))      [M, N]
    out[m, j] = out_dtype(silu(y[m, 2j]) * y[m, 2j + 1])    swiglu: y as above, not rounded     [M, N / 2]
    out[m, n] = sum_k x[m, k] * w[n, k]                     int32: without sx, sw and bias      [M, N]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from int8kit.errors import ShapeError
from int8kit.kernels.launch import aligned_dtypes
from int8kit.spec import GemmShape

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BIAS_DTYPES = OUT_DTYPES


@dataclass(frozen=True)
class Operands:
    """The tensors of one GEMM.

    Raises ShapeError for tensors that are outside every kernel's domain or do not fit together.
    """

    xq: torch.Tensor  # [M, K] int8, contiguous along K, any stride between rows
    wq: torch.Tensor  # [N, K] int8, likewise
    sx: torch.Tensor | None  # [M] fp32
    sw: torch.Tensor | None  # [N] fp32
    bias: torch.Tensor | None  # [N] bf16, fp16 or fp32
    out: torch.Tensor  # contiguous along its columns, any stride between rows
    swiglu: bool = False

    def __post_init__(self) -> None:
        if self.xq.dim() != 2 or self.wq.dim() != 2 or self.xq.shape[1] != self.wq.shape[1]:
            raise ShapeError(
                f"x {tuple(self.xq.shape)} and w {tuple(self.wq.shape)}: expected [M, K] and [N, K] with the same K"
            )
        if self.xq.dtype is not torch.int8 or self.wq.dtype is not torch.int8:
            raise ShapeError(f"x {self.xq.dtype} and w {self.wq.dtype}: expected torch.int8 for both; quantize first")
        m, n, k = self.m, self.n, self.k
        GemmShape(max(m, 1), n, k)
        for name, vector, length in (("sx", self.sx, m), ("sw", self.sw, n), ("bias", self.bias, n)):
            if vector is None:
                continue
            if vector.shape != (length,) or not vector.is_contiguous():
                raise ShapeError(f"{name} {tuple(vector.shape)}: expected a contiguous [{length}]")
            expected = BIAS_DTYPES if name == "bias" else (torch.float32,)
            if vector.dtype not in expected:
                raise ShapeError(f"{name} {vector.dtype}: expected {' or '.join(map(str, expected))}")
        if self.swiglu and n % 2:
            raise ShapeError(f"N = {n}: expected an even number, one gate and one up column per output column")
        columns = n // 2 if self.swiglu else n
        if self.out.shape != (m, columns) or self.out.dtype not in ((torch.int32,) if self.int32_out else OUT_DTYPES):
            raise ShapeError(
                f"out {self.out.dtype} {tuple(self.out.shape)}: expected [{m}, {columns}] of bf16, fp16 or fp32, "
                "or of int32 for accumulators"
            )
        for name, matrix in (("x", self.xq), ("w", self.wq), ("out", self.out)):
            if matrix.stride(1) != 1 and matrix.shape[1] > 1:
                raise ShapeError(
                    f"{name} has strides {matrix.stride()}: expected 1 as the last; call .contiguous() first"
                )
        if len({t.device for t in (self.xq, self.wq, self.sx, self.sw, self.bias, self.out) if t is not None}) > 1:
            raise ShapeError("the tensors are on several devices: expected one device; move them to it")

    @property
    def m(self) -> int:
        """Rows of x and of out."""
        return self.xq.shape[0]

    @property
    def n(self) -> int:
        """Rows of w: columns of the product."""
        return self.wq.shape[0]

    @property
    def k(self) -> int:
        """Columns of x and of w."""
        return self.xq.shape[1]

    @property
    def int32_out(self) -> bool:
        """True if out is the int32 accumulators."""
        return self.sx is None

    @cached_property
    def key(self) -> tuple[Any, ...] | None:
        """Key of the properties on which Triton specializes a kernel, without M.

        None if an address or an extent is not a multiple of 16.
        """
        matrices = self.xq, self.wq, self.out
        integers = self.n, self.k, *(matrix.stride(0) for matrix in matrices)
        dtypes = aligned_dtypes((*matrices, *self.vectors), integers)
        return dtypes and (*dtypes, self.bias is not None, self.int32_out, self.swiglu)

    @cached_property
    def vectors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """sx, sw and bias for a launch. Any tensor stands in for an absent one, which the kernel does not read."""
        return tuple(self.xq if v is None else v for v in (self.sx, self.sw, self.bias))  # type: ignore[return-value]
