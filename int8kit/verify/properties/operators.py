"""The property `operators`: every torch operator of `ops`, by its CPU half, its kernel half and its fake kernel.

    half     called by                                                 compared with the reference
    CPU      the public function of `ops`, on CPU tensors              bits, shape, dtype, strides, device
    kernel   the public function on a GPU; else the function that is   the same, and the configuration of the GEMM is
             registered for CUDA, in Triton's interpreter              the one that the plan chooses
    fake     the public function, on fake tensors                      shape, dtype, strides, device

No half writes into an operand, or returns memory that a later call or an operand uses, or records a gradient of its
own. The fake kernel also runs with rows whose number is a symbol, and must not narrow it.

A case may name an operand that is wrong. Then each half must raise ShapeError. An operator of `ops.OPERATORS` without a
case fails a test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from int8kit import ops, reference
from int8kit.errors import ShapeError
from int8kit.kernels import gemm
from int8kit.lookup import Candidate, Plan
from int8kit.spec import GemmShape, Operation, TileConfig
from int8kit.verify.compare import Unchanged, another_default_dtype, bitwise_diff, shares_memory
from int8kit.verify.examples.row_memory import GuardedAllocations
from int8kit.verify.examples.strategies import float_matrix, int8_matrix, scales
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation

PRODUCTS = ("scaled_mm", "scaled_mm_swiglu", "linear", "linear_swiglu")
PUBLIC: dict[str, Callable[..., Any]] = {
    "quantize": lambda **a: ops.quantize(a["x"]),
    "scaled_mm": lambda **a: ops.scaled_mm(*_products(a), **_named(a, "out_dtype", "plan")),
    "scaled_mm_swiglu": lambda **a: ops.scaled_mm_swiglu(*_products(a), **_named(a, "out_dtype", "plan")),
    "linear": lambda **a: ops.int8_linear(a["x"], a["wq"], a["sw"], a["bias"], **_named(a, "plan")),
    "linear_swiglu": lambda **a: ops.int8_linear_swiglu(a["x"], a["wq"], a["sw"], a["bias"], **_named(a, "plan")),
    "rms_norm_quantize": lambda **a: ops.rms_norm_quantize(**a),
    "residual_norm_quantize": lambda **a: ops.residual_norm_quantize(**a),
    "swiglu_quantize": lambda **a: ops.swiglu_quantize(a["gu"]),
    "qk_norm_rope": lambda **a: ops.qk_norm_rope(**a),
}
"""The public function of each operator, called with its arguments by name; arguments at their defaults are absent."""


def _products(a: dict[str, Any]) -> tuple[Any, ...]:
    return a["xq"], a["wq"], a["sx"], a["sw"], a["bias"]


def _named(a: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: a[name] for name in names if name in a}


@dataclass(frozen=True)
class OperatorCase:
    """One call of one operator."""

    operator: str
    rows: tuple[int, ...]  # the shape of x without K; several images have rows[0] = B
    k: int  # K, F of SwiGLU, or the width of a head
    n: int = 24  # columns of a product, or the number of heads
    dtype: torch.dtype = torch.float32  # of the matrices
    vectors: torch.dtype = torch.float32  # of bias, weights, modulations, gates, cos and sin
    out_dtype: torch.dtype = torch.bfloat16  # of a scaled product
    left_out: tuple[str, ...] = ()  # optional operands that are None
    contiguous: bool = True  # False: each matrix is a slice of a larger one, or x is transposed; see `_loose`
    eps: float = 1e-5
    plan: int = 0  # index of PLANS
    kind: str = "normal"  # of x, one of FLOAT_KINDS; with a NaN or an infinity in it, some scales are NaN
    scales: str = "ordinary"  # one of SCALE_KINDS
    requires_grad: str = ""  # the operand that requires a gradient
    wrong: str = ""  # the operand that is wrong
    fault: str = ""  # how: see `_wrong`

    def __str__(self) -> str:
        more = f", {self.fault} of {self.wrong} wrong" if self.wrong else ""
        short = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.vectors, self.out_dtype)]
        return (
            f"{self.operator} of rows {list(self.rows)}, N = {self.n}, K = {self.k}, {short[0]} with {short[1]} "
            f"vectors to {short[2]}, without {', '.join(self.left_out) or 'nothing'}, eps {self.eps}, plan {self.plan}"
            f"{'' if self.contiguous else ', not contiguous'}, {self.kind} data, {self.scales} scales"
            f"{f', {self.requires_grad} requires a gradient' if self.requires_grad else ''}{more}"
        )


def _tile(m: int, n: int, group_m: int) -> TileConfig:
    return TileConfig(m, n, 32, num_warps=1, num_stages=2, group_m=group_m)


def _plans() -> tuple[Plan, ...]:
    """No candidates; several rows; both operations; another weight; one that is not near."""
    of = {16: _tile(16, 16, 1), 32: _tile(32, 16, 2), 64: _tile(32, 32, 3)}
    ladder = tuple(Candidate(GemmShape(m, 24, 40), config) for m, config in of.items())
    swiglu = (Candidate(GemmShape(16, 24, 40), _tile(16, 32, 5), Operation.SWIGLU),)
    other = (Candidate(GemmShape(20, 48, 40), _tile(16, 64, 6)), Candidate(GemmShape(16, 24, 4000), _tile(16, 32, 7)))
    return Plan(), Plan(ladder, 82), Plan((*ladder, *swiglu), 1), Plan(other, 132), Plan(swiglu, 82)


PLANS = _plans()
LARGE_K = 4000
ROWS = ("x", "xq", "sx", "residual", "branch", "gu", "qkv", "cos", "sin")
"""The operands with M rows, or with the rows of one image."""


def arguments(c: OperatorCase, device: str) -> dict[str, Any]:
    """The arguments by name, all of them and in the schema's order."""
    g = torch.Generator().manual_seed(len(str(c)))
    m, images = _count(c.rows), c.rows[0] if len(c.rows) > 1 else 1

    def matrix(rows: int, width: int, salt: int = 0) -> torch.Tensor:
        empty = torch.empty(rows, width, dtype=c.dtype)
        plain = float_matrix(rows, width, c.kind, 3 + salt, c.dtype, "cpu") if rows * width else empty
        return plain if c.contiguous else _sliced(plain)

    def vectors(*shape: int, around: float = 0.0) -> torch.Tensor:
        made = (torch.randn(*shape, generator=g) * 0.5 + around).to(c.vectors)
        return made if c.contiguous else _loose(made)

    a: dict[str, Any]
    if c.operator in PRODUCTS:
        a = _of_product(c, g)
    elif c.operator == "quantize":
        a = {"x": matrix(m, c.k)}
    elif c.operator == "swiglu_quantize":
        a = {"gu": matrix(m, 2 * c.k)}
    elif c.operator == "rms_norm_quantize":
        a = {"x": matrix(m, c.k), "weight": vectors(c.k, around=1.0), "modulation": vectors(images, c.k), "eps": c.eps}
    elif c.operator == "residual_norm_quantize":
        a = {"residual": matrix(m, c.k), "branch": matrix(m, c.k, 1), "branch_weight": vectors(c.k, around=1.0),
             "gate": vectors(images, c.k), "weight": vectors(c.k, around=1.0), "modulation": vectors(images, c.k),
             "eps": c.eps}  # fmt: skip
    else:
        period = c.rows[-1] or 1
        a = {"qkv": matrix(m, 3 * c.n * c.k), "q_weight": vectors(c.k), "k_weight": vectors(c.k),
             "cos": vectors(period, c.k), "sin": vectors(period, c.k), "heads": c.n, "eps": c.eps}  # fmt: skip
    a |= dict.fromkeys(c.left_out)
    if c.wrong:
        a[c.wrong] = _wrong(a[c.wrong], c.fault)
    a = {name: _moved(value, device) for name, value in a.items()}
    if c.requires_grad:
        a[c.requires_grad].requires_grad_()
    return a


