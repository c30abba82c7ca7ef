"""torch operators over the kernels: the only door from torch to `int8kit.kernels`.

    int8kit::quantize(x [M, K]) -> (q [M, K] int8, s [M] fp32)
    int8kit::scaled_mm(xq [M, K], wq [N, K], sx [M], sw [N], bias?, out_dtype, plan) -> [M, N]
    int8kit::scaled_mm_swiglu(the same) -> [M, N / 2]        wq's rows a gate and an up in turn
    int8kit::linear(x [..., K], wq [N, K], sw [N], bias?, plan) -> [..., N]
    int8kit::linear_swiglu(the same) -> [..., N / 2]

`plan` is `Plan.text`: what may serve the weight, gathered when the model was loaded. On CUDA they run the
Triton kernels, on the CPU `int8kit.reference`; both give the same bits. Importing this module registers them, once.

A `torch.library.Library` rather than `custom_op`: the same schema and fake kernels at less cost a call.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from int8kit import reference
from int8kit.lookup import Plan
from int8kit.spec import GemmShape, Operation, TileConfig

_LIBRARY = torch.library.Library("int8kit", "FRAGMENT")
_LIBRARY.define("quantize(Tensor x) -> (Tensor, Tensor)")
for _ending in ("", "_swiglu"):
    _LIBRARY.define(
        f"scaled_mm{_ending}(Tensor xq, Tensor wq, Tensor sx, Tensor sw, Tensor? bias, ScalarType out_dtype, "
        "str plan) -> Tensor"
    )
    _LIBRARY.define(f"linear{_ending}(Tensor x, Tensor wq, Tensor sw, Tensor? bias, str plan) -> Tensor")


def _quantize_cuda(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from int8kit.kernels import quantize

    return quantize.quantize(x)


@lru_cache(maxsize=4096)
def _choose(plan: str, operation: Operation, m: int, n: int, k: int) -> TileConfig:
    return Plan.from_text(plan).choose(GemmShape(m, n, k), operation)


def _product_cuda(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: str,
    *,
    swiglu: bool = False,
) -> torch.Tensor:
    from int8kit.kernels import gemm

    product = gemm.scaled_mm_swiglu if swiglu else gemm.scaled_mm
    operation = Operation.SWIGLU if swiglu else Operation.GEMM
    config = _choose(plan, operation, max(xq.shape[0], 1), wq.shape[0], xq.shape[1])
    return product(xq, wq, sx, sw, bias, config=config, out_dtype=out_dtype)


def _linear_cuda(
    x: torch.Tensor,
    wq: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    plan: str,
    *,
    swiglu: bool = False,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    xq, sx = _quantize_cuda(rows if rows.stride(1) == 1 else rows.contiguous())
    return _product_cuda(xq, wq, sx, sw, bias, x.dtype, plan, swiglu=swiglu).reshape(*x.shape[:-1], -1)


def _product_cpu(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: str,
    *,
    swiglu: bool = False,
) -> torch.Tensor:
    product = reference.scaled_mm_swiglu if swiglu else reference.scaled_mm
    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)


def _linear_cpu(
    x: torch.Tensor,
    wq: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    plan: str,
    *,
    swiglu: bool = False,
) -> torch.Tensor:
    return (reference.linear_swiglu if swiglu else reference.linear)(x, wq, sw, bias)


def _product_fake(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: str,
    *,
    swiglu: bool = False,
) -> torch.Tensor:
    return xq.new_empty((xq.shape[0], wq.shape[0] // (1 + swiglu)), dtype=out_dtype)


def _linear_fake(
    x: torch.Tensor,
    wq: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    plan: str,
    *,
    swiglu: bool = False,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], wq.shape[0] // (1 + swiglu)))


@torch.library.register_fake("int8kit::quantize", lib=_LIBRARY)
def _quantize_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


_LIBRARY.impl("quantize", _quantize_cuda, "CUDA")
_LIBRARY.impl("quantize", reference.quantize, "CPU")
for _name, _swiglu, _cuda, _cpu, _fake in (
    ("scaled_mm", False, _product_cuda, _product_cpu, _product_fake),
    ("scaled_mm_swiglu", True, _product_cuda, _product_cpu, _product_fake),
    ("linear", False, _linear_cuda, _linear_cpu, _linear_fake),
    ("linear_swiglu", True, _linear_cuda, _linear_cpu, _linear_fake),
):
    _LIBRARY.impl(_name, partial(_cuda, swiglu=_swiglu), "CUDA")
    _LIBRARY.impl(_name, partial(_cpu, swiglu=_swiglu), "CPU")
    torch.library.register_fake(f"int8kit::{_name}", partial(_fake, swiglu=_swiglu), lib=_LIBRARY)


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
    out: torch.Tensor = torch.ops.int8kit.scaled_mm(xq, wq, sx, sw, bias, out_dtype, plan.text)
    return out


def scaled_mm_swiglu(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    plan: Plan = Plan(),
) -> torch.Tensor:
    """silu(gate) * up of the product [M, N / 2]. See `reference.scaled_mm_swiglu`; ShapeError outside its domain."""
    out: torch.Tensor = torch.ops.int8kit.scaled_mm_swiglu(xq, wq, sx, sw, bias, out_dtype, plan.text)
    return out


def int8_linear(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None = None, *, plan: Plan = Plan()
) -> torch.Tensor:
    """Quantize x [..., K] per row and multiply by the int8 weight [N, K] -> [..., N] of x's dtype.

    wq [N, K] int8 and sw [N] fp32 are `quantize(weight)`; bias [N] bf16, fp16 or fp32. ShapeError if K > 131071 or the
    tensors do not fit together.
    """
    out: torch.Tensor = torch.ops.int8kit.linear(x, wq, sw, bias, plan.text)
    return out


def int8_linear_swiglu(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None = None, *, plan: Plan = Plan()
) -> torch.Tensor:
    """`int8_linear` with silu(gate) * up of its columns in turn: x [..., K], wq [2 F, K] -> [..., F] of x's dtype."""
    out: torch.Tensor = torch.ops.int8kit.linear_swiglu(x, wq, sw, bias, plan.text)
    return out
