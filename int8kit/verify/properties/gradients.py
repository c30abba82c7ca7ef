"""The property `gradients`: the derivatives of the operators `linear` and `linear_swiglu`, and x under autocast.

    way         called                                                compared
    backward    torch.autograd.grad of x, of the bias, or of both     every bit, the dtype, and None where not asked
    func        torch.func.grad                                       the same
    second      a backward of the backward, for x, bias and gradient  float64, to SECOND of the largest number
    vmap        torch.vmap over any operands, along any axes          the bits of one call after the other
    autocast    x in fp32, under autocast to another dtype            the reference of x in that dtype
    no floats   x of a dtype that is refused, under autocast          InputError
    tangent     torch.func.jvp                                        InputError
    hessian     torch.func.jacfwd of torch.func.grad                  InputError
    dual        torch.autograd.forward_ad.make_dual                   InputError
    no tangent  inside of forward_ad.dual_level, without a tangent    the bits of a call outside of it
    scales      sw requires a gradient                                InputError

A row of the incoming gradient has one number, and the weights of a gate and of its up have no column in common. So
each element of the gradient of x is one product, which every order of additions gives to the bit. The gradient of the
bias is a sum of small integers; it passes 256, where bf16 loses the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch.autograd import forward_ad

from int8kit import ops, reference
from int8kit.errors import InputError
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples.strategies import OUT_DTYPES
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation

SECOND = 1e-3
WAYS = ("backward", "func", "second", "vmap", "autocast", "no floats", "tangent", "hessian", "dual", "no tangent",
        "scales")  # fmt: skip
LAYOUTS = ("", "transposed", "apart", "expanded")
NEEDS = ("x", "bias", "x,bias")
AXES: tuple[tuple[int | None, ...], ...] = (
    (1, None, None, None), (2, None, None, None), (-1, None, None, None), (None, 0, None, None), (None, 1, None, None),
    (None, 2, None, None), (None, None, 1, None), (None, None, None, 1), (2, 1, 1, 1), (1, 2, 0, None), (0, None, 1, 0),
)  # fmt: skip
"""Axes of x, wq, sw and the bias along which vmap has a batch; None: that operand is the same for all."""
_PUBLIC: dict[str, Callable[..., torch.Tensor]] = {"linear": ops.int8_linear, "linear_swiglu": ops.int8_linear_swiglu}


@dataclass(frozen=True)
class GradientCase:
    """One derivative of one operator."""

    operator: str  # of _PUBLIC
    rows: tuple[int, ...]  # the shape of x without K
    k: int
    n: int  # even
    dtype: torch.dtype  # of x
    bias: torch.dtype | None
    needs: str = "x,bias"  # one of NEEDS: the operands whose gradient is asked for, or that vmap maps over
    way: str = "backward"  # one of WAYS
    seed: int = 0
    layout: str = ""  # of x and of the incoming gradient, one of LAYOUTS; "": contiguous
    axes: tuple[int | None, ...] = ()  # of AXES, for vmap; (): the first axis of the operands in `needs`

    def __str__(self) -> str:
        short = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.bias)]
        return (
            f"{self.way} of {self.operator} for {self.needs}, rows {list(self.rows)}, N = {self.n}, K = {self.k}, "
            f"{short[0]}, {short[1]} bias, seed {self.seed}"
            f"{f', {self.layout} x' if self.layout else ''}{f', axes {self.axes}' if self.axes else ''}"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The operands whose gradient is asked for."""
        return tuple(name for name in self.needs.split(",") if name == "x" or self.bias is not None)


def check(c: GradientCase, on: Executor | Implementation) -> str | None:
    """How a derivative differs from its definition, or None."""
    if not c.names:
        return None
    way: dict[str, Callable[[GradientCase, str], str | None]] = {
        "backward": _backward, "func": _func, "second": _second, "vmap": _vmap, "autocast": _autocast,
        "no floats": _no_floats, "tangent": _refused, "hessian": _refused, "dual": _refused, "no tangent": _no_tangent,
        "scales": _refused,
    }  # fmt: skip
    return way[c.way](c, on.device)