def _moved(value: Any, device: str) -> Any:
    """A CPU tensor on `device` with its strides, which `Tensor.to` does not keep; any other value itself."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or device == "cpu":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def _of_product(c: OperatorCase, g: torch.Generator) -> dict[str, Any]:
    m = _count(c.rows)
    large = c.k > LARGE_K  # sums beyond 2**24, where float32 loses their low bits
    kind = "opposed" if large else "uniform"
    loose: Callable[[torch.Tensor], torch.Tensor] = _unchanged if c.contiguous else _loose
    wq, sw = int8_matrix(c.n, c.k, kind, 4, "cpu"), loose(scales(c.n, c.scales, 5, "cpu"))
    common = {"bias": loose(torch.randn(c.n, generator=g).to(c.vectors)), "plan": PLANS[c.plan]}
    if c.operator.startswith("linear"):
        x = float_matrix(m, c.k, c.kind, 3, c.dtype, "cpu") if m else torch.empty(0, c.k, dtype=c.dtype)
        x = x.abs() if large else x
        x = x.reshape(*c.rows, c.k)
        if not c.contiguous:  # columns apart, or rows, or a slice
            x = _sliced(x) if len(c.rows) == 3 else x.transpose(0, 1).contiguous().transpose(0, 1)
        return {"x": x, "wq": wq, "sw": sw, **common}
    xq = int8_matrix(m, c.k, kind, 6, "cpu") if m else torch.empty(0, c.k, dtype=torch.int8)
    both = {"xq": xq if c.contiguous else _sliced(xq), "wq": wq if c.contiguous else _sliced(wq)}
    return {**both, "sx": loose(scales(m, c.scales, 7, "cpu")), "sw": sw, "bias": common["bias"],
            "out_dtype": c.out_dtype, "plan": common["plan"]}  # fmt: skip


def _count(rows: tuple[int, ...]) -> int:
    count = 1
    for one in rows:
        count *= one
    return count


def _sliced(plain: torch.Tensor) -> torch.Tensor:
    """`plain` as columns 3 to 3 + K of a wider matrix; where K = 1, as every second column of one."""
    if plain.shape[-1] == 1:
        return torch.cat((plain, plain), -1)[..., ::2]
    wide = torch.full((*plain.shape[:-1], plain.shape[-1] + 8), 1, dtype=plain.dtype)
    wide[..., 3 : 3 + plain.shape[-1]] = plain
    return wide[..., 3 : 3 + plain.shape[-1]]


def _loose(plain: torch.Tensor) -> torch.Tensor:
    """`plain` as a part of a larger tensor, if an operator takes that: rows of a table, or a vector of one element."""
    return _sliced(plain) if plain.dim() > 1 or plain.numel() == 1 else plain


def _unchanged(plain: torch.Tensor) -> torch.Tensor:
    return plain


def _wrong(value: Any, fault: str) -> Any:
    """`value` with a fault of FAULTS."""
    if isinstance(value, torch.dtype):
        return torch.int16 if fault == "dtype" else torch.float64
    if isinstance(value, int):
        return 0 if fault == "zero" else value + 2
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "dtype": lambda t: t.to(torch.float64 if t.dtype is torch.int8 else torch.int32),
        "shape": lambda t: torch.cat((t, t[..., :1]), -1),
        "float64": lambda t: t.double(),
        "axes": lambda t: t[None],
        "stride": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "device": lambda t: t.to("meta"),
        "images": lambda t: torch.cat((t, t))[:4],  # of six rows
        "one row": lambda t: t[:1],  # beside a table with several
        "odd n": lambda t: t,  # of the case itself, as are the next ones
        "largest k": lambda t: t,
        "width": lambda t: t,
    }
    return found[fault](value)


def check(c: OperatorCase, on: Executor | Implementation) -> str | None:
    """How a half of the operator differs from the reference, or None."""
    if c.wrong:
        return _refusal(c, on)
    cpu, device = arguments(c, "cpu"), on.device
    want = _expected(c, cpu)
    for name, call, tensors, where in (
        ("the CPU half", partial(_public, c), cpu, "cpu"),
        ("the kernel half", partial(_kernel_half, c, device), arguments(c, device), device),
    ):
        kept = Unchanged(tensors.items())
        with another_default_dtype():
            got = call(tensors)
        if why := _unlike(got, want, where):
            return f"{name}: {why}"
        if why := kept.written() or _shared(c, call, tensors, got):
            return f"{name}: {why}"
        if c.requires_grad and _has_gradient(got, tensors[c.requires_grad]):
            return f"{name}: the operator gives {c.requires_grad} a gradient, which is not defined"
        fake = _fake(c, tensors)
        if why := _unlike(fake, got, where, values=False):
            return f"the fake kernel beside {name}: {why}"
    return _narrowed(c, cpu)


def _has_gradient(results: tuple[torch.Tensor, ...], operand: torch.Tensor) -> bool:
    """Whether autograd has a gradient of the results for the operand. Torch warns where it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for result in results:
            if result.requires_grad:
                [found] = torch.autograd.grad(result.sum(), operand, retain_graph=True, allow_unused=True)
                if found is not None:
                    return True
    return False


