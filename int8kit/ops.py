"""torch operators over the kernels: the entry point from torch to `int8kit.kernels`.

    int8kit::quantize(x [M, K]) -> (q [M, K] int8, s [M] fp32)
    int8kit::scaled_mm(xq [M, K], wq [N, K], sx [M], sw [N], bias [N]?, out_dtype, plan) -> [M, N]
    int8kit::scaled_mm_swiglu(the same) -> [M, N / 2]        rows of wq alternate: gate, up, gate, up
    int8kit::linear(x [..., K], wq [N, K], sw [N], bias [N]?, plan) -> [..., N]
    int8kit::linear_swiglu(the same) -> [..., N / 2]
    int8kit::rms_norm_quantize(x [M, K], weight [K]?, modulation [B, K]?, eps) -> (q [M, K] int8, s [M] fp32)
    int8kit::residual_norm_quantize(residual [M, K], branch [M, K], branch_weight [K], gate [B, K], weight [K],
                                    modulation [B, K], eps) -> (new [M, K], q [M, K] int8, s [M] fp32)
    int8kit::swiglu_quantize(gu [M, 2 F]) -> (q [M, F] int8, s [M] fp32)
    int8kit::qk_norm_rope(qkv [M, 3 H D], q_weight [D], k_weight [D], cos [L, D], sin [L, D], heads, eps)
                                    -> (q [M, H D], k [M, H D])

`plan` is `Plan.text`: the configurations that may serve the weight, gathered when the model was loaded. On CUDA an
operator runs its Triton kernel, on the CPU the function of `int8kit.reference`. Both give the same bits, and both
refuse the same operands in the same words, as do the fake kernels: see `int8kit.operand_checks`. `linear` and
`linear_swiglu` have a gradient for x and for the bias: see `int8kit.gradient`. Under autocast they take x in the
autocast dtype. The import of this module registers the operators of `OPERATORS`, once. Triton is imported when a kernel
first runs.

The module uses `torch.library.Library` and not `custom_op`: the same schemas and fake kernels cost less per call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from int8kit import gradient, operand_checks, reference
from int8kit.lookup import Plan
from int8kit.spec import GemmShape, Operation, TileConfig


class Operator(NamedTuple):
    """A torch operator: its schema and its implementations."""

    schema: str
    cuda: Callable[..., Any]
    cpu: Callable[..., Any]
    fake: Callable[..., Any]  # shapes and dtypes of the results, for torch.compile and export
    check: Callable[..., None]  # raises ShapeError before `cpu` and `fake`, as the kernels do themselves


def _kernel(name: str) -> Callable[..., Any]:
    """The wrapper `name` of the kernel module `name`, which is imported at the first call."""
    names = tuple(inspect.signature(getattr(reference, name)).parameters)

    def call(*args: Any) -> Any:
        operand_checks.one_device(names, args)
        return getattr(import_module(f"int8kit.kernels.{name}"), name)(*args)

    return call


@lru_cache(maxsize=4096)
def _choose(plan: str, operation: Operation, m: int, n: int, k: int) -> TileConfig:
    return Plan.from_text(plan).choose(GemmShape(m, n, k), operation)


def _scaled_mm_cuda(
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

    operand_checks.axes_of_scaled_mm(xq, wq, sx, sw, bias)
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
    from int8kit.kernels.quantize import quantize

    operand_checks.axes_of_linear(x, wq, sw, bias)
    rows = x.reshape(-1, x.shape[-1])
    xq, sx = quantize(rows if rows.stride(1) == 1 else rows.contiguous())
    y = _scaled_mm_cuda(xq, wq, sx, sw, bias, x.dtype, plan, swiglu=swiglu)
    return y.reshape(*x.shape[:-1], y.shape[1])  # not -1, which an empty batch leaves open


def _scaled_mm_cpu(*args: Any, swiglu: bool = False) -> torch.Tensor:
    xq, wq, sx, sw, bias, out_dtype, _ = args
    product = reference.scaled_mm_swiglu if swiglu else reference.scaled_mm
    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)


def _linear_cpu(*args: Any, swiglu: bool = False) -> torch.Tensor:
    x, wq, sw, bias, _ = args
    return (reference.linear_swiglu if swiglu else reference.linear)(x, wq, sw, bias)


def _scaled_mm_fake(*args: Any, swiglu: bool = False) -> Any:
    xq, wq, _, _, _, out_dtype, _ = args
    return xq.new_empty((xq.shape[0], wq.shape[0] // (1 + swiglu)), dtype=out_dtype)


def _linear_fake(*args: Any, swiglu: bool = False) -> Any:
    x, wq = args[:2]
    return x.new_empty((*x.shape[:-1], wq.shape[0] // (1 + swiglu)))


def _quantized(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty q [M, width] and s [M] for the rows of x."""
    return x.new_empty((x.shape[0], width), dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


def _norm_fake(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return _quantized(x, x.shape[1])


def _residual_norm_fake(residual: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return residual.new_empty(residual.shape), *_quantized(residual, residual.shape[1])


def _swiglu_fake(gu: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _quantized(gu, gu.shape[1] // 2)


def _qk_norm_rope_fake(qkv: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    shape = (qkv.shape[0], qkv.shape[1] // 3)
    return qkv.new_empty(shape), qkv.new_empty(shape)


def _product(schema: str, cuda: Any, cpu: Any, fake: Any, check: Any, *, swiglu: bool) -> Operator:
    """One of a pair of operators that share code: the plain product and its SwiGLU."""
    return Operator(schema, *(partial(function, swiglu=swiglu) for function in (cuda, cpu, fake, check)))


_SCALED_MM = "(Tensor xq, Tensor wq, Tensor sx, Tensor sw, Tensor? bias, ScalarType out_dtype, str plan) -> Tensor"
_LINEAR = "(Tensor x, Tensor wq, Tensor sw, Tensor? bias, str plan) -> Tensor"
_SCALED = _scaled_mm_cuda, _scaled_mm_cpu, _scaled_mm_fake, operand_checks.scaled_mm
_OF_X = _linear_cuda, _linear_cpu, _linear_fake, operand_checks.linear
OPERATORS: dict[str, Operator] = {
    "quantize": Operator(
        "(Tensor x) -> (Tensor, Tensor)", _kernel("quantize"), reference.quantize, _norm_fake, operand_checks.quantize
    ),
    "scaled_mm": _product(_SCALED_MM, *_SCALED, swiglu=False),
    "scaled_mm_swiglu": _product(_SCALED_MM, *_SCALED, swiglu=True),
    "linear": _product(_LINEAR, *_OF_X, swiglu=False),
    "linear_swiglu": _product(_LINEAR, *_OF_X, swiglu=True),
    "rms_norm_quantize": Operator(
        "(Tensor x, Tensor? weight, Tensor? modulation, float eps) -> (Tensor, Tensor)",
        _kernel("rms_norm_quantize"),
        reference.rms_norm_quantize,
        _norm_fake,
        operand_checks.rms_norm_quantize,
    ),
    "residual_norm_quantize": Operator(
        "(Tensor residual, Tensor branch, Tensor branch_weight, Tensor gate, Tensor weight, Tensor modulation, "
        "float eps) -> (Tensor, Tensor, Tensor)",
        _kernel("residual_norm_quantize"),
        reference.residual_norm_quantize,
        _residual_norm_fake,
        operand_checks.residual_norm_quantize,
    ),
    "swiglu_quantize": Operator(
        "(Tensor gu) -> (Tensor, Tensor)",
        _kernel("swiglu_quantize"),
        reference.swiglu_quantize,
        _swiglu_fake,
        operand_checks.swiglu_quantize,
    ),
    "qk_norm_rope": Operator(
        "(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, float eps)"
        " -> (Tensor, Tensor)",
        _kernel("qk_norm_rope"),
        reference.qk_norm_rope,
        _qk_norm_rope_fake,
        operand_checks.qk_norm_rope,
    ),
}


def _checked(check: Callable[..., None], half: Callable[..., Any]) -> Callable[..., Any]:
    """`half` after `check`, without autograd: the operations of the reference would record a wrong gradient."""

    def call(*args: Any) -> Any:
        check(*args)
        with torch.no_grad():
            return half(*args)

    return call


def _autocast(name: str, device: str) -> Callable[..., Any]:
    """The operator under autocast on `device`: x in the autocast dtype, the scales as they are."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def call(x: torch.Tensor, *args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            wanted = torch.get_autocast_dtype(device)
            x = x.to(wanted) if x.dtype in operand_checks.FLOATS else x
            return getattr(torch.ops.int8kit, name).default(x, *args)

    return call


_LIBRARY = torch.library.Library("int8kit", "FRAGMENT")
for _name, _operator in OPERATORS.items():
    _LIBRARY.define(_name + _operator.schema)
    _LIBRARY.impl(_name, _operator.cuda, "CUDA")
    _LIBRARY.impl(_name, _checked(_operator.check, _operator.cpu), "CPU")
    torch.library.register_fake(f"int8kit::{_name}", _checked(_operator.check, _operator.fake), lib=_LIBRARY)
for _name, _backward, _save in (
    ("linear", gradient.linear, gradient.save_without_input),
    ("linear_swiglu", gradient.linear_swiglu, gradient.save),
):
    torch.library.register_autograd(f"int8kit::{_name}", _backward, setup_context=_save, lib=_LIBRARY)
    torch.library.register_vmap(f"int8kit::{_name}", partial(gradient.batched, _name), lib=_LIBRARY)
    _LIBRARY.impl(_name, _autocast(_name, "cpu"), "AutocastCPU")
    _LIBRARY.impl(_name, _autocast(_name, "cuda"), "AutocastCUDA")


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
    gradient.refuse_tangents(x, bias)
    transformed = torch._C._are_functorch_transforms_active()  # by torch.func
    operator: Any = gradient.Linear.apply if transformed else torch.ops.int8kit.linear
    out: torch.Tensor = operator(x, wq, sw, bias, plan.text)
    return out


def int8_linear_swiglu(
    x: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None = None, *, plan: Plan = Plan()
) -> torch.Tensor:
    """`int8_linear` with silu(gate) * up of its columns in turn: x [..., K], wq [2 F, K] -> [..., F] of x's dtype."""
    gradient.refuse_tangents(x, bias)
    transformed = torch._C._are_functorch_transforms_active()  # by torch.func
    operator: Any = gradient.LinearSwiGLU.apply if transformed else torch.ops.int8kit.linear_swiglu
    out: torch.Tensor = operator(x, wq, sw, bias, plan.text)
    return out


def rms_norm_quantize(
    x: torch.Tensor, weight: torch.Tensor | None = None, modulation: torch.Tensor | None = None, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, weight and modulation, then int8: see `reference.rms_norm_quantize`; ShapeError outside its domain."""
    q, s = torch.ops.int8kit.rms_norm_quantize(x, weight, modulation, eps)
    return q, s


def residual_norm_quantize(
    residual: torch.Tensor,
    branch: torch.Tensor,
    branch_weight: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    modulation: torch.Tensor,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The residual stream's new value and the next input in int8: see `reference.residual_norm_quantize`."""
    new, q, s = torch.ops.int8kit.residual_norm_quantize(residual, branch, branch_weight, gate, weight, modulation, eps)
    return new, q, s


def swiglu_quantize(gu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of interleaved columns, then int8: see `reference.swiglu_quantize`."""
    q, s = torch.ops.int8kit.swiglu_quantize(gu)
    return q, s


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k out of the joined projection, normed and rotated: see `reference.qk_norm_rope`."""
    q, k = torch.ops.int8kit.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, eps)
    return q, k