def _operands(c: GradientCase, device: str) -> dict[str, Any]:
    """x, wq, sw, bias and the incoming gradient."""
    g = torch.Generator().manual_seed(c.seed)
    wq = torch.randint(-127, 128, (c.n, c.k), generator=g, dtype=torch.int8)
    if c.operator == "linear_swiglu":  # a gate has the even columns, its up the odd ones
        wq[0::2, 1::2], wq[1::2, 0::2] = 0, 0
    m, columns = _count(c), c.n // 2 if c.operator == "linear_swiglu" else c.n
    grad = torch.zeros(m, columns)
    grad[torch.arange(m), torch.where(torch.arange(m) % 3 == 1, torch.arange(m) % columns, 0)] = 1.0
    bias = None if c.bias is None else torch.randn(c.n, generator=g).to(c.bias)
    found = {
        "x": torch.randn(*c.rows, c.k, generator=g).to(c.dtype), "wq": wq,
        "sw": torch.rand(c.n, generator=g) * 0.011 + 0.0003, "bias": bias,
        "grad": grad.reshape(*c.rows, columns).to(c.dtype),
    }  # fmt: skip
    moved: dict[str, Any] = {name: value if value is None else value.to(device) for name, value in found.items()}
    return moved | {name: _laid_out(moved[name], c.layout) for name in ("x", "grad")}


def _laid_out(data: torch.Tensor, layout: str) -> torch.Tensor:
    """`data` in a layout of LAYOUTS; an expanded tensor has equal rows."""
    if layout == "transposed" and data.dim() > 1:
        return data.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and data.dim() > 1:
        return data[:1].expand(data.shape) if len(data) else data
    return data.repeat_interleave(2, -1)[..., ::2] if layout else data


def _count(c: GradientCase) -> int:
    count = 1
    for rows in c.rows:
        count *= rows
    return count


def _call(c: GradientCase, a: dict[str, Any], **changes: Any) -> torch.Tensor:
    a = a | changes
    return _PUBLIC[c.operator](a["x"], a["wq"], a["sw"], a["bias"])


def _weight(a: dict[str, Any]) -> torch.Tensor:
    weight: torch.Tensor = a["wq"].float() * a["sw"][:, None]
    return weight


def _hidden(c: GradientCase, a: dict[str, Any]) -> torch.Tensor:
    """The fp32 product [M, N] of the forward."""
    xq, sx = reference.quantize(a["x"].detach().reshape(-1, c.k))
    bias = None if a["bias"] is None else a["bias"].detach()
    return reference.scaled_mm(xq, a["wq"], sx, a["sw"], bias, out_dtype=torch.float32)