def _shared(c: OperatorCase, call: Callable[..., Any], a: dict[str, Any], got: tuple[torch.Tensor, ...]) -> str | None:
    """Whether the results lie in memory that an operand has or that the next call returns, as text, or None."""
    if shares_memory(got, a.values()):
        return "a result lies in the memory of an operand"
    again = _count(c.rows) <= 8 and c.k <= 64 and c.kind == "normal" and c.dtype is c.vectors  # a call takes time
    return "a later call returns the memory of the result" if again and shares_memory(call(a), got) else None


def _narrowed(c: OperatorCase, a: dict[str, Any]) -> str | None:
    """How the fake kernel narrows a number of rows that is still a symbol, as text, or None."""
    if min(c.rows, default=0) < 2:  # torch never takes 0 and 1 for a symbol
        return None
    symbols = ShapeEnv()
    with FakeTensorMode(shape_env=symbols) as mode:
        fakes = dict(a)
        for name, value in a.items():
            if isinstance(value, torch.Tensor):
                free = value.dim() - 1 if name in ("x", "residual", "branch") else 1
                sizes = [
                    DimDynamic.DYNAMIC if name in ROWS and axis < free else DimDynamic.STATIC
                    for axis in range(value.dim())
                ]
                context = StatelessSymbolicContext(dynamic_sizes=sizes)  # type: ignore[var-annotated]
                fakes[name] = mode.from_tensor(value, symbolic_context=context)
        _public(c, fakes)
    if symbols.guards:
        return f"the fake kernel narrows a number of rows: {symbols.guards[0].expr}"
    return None


