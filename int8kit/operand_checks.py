"""Checks of the operators' tensors on every device, before a kernel or the reference runs.

`int8kit.kernels` checks the same operands in the same order and words. Its launchers need Triton, so a machine without
a GPU takes the checks from here. The fake kernels call them too: `torch.compile` and export then refuse what a call
refuses. An extent that is still a symbol there is refused only if it cannot be right, so that no check narrows it.

Each function raises ShapeError, and returns nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch

from int8kit.errors import ShapeError
from int8kit.spec import GemmShape

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
K_MAX_HELD = 16384
"""The longest row of a row kernel other than `quantize`, as in `kernels.row_primitives`."""
HEAD_DIMS = (16, 32, 64, 128, 256)
"""The widths of a head, as in `kernels.qk_norm_rope`."""
_SCALED_MM = ("xq", "wq", "sx", "sw", "bias")
_LINEAR = ("x", "wq", "sw", "bias")


def one_device(names: Iterable[str], operands: tuple[Any, ...]) -> None:
    """The tensors among the operands, on one device. names: of all operands, in order."""
    if len({t.device for t in operands if isinstance(t, torch.Tensor)}) > 1:
        pairs = zip(names, operands, strict=False)
        found = ", ".join(f"{name} on {t.device}" for name, t in pairs if isinstance(t, torch.Tensor))
        raise ShapeError(f"{found}: expected one device; move the tensors to it")


def quantize(x: torch.Tensor) -> None:
    """The operand of `quantize`."""
    _matrix("x", x)


def axes_of_scaled_mm(
    xq: torch.Tensor, wq: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Device and axes of a product, without which its configuration cannot be chosen."""
    one_device(_SCALED_MM, (xq, wq, sx, sw, bias))
    if xq.dim() != 2 or wq.dim() != 2 or _is_sure(xq.shape[1] != wq.shape[1]):
        raise ShapeError(f"x {tuple(xq.shape)} and w {tuple(wq.shape)}: expected [M, K] and [N, K] with the same K")


