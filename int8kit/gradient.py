"""Gradients of the operators `linear` and `linear_swiglu`, for adapters around a frozen INT8 layer.

The weight counts as W = wq * sw[:, None], in fp32 and rounded once to the gradient's dtype. The rounding of x counts as
the identity. The int8 weight and its scales have no gradient.

    linear         h = x W^T + bias        grad_x = grad_y @ W     grad_bias = sum of the rows of grad_y
    linear_swiglu  y = silu(g) * u         g = h[..., 0::2], u = h[..., 1::2], computed again from x as in the forward
                   grad_g = grad_y * u * s * (1 + g * (1 - s))     s = sigmoid(g), in fp32
                   grad_u = grad_y * g * s                         then grad_h takes the place of grad_y above

Both have a second derivative, by the same rules. Neither has a forward mode: `refuse_tangents` says so, since torch
would take a tangent of zero.

`int8kit.ops` registers the functions. torch does not follow a registered gradient inside transforms of `torch.func`,
such as `grad` and `jacrev`. There `Linear` and `LinearSwiGLU` take the place of the operators, with the same functions.
`batched` is the rule of `vmap`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from int8kit.errors import InputError

_NO_FORWARD_MODE = "an operand has a tangent: an INT8 linear has no forward-mode derivative; use torch.autograd.grad"


def refuse_tangents(*operands: torch.Tensor | None) -> None:
    """Raise InputError for an operand with a tangent, as `torch.func.jvp` gives it."""
    if forward_ad._current_level < 0:
        return
    for operand in operands:
        if isinstance(operand, torch.Tensor) and forward_ad.unpack_dual(operand).tangent is not None:
            raise InputError(_NO_FORWARD_MODE)


def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Save the operands that the backward reads. inputs: x, wq, sw, bias, plan."""
    x, wq, sw, bias, ctx.plan = inputs
    if ctx.needs_input_grad[2]:
        raise InputError("sw requires a gradient, which an INT8 weight's scales do not have; detach them")
    ctx.save_for_backward(x, wq, sw, bias)


def save_without_input(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """As `save`; the plain linear does not need x, so x is free after the forward."""
    save(ctx, (None, *inputs[1:]), output)


def linear(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
    """grad [..., N] -> the gradients of x, wq, sw, bias and plan."""
    _, wq, sw, bias = ctx.saved_tensors
    return _of_product(ctx, grad, wq, sw, bias)


def linear_swiglu(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
    """grad [..., N / 2] -> the gradients of x, wq, sw, bias and plan."""
    x, wq, sw, bias = ctx.saved_tensors
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.no_grad():
        xq, sx = torch.ops.int8kit.quantize(rows)
        h = torch.ops.int8kit.scaled_mm(xq, wq, sx, sw, bias, torch.float32, ctx.plan)
    if torch.is_grad_enabled():  # of a backward with create_graph=True: h is a function of x and bias
        exact = torch.nn.functional.linear(rows.float(), wq * sw[:, None], None if bias is None else bias.float())
        h = h + (exact - exact.detach())
    g, u = h.reshape(*x.shape[:-1], wq.shape[0] // 2, 2).unbind(-1)
    wide, s = grad.float(), torch.sigmoid(g)
    both = torch.stack((wide * u * s * (1 + g * (1 - s)), wide * g * s), -1)
    return _of_product(ctx, both.flatten(-2).to(grad.dtype), wq, sw, bias)


def _of_product(
    ctx: Any, grad: torch.Tensor, wq: torch.Tensor, sw: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
    needs_x, _, _, needs_bias, _ = ctx.needs_input_grad
    of_x = grad @ (wq * sw[:, None]).to(grad.dtype) if needs_x else None
    of_bias = None
    if needs_bias and bias is not None:
        of_bias = grad.reshape(-1, wq.shape[0]).sum(0, dtype=bias.dtype)
    return of_x, None, None, of_bias, None


def batched(name: str, info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, *others: Any) -> Any:
    """The operator `name` under `torch.vmap` -> (output, 0). A batch of x makes more rows; one of weights is a loop."""
    operator = getattr(torch.ops.int8kit, name)
    if not any(dim is not None for dim in in_dims[1:]):
        return operator(x.movedim(in_dims[0] or 0, 0), *others), 0
    operands = (x, *others)
    calls = [
        [one if dim is None else one.select(dim, i).contiguous() for one, dim in zip(operands, in_dims, strict=True)]
        for i in range(info.batch_size)
    ]
    return torch.stack([operator(*call) for call in calls]), 0


class Linear(torch.autograd.Function):
    """The operator `linear` for `torch.func`. Its arguments are those of the operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*operands: Any) -> torch.Tensor:
        """x [..., K], wq, sw, bias, plan -> [..., N]."""
        out: torch.Tensor = torch.ops.int8kit.linear(*operands)
        return out

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raise InputError: see `refuse_tangents`."""
        raise InputError(_NO_FORWARD_MODE)

    setup_context = staticmethod(save_without_input)
    backward = staticmethod(linear)


class LinearSwiGLU(Linear):
    """The operator `linear_swiglu` for `torch.func`. Its arguments are those of the operator."""

    @staticmethod
    def forward(*operands: Any) -> torch.Tensor:
        """x [..., K], wq, sw, bias, plan -> [..., N / 2]."""
        out: torch.Tensor = torch.ops.int8kit.linear_swiglu(*operands)
        return out

    setup_context = staticmethod(save)
    backward = staticmethod(linear_swiglu)