def _expected(c: OperatorCase, a: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    found = {name: value for name, value in a.items() if name != "plan"}
    result = getattr(reference, c.operator)(**found)
    return result if isinstance(result, tuple) else (result,)


def _public(c: OperatorCase, a: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The result of the public function. Arguments that have their default are left to it."""
    given = dict(a)
    defaults: tuple[tuple[str, Any], ...] = (("out_dtype", torch.bfloat16), ("plan", Plan()), ("eps", 1e-5))
    for name, default in defaults:
        if name in given and given[name] == default:
            del given[name]
    result = PUBLIC[c.operator](**given)
    return result if isinstance(result, tuple) else (result,)


def _kernel_half(c: OperatorCase, device: str, a: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The result of the kernels. Raises AssertionError if a GEMM has another configuration than the plan's."""
    with _launched() as configs, GuardedAllocations(None).active():
        if device != "cpu":
            result = _public(c, a)
        else:
            flat = [value.text if isinstance(value, Plan) else value for value in a.values()]
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            operator = getattr(torch.ops.int8kit, c.operator).default
            result = operator.redispatch(keys, *flat)
            result = result if isinstance(result, tuple) else (result,)
    m = _count(c.rows)
    operation = Operation.SWIGLU if c.operator.endswith("_swiglu") else Operation.GEMM
    want = [PLANS[c.plan].choose(GemmShape(m, c.n, c.k), operation)] if c.operator in PRODUCTS and m else []
    if configs != want:
        raise AssertionError(f"launched {list(map(str, configs))}, expected {list(map(str, want))}")
    return result


@contextmanager
def _launched() -> Iterator[list[TileConfig]]:
    """The configurations with which GEMMs are launched inside the context."""
    seen: list[TileConfig] = []
    launch = gemm._launch

    def spy(operands: Any, config: TileConfig, arch: str | None) -> None:
        if operands.m:
            seen.append(config)
        launch(operands, config, arch)

    with mock.patch.object(gemm, "_launch", spy):
        yield seen


def _fake(c: OperatorCase, a: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in a.items()}
        return _public(c, fakes)


def _unlike(
    got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], device: str, *, values: bool = True
) -> str | None:
    """How results differ from the expected ones, which may lie on another device, or None."""
    if len(got) != len(want):
        return f"{len(got)} results, expected {len(want)}"
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        about = f"result {number}"
        for name in ("shape", "dtype"):
            if getattr(mine, name) != getattr(theirs, name):
                return f"{about}: {name} {getattr(mine, name)}, expected {getattr(theirs, name)}"
        if not mine.is_contiguous() or mine.stride() != theirs.contiguous().stride():
            return f"{about}: strides {mine.stride()}, expected {theirs.contiguous().stride()}"
        if mine.device.type != device.partition(":")[0]:
            return f"{about} on {mine.device}, expected {device}"
        if values and (why := bitwise_diff(mine.cpu(), theirs.cpu().contiguous())):
            return f"{about}: {why}"
    return None


def _refusal(c: OperatorCase, on: Executor | Implementation) -> str | None:
    """How the halves take a wrong operand; None if each that must refuse it raises ShapeError."""
    halves: dict[str, Callable[[], Any]] = {}
    if c.fault != "device" or on.device == "cpu":  # a GPU's dispatcher refuses tensors of two kinds of devices itself
        halves["the kernel half"] = lambda: _kernel_half(c, on.device, arguments(c, on.device))
    halves["the CPU half"] = lambda: _public(c, arguments(c, "cpu"))
    halves["the fake kernel"] = lambda: _fake(c, arguments(c, "cpu"))
    for name, call in halves.items():
        try:
            call()
        except ShapeError:
            continue
        except Exception as error:
            return f"{name} raised {type(error).__name__}: {str(error).splitlines()[0]}; expected ShapeError"
        return f"{name} took it, expected ShapeError"
    return None