def _expected(c: GradientCase, a: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients of x and of the bias, by their definition."""
    grad = a["grad"].reshape(_count(c), a["grad"].shape[-1])
    if c.operator == "linear_swiglu":
        gate, up = _hidden(c, a).reshape(*c.rows, c.n // 2, 2).unbind(-1)
        wide, s = a["grad"].float(), torch.sigmoid(gate)
        of_gate, of_up = wide * up * s * (1 + gate * (1 - s)), wide * gate * s
        grad = torch.stack((of_gate, of_up), -1).reshape(_count(c), c.n).to(c.dtype)
    weight = _weight(a).to(c.dtype)
    of_x = (grad.double() @ weight.double()).float().to(c.dtype)  # one product: fp32, or exact, is rounded once
    found = {"x": of_x.reshape(*c.rows, c.k)}
    if a["bias"] is not None:
        found["bias"] = grad.to(c.bias).double().sum(0).to(c.bias)
    return found


def _differs(c: GradientCase, got: dict[str, Any], want: dict[str, torch.Tensor]) -> str | None:
    for name in c.names:
        mine, theirs = got[name], want[name]
        if mine is None or (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            about = "no gradient" if mine is None else f"a gradient of {mine.dtype} {tuple(mine.shape)}"
            return f"{about} of {name}, expected {theirs.dtype} {tuple(theirs.shape)}"
        exact = name == "x" or c.operator == "linear"  # else the bias has sums, whose order torch chooses
        if exact and (why := bitwise_diff(mine.contiguous() + 0.0, theirs.contiguous() + 0.0)):  # -0 equals 0
            return f"the gradient of {name}: {why}"
        if not exact and (why := _far(mine, theirs, 4 * torch.finfo(theirs.dtype).eps)):
            return f"the gradient of {name}: {why}"
    return None


def _far(got: torch.Tensor, want: torch.Tensor, part: float) -> str | None:
    if not want.numel():
        return None
    off, most = float((got.double() - want.double()).abs().max()), float(want.double().abs().max())
    return None if off <= part * most else f"off by {off:.3g}, expected at most {part:.1g} of {most:.3g}"


def _backward(c: GradientCase, device: str) -> str | None:
    a = _operands(c, device)
    want = _expected(c, a)
    for name in c.names:
        a[name].requires_grad_()
    y = _call(c, a)
    with torch.no_grad():
        plain = _call(c, a)
    if why := bitwise_diff(y.detach(), plain):
        return f"the output beside one without gradients: {why}"
    found = torch.autograd.grad(y, [a[name] for name in c.names], a["grad"])
    return _differs(c, dict(zip(c.names, found, strict=True)), want)


def _func(c: GradientCase, device: str) -> str | None:
    a = _operands(c, device)

    def loss(*operands: torch.Tensor) -> torch.Tensor:
        products: torch.Tensor = _call(c, a, **dict(zip(c.names, operands, strict=True))) * a["grad"]
        return products.sum()

    found = torch.func.grad(loss, argnums=tuple(range(len(c.names))))(*(a[name] for name in c.names))
    return _differs(c, dict(zip(c.names, found, strict=True)), _expected(c, a))


def _second(c: GradientCase, device: str) -> str | None:
    """The derivative of a weighted sum of gradients. A plain linear has one for the incoming gradient alone."""
    a = _operands(c, device)
    g = torch.Generator().manual_seed(c.seed + 1)
    weights = [torch.randn(a[name].shape, generator=g).to(device) for name in c.names]
    hidden, weight = _hidden(c, a).double(), _weight(a).double()
    names = ("x", "grad") if c.bias is None else ("x", "grad", "bias")
    wide = {name: a[name].double().requires_grad_() for name in names}
    exact = wide["x"].reshape(-1, c.k) @ weight.t() + wide.get("bias", 0.0)
    h = hidden + (exact - exact.detach())
    y = torch.nn.functional.silu(h[:, 0::2]) * h[:, 1::2] if c.operator == "linear_swiglu" else h
    results = []
    for output, of in ((y.reshape(a["grad"].shape), wide), (None, a)):
        for name in names:
            of[name].requires_grad_()
        first = torch.autograd.grad(
            _call(c, a) if output is None else output, [of[name] for name in c.names], of["grad"], create_graph=True
        )
        total = torch.stack([(one * factor).sum() for one, factor in zip(first, weights, strict=True)]).sum()
        results.append(torch.autograd.grad(total, [of[name] for name in names], allow_unused=True))
    coarse = max(torch.finfo(dtype).eps for dtype in (c.dtype, c.bias or c.dtype))
    part = max(SECOND, 30 * coarse)
    for name, theirs, mine in zip(names, *results, strict=True):
        if theirs is None or not bool(theirs.any()):
            continue
        why = "absent" if mine is None else _far(mine, theirs, part)
        if why:
            return f"the second derivative for {name}: {why}"
    return None


def _vmap(c: GradientCase, device: str) -> str | None:
    a, others = _operands(c, device), _operands(GradientCase(**{**vars(c), "seed": c.seed + 1}), device)
    axes = dict(zip(("x", "wq", "sw", "bias"), c.axes, strict=True)) if c.axes else dict.fromkeys(c.names, 0)
    batched = {name: axis for name, axis in axes.items() if axis is not None and a[name] is not None}
    both = [torch.stack((a[name], others[name]), axis) for name, axis in batched.items()]

    def call(*operands: torch.Tensor) -> torch.Tensor:
        return _call(c, a, **dict(zip(batched, operands, strict=True)))

    with torch.no_grad():
        got = torch.vmap(call, in_dims=tuple(batched.values()))(*both) if batched else call()[None]
        want = [call(*(part[name] for name in batched)) for part in ((a, others) if batched else (a,))]
    return bitwise_diff(got.contiguous(), torch.stack(want))


def _autocast(c: GradientCase, device: str) -> str | None:
    kind, to = device.partition(":")[0], torch.bfloat16 if c.dtype is not torch.bfloat16 else torch.float16
    a = _operands(c, device)
    want = getattr(reference, c.operator)(a["x"].to(to), a["wq"], a["sw"], a["bias"])
    with torch.no_grad(), torch.autocast(kind, dtype=to):
        got = _call(c, a)
    return f"{got.dtype}, expected {to}" if got.dtype is not to else bitwise_diff(got, want)


def _no_floats(c: GradientCase, device: str) -> str | None:
    a = _operands(c, device)
    for dtype in (torch.float64, torch.int32, torch.int8):
        try:
            with torch.autocast(device.partition(":")[0], dtype=torch.bfloat16):
                _call(c, a, x=a["x"].to(dtype))
        except InputError:
            continue
        except Exception as error:
            return f"{type(error).__name__} for x of {dtype}: {str(error).splitlines()[0]}; expected InputError"
        return f"no error for x of {dtype}, expected InputError"
    return None


def _no_tangent(c: GradientCase, device: str) -> str | None:
    a = _operands(c, device)
    want = _call(c, a)
    with forward_ad.dual_level():
        return bitwise_diff(_call(c, a), want)


def _refused(c: GradientCase, device: str) -> str | None:
    a = _operands(c, device)
    a["x"] = a["x"].contiguous()  # torch itself refuses the tangent of an expanded one
    name = c.names[0]
    try:
        if c.way == "scales":
            _call(c, a, sw=a["sw"].requires_grad_())
        elif c.way == "dual":
            with forward_ad.dual_level():
                _call(c, a, **{name: forward_ad.make_dual(a[name], torch.ones_like(a[name]))})
        elif c.way == "hessian":

            def total(operand: torch.Tensor) -> torch.Tensor:
                return _call(c, a, **{name: operand}).sum()

            torch.func.jacfwd(torch.func.grad(total))(a[name])
        else:
            torch.func.jvp(lambda t: _call(c, a, **{name: t}), (a[name],), (torch.ones_like(a[name]),))
    except InputError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}; expected InputError"
    return "no error, expected InputError"


def examples() -> st.SearchStrategy[GradientCase]:
    """Strategy for cases of both operators, of every way."""
    return st.builds(
        GradientCase,
        operator=st.sampled_from(tuple(_PUBLIC)),
        rows=st.sampled_from(((), (0,), (1,), (3,), (2, 2), (7,), (2, 0))),
        k=st.sampled_from((2, 17, 40, 64)),
        n=st.sampled_from((2, 6, 24)),
        dtype=st.sampled_from(OUT_DTYPES),
        bias=st.sampled_from((None, *OUT_DTYPES)),
        needs=st.sampled_from(NEEDS),
        way=st.sampled_from(WAYS),
        seed=st.integers(0, 7),
        layout=st.sampled_from(LAYOUTS),
    )


def always() -> Iterator[GradientCase]:
    """Each way of each operator, in every dtype of x and of the bias; sums of the bias beyond 256.

    Also each way of x with no axis of rows, with no row, and in each layout; and vmap along each of AXES.
    """
    for operator in _PUBLIC:
        for dtype in OUT_DTYPES:
            for bias in (None, *OUT_DTYPES):
                for needs in NEEDS:
                    for way in WAYS if bias is None or dtype is bias else WAYS[:1]:
                        yield GradientCase(operator, (3, 2), 40, 24, dtype, bias, needs, way)
                if bias is not None:
                    yield GradientCase(operator, (900,), 4, 2, dtype, bias, "bias")
        for way in WAYS:
            for rows in ((), (0,), (2, 0)):
                yield GradientCase(operator, rows, 40, 24, torch.float32, torch.float32, way=way)
            for layout in LAYOUTS[1:]:
                for rows in ((5,), (3, 2)):
                    yield GradientCase(operator, rows, 40, 24, torch.float32, torch.float32, way=way, layout=layout)
        for axes in AXES:
            for dtype in (torch.float32, torch.bfloat16):
                yield GradientCase(operator, (5, 2), 40, 24, dtype, torch.float32, way="vmap", axes=axes)
