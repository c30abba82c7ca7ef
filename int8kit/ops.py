"""torch operators over the kernels: the only door from torch to `int8kit.kernels`.

    int8kit::quantize(x [M, K]) -> (q [M, K] int8, s [M] fp32)
    int8kit::scaled_mm(xq [M, K], wq [N, K], sx [M], sw [N], bias?, out_dtype, plan) -> [M, N]
    int8kit::linear(x [..., K], wq [N, K], sw [N], bias?, plan) -> [..., N]

`plan` is `Plan.to_ints()`: the weight's tile configurations, resolved when the model was loaded. On CUDA they run the
Triton kernels, on the CPU `int8kit.reference`; both give the same bits. Importing this module registers them, once.

A `torch.library.Library` rather than `custom_op`: the same schema and fake kernels at less cost a call.
"""

from __future__ import annotations

import torch

from int8kit import reference
from int8kit.spec import GemmShape, Plan

_LIBRARY = torch.library.Library("int8kit", "FRAGMENT")
_LIBRARY.define("quantize(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define(
    "scaled_mm(Tensor xq, Tensor wq, Tensor sx, Tensor sw, Tensor? bias, ScalarType out_dtype, int[] plan) -> Tensor"
)
_LIBRARY.define("linear(Tensor x, Tensor wq, Tensor sw, Tensor? bias, int[] plan) -> Tensor")


def _quantize_cuda(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from int8kit.kernels import quantize

    return quantize.quantize(x)


def _scaled_mm_cuda(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: list[int],
) -> torch.Tensor:
    from int8kit.kernels import gemm

    shape = GemmShape(max(xq.shape[0], 1), wq.shape[0], xq.shape[1])
    return gemm.scaled_mm(xq, wq, sx, sw, bias, config=Plan.from_ints(plan).choose(shape), out_dtype=out_dtype)


def _linear_cuda(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None, plan: list[int]
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    xq, sx = _quantize_cuda(rows if rows.stride(1) == 1 else rows.contiguous())
    return _scaled_mm_cuda(xq, wq, sx, sw, bias, x.dtype, plan).reshape(*x.shape[:-1], wq.shape[0])


def _scaled_mm_cpu(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: list[int],
) -> torch.Tensor:
    return reference.scaled_mm(xq, wq, sx, sw, bias, out_dtype=out_dtype)


def _linear_cpu(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None, plan: list[int]
) -> torch.Tensor:
    return reference.linear(x, wq, sw, bias)


_LIBRARY.impl("quantize", _quantize_cuda, "CUDA")
_LIBRARY.impl("quantize", reference.quantize, "CPU")
_LIBRARY.impl("scaled_mm", _scaled_mm_cuda, "CUDA")
_LIBRARY.impl("scaled_mm", _scaled_mm_cpu, "CPU")
_LIBRARY.impl("linear", _linear_cuda, "CUDA")
_LIBRARY.impl("linear", _linear_cpu, "CPU")


@torch.library.register_fake("int8kit::quantize", lib=_LIBRARY)
def _quantize_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.register_fake("int8kit::scaled_mm", lib=_LIBRARY)
def _scaled_mm_fake(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: list[int],
) -> torch.Tensor:
    return xq.new_empty((xq.shape[0], wq.shape[0]), dtype=out_dtype)


@torch.library.register_fake("int8kit::linear", lib=_LIBRARY)
def _linear_fake(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None, plan: list[int]
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], wq.shape[0]))


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of x [M, K] (bf16, fp16 or fp32) -> q [M, K] int8, s [M] fp32. See `reference.quantize`."""
    q, s = torch.ops.int8kit.quantize(x)
    return q, s


def scaled_mm(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    plan: Plan = Plan(),
) -> torch.Tensor:
    """The dequantized int8 product [M, N] of out_dtype. See `reference.scaled_mm`; ShapeError outside its domain."""
    out: torch.Tensor = torch.ops.int8kit.scaled_mm(xq, wq, sx, sw, bias, out_dtype, plan.to_ints())
    return out


def linear(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None = None, *, plan: Plan = Plan()
) -> torch.Tensor:
    """Quantize x [..., K] per row and multiply by the int8 weight [N, K] -> [..., N] of x's dtype."""
    out: torch.Tensor = torch.ops.int8kit.linear(x, wq, sw, bias, plan.to_ints())
    return out