def axes_of_linear(x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Device and axes of a linear, without which x has no rows to quantize."""
    one_device(_LINEAR, (x, wq, sw, bias))
    if x.dim() < 1 or wq.dim() != 2 or _is_sure(x.shape[-1] != wq.shape[1]):
        raise ShapeError(f"x {tuple(x.shape)} and w {tuple(wq.shape)}: expected [..., K] and [N, K] with the same K")
    if _is_sure(wq.shape[1] == 0):
        raise ShapeError(f"K = 0 of w {tuple(wq.shape)}: expected at least 1")


def scaled_mm(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: str,
    *,
    swiglu: bool = False,
) -> None:
    """The operands of `scaled_mm` and `scaled_mm_swiglu`."""
    axes_of_scaled_mm(xq, wq, sx, sw, bias)
    m, columns = xq.shape[0], _product(xq.shape[0], xq.dtype, wq, sx, sw, bias, swiglu=swiglu)
    if out_dtype not in FLOATS:
        raise ShapeError(
            f"out {out_dtype} {(m, columns)}: expected [{m}, {columns}] of bf16, fp16 or fp32, or of int32 for "
            "accumulators"
        )
    _rows_of_bytes("x", xq)
    _rows_of_bytes("w", wq)


def linear(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None, plan: str, *, swiglu: bool = False
) -> None:
    """The operands of `linear` and `linear_swiglu`."""
    axes_of_linear(x, wq, sw, bias)
    m = prod(x.shape[:-1])
    if x.dtype not in FLOATS:
        raise ShapeError(_not_floats("x", x.dtype, (m, x.shape[-1]), "[M, K]"))
    _product(m, torch.int8, wq, None, sw, bias, swiglu=swiglu)
    _rows_of_bytes("w", wq)


def int8_weight(weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    """The tensors of a layer."""
    named = {"weight": weight, "weight_scale": weight_scale, "bias": bias}
    for name, operand in named.items():
        if not isinstance(operand, torch.Tensor) and (name != "bias" or operand is not None):
            raise ShapeError(f"{name} is of type {type(operand).__name__}: expected a torch.Tensor")
    one_device(named, tuple(named.values()))
    if weight.dim() != 2 or weight.dtype is not torch.int8:
        raise ShapeError(f"weight {weight.dtype} {tuple(weight.shape)}: expected torch.int8 [N, K]; quantize it first")
    _product(1, torch.int8, weight, None, weight_scale, bias, swiglu=False, scales="weight_scale")
    _rows_of_bytes("weight", weight)


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None = None, modulation: torch.Tensor | None = None, eps: float = 1e-5
) -> None:
    """The operands of `rms_norm_quantize`."""
    one_device(("x", "weight", "modulation"), (x, weight, modulation))
    _matrix("x", x)
    m, k = x.shape
    _held(k)
    if weight is not None:
        _vector("weight", weight, k)
    if modulation is not None:
        _images("modulation", modulation, m, k)


def residual_norm_quantize(
    residual: torch.Tensor,
    branch: torch.Tensor,
    branch_weight: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    modulation: torch.Tensor,
    eps: float = 1e-5,
) -> None:
    """The operands of `residual_norm_quantize`."""
    names = "residual", "branch", "branch_weight", "gate", "weight", "modulation"
    one_device(names, (residual, branch, branch_weight, gate, weight, modulation))
    _matrix("residual", residual)
    m, k = residual.shape
    _matrix("branch", branch, (m, k))
    _held(k)
    _vector("branch_weight", branch_weight, k)
    _vector("weight", weight, k)
    _images("gate", gate, m, k)
    _matrix("modulation", modulation, (gate.shape[0], k))


def swiglu_quantize(gu: torch.Tensor) -> None:
    """The operand of `swiglu_quantize`."""
    _matrix("gu", gu)
    if _is_sure(gu.shape[1] % 2 != 0):
        raise ShapeError(f"gu {tuple(gu.shape)}: expected [M, 2 F], gate and up side by side; interleave the weights")
    _held(gu.shape[1] // 2)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float = 1e-5,
) -> None:
    """The operands of `qk_norm_rope`."""
    one_device(("qkv", "q_weight", "k_weight", "cos", "sin"), (qkv, q_weight, k_weight, cos, sin))
    _matrix("qkv", qkv)
    m, width = qkv.shape
    d = width // (3 * heads) if heads > 0 else 0
    if _is_sure(3 * heads * d != width) or all(_is_sure(d != one) for one in HEAD_DIMS):
        raise ShapeError(f"qkv {tuple(qkv.shape)}, {heads} heads: expected [M, 3 H D] with D one of {HEAD_DIMS}")
    _vector("q_weight", q_weight, d)
    _vector("k_weight", k_weight, d)
    for name, table in (("cos", cos), ("sin", sin)):
        _matrix(name, table)
        period = table.shape[0]
        if _differ(table.shape, (period, d)) or _does_not_divide(period, m) or _differ(table.shape, cos.shape):
            raise ShapeError(
                f"{name} {tuple(table.shape)}: expected [L, {d}] with L a divisor of M = {m}, the same for cos and sin"
            )


def _is_sure(condition: Any) -> bool:
    """Whether a condition holds for every value of the symbols in it. It adds no guard on them."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _differ(shape: Any, expected: Any) -> bool:
    return len(shape) != len(expected) or any(_is_sure(a != b) for a, b in zip(shape, expected, strict=True))


def _does_not_divide(count: Any, m: Any) -> bool:
    return _is_sure(count < 1) or _is_sure(m % count != 0)


def _product(
    m: Any,
    x_dtype: torch.dtype,
    wq: torch.Tensor,
    sx: torch.Tensor | None,
    sw: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    swiglu: bool,
    scales: str = "sw",
) -> Any:
    """Dtypes, extents, scales and bias of a product with m rows -> its columns. scales: the name of sw in errors."""
    if x_dtype is not torch.int8 or wq.dtype is not torch.int8:
        raise ShapeError(f"x {x_dtype} and w {wq.dtype}: expected torch.int8 for both; quantize first")
    n, k = wq.shape
    extents = [e if isinstance(e, int) else 1 for e in (m, n, k)]  # a symbol has no value to compare
    GemmShape(max(extents[0], 1), extents[1], extents[2])
    for name, vector, length in (("sx", sx, m), (scales, sw, n), ("bias", bias, n)):
        if vector is None:
            continue
        if _differ(vector.shape, (length,)) or _is_apart(vector):
            raise ShapeError(f"{name} {tuple(vector.shape)}: expected a contiguous [{length}]")
        expected = FLOATS if name == "bias" else (torch.float32,)
        if vector.dtype not in expected:
            raise ShapeError(f"{name} {vector.dtype}: expected {' or '.join(map(str, expected))}")
    if not swiglu:
        return n
    if _is_sure(n % 2 != 0):
        raise ShapeError(f"N = {n}: expected an even number, one gate and one up column per output column")
    return n // 2


def _is_apart(x: torch.Tensor) -> bool:
    """Whether the elements of a row, or of a vector, do not follow each other in memory."""
    return _is_sure(x.stride(-1) != 1) and _is_sure(x.shape[-1] > 1)


def _rows_of_bytes(name: str, matrix: torch.Tensor) -> None:
    if _is_apart(matrix):
        raise ShapeError(f"{name} has strides {matrix.stride()}: expected 1 as the last; call .contiguous() first")


def _matrix(name: str, x: torch.Tensor, shape: tuple[Any, Any] | None = None) -> None:
    """[M, K], of `shape` if given, of bf16, fp16 or fp32, contiguous along K."""
    if x.dim() != 2 or x.dtype not in FLOATS or (shape is not None and _differ(x.shape, shape)):
        expected = "[M, K]" if shape is None else str(list(shape))
        raise ShapeError(_not_floats(name, x.dtype, tuple(x.shape), expected))
    if _is_apart(x):
        raise ShapeError(f"{name} has strides {x.stride()}: the last must be 1; call .contiguous() first")


def _not_floats(name: str, dtype: torch.dtype, shape: tuple[Any, ...], expected: str) -> str:
    return f"{name} {dtype} {shape}: expected {expected} of bf16, fp16 or fp32; reshape or cast first"


def _vector(name: str, v: torch.Tensor, length: Any) -> None:
    """A contiguous [length] of bf16, fp16 or fp32."""
    if _differ(v.shape, (length,)) or v.dtype not in FLOATS or _is_apart(v):
        raise ShapeError(f"{name} {v.dtype} {tuple(v.shape)}: expected a contiguous [{length}] of bf16, fp16 or fp32")


def _images(name: str, v: torch.Tensor, m: Any, k: Any) -> None:
    """[B, k], with B a divisor of m."""
    _matrix(name, v)
    if _is_sure(v.shape[1] != k) or _does_not_divide(v.shape[0], m):
        raise ShapeError(f"{name} {tuple(v.shape)}: expected [B, {k}], one row per image, with B a divisor of M = {m}")


def _held(k: Any) -> None:
    """A row that registers hold."""
    if _is_sure(k < 1) or _is_sure(k > K_MAX_HELD):
        raise ShapeError(f"K = {k}: expected 1 to {K_MAX_HELD}, which registers hold; use torch, then `quantize`")
