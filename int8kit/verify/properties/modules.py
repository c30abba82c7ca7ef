"""The property `modules`: a module whose linears became INT8 layers computes each of them as its weight says.

    kind            the two linears                              expected beside the output of each
    plain           with a weight each                           Int8Linear under both names
    shared          one linear in two places                     one layer in two places
    tied            one Parameter in two linears                 one int8 weight, and each linear's own bias
    left            the second one is not wanted                 it stays and computes in floats
    half tied       tied, and the second one is not wanted       both stay
    hooks           with hooks of every kind                     the hooks are called, and their handles remove them
    attributes      in training mode, with own tensors           the same on the layers
    transposed      weights whose columns lie together
    float64         weights and biases in float64                the bias in float32
    bitsandbytes    8-bit weights of bitsandbytes                the integers, and the largest numbers / 127
    tensor class    int8 weights of a class with dequantize()    the integers and scales of the class
    int8, fp8       integers or fp8 with scales beside them      the integers and scales themselves; fp8 times scales

A scale is one number, one for each row, or one for each block of the weight. The expected weight is computed here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from int8kit import reference
from int8kit.errors import ShapeError
from int8kit.layers import Int8Linear
from int8kit.quantization import quantize_, replace_linears
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples.strategies import OUT_DTYPES
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation

KINDS = ("plain", "shared", "tied", "left", "half tied", "hooks", "attributes", "transposed", "float64",
         "bitsandbytes", "tensor class")  # fmt: skip
STORED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
SCALED = ("one", "rows", "column", "blocks")
"""Scales beside a stored weight. Blocks are for fp8 alone."""
NAMES = ("weight_scale", "scale_weight", "weight_scale_inv")
BLOCK = (8, 16)
CALLS = ("quantize_", "replace_linears")
PATHS = ("first", "inner.second")


class _Int8Params(torch.nn.Parameter):
    """A stand-in for the 8-bit weight of bitsandbytes, which is recognized by its name."""

    SCB: torch.Tensor  # the largest number of each row


_Int8Params.__name__, _Int8Params.__module__ = "Int8Params", "bitsandbytes.nn.modules"


class _Quantized(torch.nn.Parameter):
    """A stand-in for the tensor classes of other libraries."""

    qdata: torch.Tensor
    scale: torch.Tensor  # [N, 1]

    def dequantize(self) -> torch.Tensor:
        """The float weight."""
        return self.qdata * self.scale

    def detach(self) -> torch.Tensor:
        """The weight itself: the classes of other libraries keep their class here."""
        return self


@dataclass(frozen=True)
class ModuleCase:
    """One module of two linears, and one call of each after the exchange."""

    kind: str  # of KINDS, or of SCALED with a `stored`
    dtype: torch.dtype  # of x, and of the linears without a bias
    bias: torch.dtype | None = None  # of the biases, and of the linears
    stored: torch.dtype | None = None  # of STORED: of the weights
    call: str = "quantize_"  # of CALLS
    name: str = NAMES[0]  # of the scales
    k: int = 40
    n: int = 24
    seed: int = 0

    def __str__(self) -> str:
        words = [str(one).removeprefix("torch.") for one in (self.dtype, self.bias, self.stored)]
        scales = f", {words[2]} beside {self.kind} {self.name}" if self.stored else f", {self.kind}"
        return (
            f"{self.call} of linears [{self.n}, {self.k}]{scales}, x in {words[0]}, {words[1]} biases, seed {self.seed}"
        )


Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""An int8 weight, its scales and the bias."""


def check(c: ModuleCase, on: Executor | Implementation) -> str | None:
    """How an exchanged module differs from the expected one, or None."""
    linears = _linears(c)
    weights = [_quantized(c, linear, number) for number, linear in enumerate(linears)]
    root = torch.nn.ModuleDict({"first": linears[0], "inner": torch.nn.ModuleDict({"second": linears[1]})}).to(
        on.device
    )
    _wrap(c, linears, on.device)
    counts: list[str] = []
    handles = [one for linear in dict.fromkeys(linears) for one in _hook(linear, counts)] if c.kind == "hooks" else []
    wanted = PATHS[: 1 if c.kind in ("left", "half tied") else 2]
    if c.call == "quantize_":
        replaced = quantize_(root, wanted).replaced
    else:
        replaced = replace_linears(root, wanted.__contains__)
    layers = [root.get_submodule(path) for path in PATHS]
    exchanged = () if c.kind == "half tied" else wanted
    if set(replaced) != set(exchanged) or [isinstance(one, Int8Linear) for one in layers] != [
        path in exchanged for path in PATHS
    ]:
        return f"exchanged {sorted(replaced)}, expected {sorted(exchanged)}"
    for path, layer, weight, linear in zip(PATHS, layers, weights, linears, strict=True):
        x = torch.randn(3, c.k, generator=torch.Generator().manual_seed(c.seed)).to(c.dtype)
        if path not in exchanged:
            if layer is not linear:
                return f"{path} is another linear, expected the same object"
            continue
        if why := _called(c, layer, x, weight, on.device):
            return f"{path}: {why}"
    return _form(c, layers, linears) or (_removed(c, layers, weights, handles, counts, on.device) if handles else None)


def _linears(c: ModuleCase) -> list[torch.nn.Linear]:
    g, found = torch.Generator().manual_seed(c.seed + 1), []
    dtype = torch.float64 if c.kind == "float64" else c.bias or c.dtype
    for _ in range(2):
        linear = torch.nn.Linear(c.k, c.n, c.bias is not None, dtype=dtype).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
        if c.kind == "transposed":
            linear.weight.data = linear.weight.data.t().contiguous().t()
        if c.stored is not None:
            _store(c, linear, g)
        found.append(linear)
    if c.kind == "shared":
        return [found[0], found[0]]
    if c.kind in ("tied", "half tied"):
        found[1].weight = found[0].weight
    if c.kind == "attributes":
        for number, linear in enumerate(found):
            linear.train(number == 0)
            linear.note = f"note {number}"  # type: ignore[assignment]
            linear.register_buffer("table", torch.full((2,), float(number)))
            linear.register_parameter("factor", torch.nn.Parameter(torch.full((3,), float(number))))
    return found


def _store(c: ModuleCase, linear: torch.nn.Linear, g: torch.Generator) -> None:
    """Give `linear` a stored weight, and scales beside it. Some scales are negative."""
    shape = {"one": (), "rows": (c.n,), "column": (c.n, 1), "blocks": (-(-c.n // BLOCK[0]), -(-c.k // BLOCK[1]))}
    whole = torch.randint(-127, 128, (c.n, c.k), generator=g)
    linear.weight = torch.nn.Parameter(whole.to(c.stored), requires_grad=False)
    setattr(linear, c.name, torch.randn(shape[c.kind], generator=g) * 0.01)
    if c.kind == "blocks":
        linear.block_size = list(BLOCK)  # type: ignore[assignment]


def _integers(c: ModuleCase, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 weight of linear `number` in another class, and its row scales or largest numbers."""
    g = torch.Generator().manual_seed(c.seed + 10 + number)
    return torch.randint(-127, 128, (c.n, c.k), generator=g).to(torch.int8), torch.rand(c.n, generator=g) + 0.5


def _wrap(c: ModuleCase, linears: list[torch.nn.Linear], device: str) -> None:
    """Give linears on `device` weights of another class. A move to a device would lose it."""
    for number, linear in enumerate(linears):
        whole, rows = (part.to(device) for part in _integers(c, number))
        if c.kind == "bitsandbytes":
            params = _Int8Params(whole, requires_grad=False)
            params.SCB = rows
            linear.weight = params
        elif c.kind == "tensor class":
            wrapped = _Quantized(torch.zeros(c.n, c.k, device=device), requires_grad=False)
            wrapped.qdata, wrapped.scale = whole, rows[:, None]
            linear.weight = wrapped


def _quantized(c: ModuleCase, linear: torch.nn.Linear, number: int) -> Weight:
    """The expected int8 weight, scales and bias."""
    bias = None if linear.bias is None else linear.bias.detach().clone()
    bias = bias.float() if bias is not None and bias.dtype is torch.float64 else bias
    if c.kind in ("bitsandbytes", "tensor class"):
        whole, rows = _integers(c, number)
        return whole, rows / torch.full((), 127.0) if c.kind == "bitsandbytes" else rows, bias
    weight = linear.weight.detach().contiguous()
    if c.stored is None:
        return *reference.quantize(weight), bias
    scale = getattr(linear, c.name)
    if c.kind == "blocks":
        rows, columns = (torch.arange(extent) // block for extent, block in zip((c.n, c.k), BLOCK, strict=True))
        factors = scale[rows][:, columns]
    else:
        factors = scale.reshape(-1, 1).expand(c.n, 1)
    if c.stored is torch.int8:
        return weight, factors[:, 0].contiguous(), bias
    return *reference.quantize(weight.float() * factors), bias


def _hook(linear: torch.nn.Linear, counts: list[str]) -> Iterator[Any]:
    """The handles of a hook of every kind: x is doubled twice; the output gains 1 and is doubled."""

    def count(name: str) -> Callable[..., None]:
        return lambda *_: counts.append(name)

    yield linear.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    yield linear.register_forward_pre_hook(lambda _, args, more: ((args[0] * 2,), more), with_kwargs=True)
    yield linear.register_forward_hook(lambda _, args, y: y + 1)
    yield linear.register_forward_hook(lambda _, args, more, y: y * 2, with_kwargs=True)
    yield linear.register_forward_hook(count("always"), always_call=True)
    yield linear.register_full_backward_pre_hook(count("backward"))
    yield linear.register_full_backward_hook(count("backward"))


def _called(c: ModuleCase, layer: torch.nn.Module, x: torch.Tensor, weight: Weight, device: str) -> str | None:
    """How the output of one layer differs, or None."""
    hooked = c.kind == "hooks"
    want = reference.linear(x * 4 if hooked else x, *weight)
    with torch.no_grad():
        got = layer(x.to(device)).cpu()
    want = (want + 1) * 2 if hooked else want
    if got.dtype is not want.dtype or got.shape != want.shape:
        return f"{got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    return bitwise_diff(got, want)


def _form(c: ModuleCase, layers: list[torch.nn.Module], linears: list[torch.nn.Linear]) -> str | None:
    """How the layers share or carry other things than they should, or None."""
    first, second = layers
    if (first is second) is not (c.kind == "shared"):
        return f"{'one layer' if first is second else 'two layers'} in both places, expected the opposite"
    if (first.weight is second.weight) is not (c.kind in ("shared", "tied", "half tied")):
        return f"{'one weight' if first.weight is second.weight else 'two weights'}, expected the opposite"
    for layer, linear in zip(layers, linears, strict=True):
        if layer.training is not linear.training:
            return f"training is {layer.training}, expected {linear.training}"
        if c.kind != "attributes":
            continue
        for name in ("note", "table", "factor"):
            if getattr(layer, name, None) is not getattr(linear, name):
                return f"the layer lacks the linear's own {name}"
        if {"table", "factor"} - set(layer.state_dict()):
            return "the state dict of the layer lacks the linear's own tensors"
    return None


def _removed(
    c: ModuleCase,
    layers: list[torch.nn.Module],
    weights: list[Weight],
    handles: list[Any],
    counts: list[str],
    device: str,
) -> str | None:
    """Whether hooks were not called, or stay after their handles removed them, as text, or None."""
    if counts != ["always"] * len(layers):
        return f"the hooks were called as {counts}, expected one `always` for each layer"
    x = torch.ones(2, c.k, dtype=c.dtype, device=device, requires_grad=True)
    layers[0](x).sum().backward()
    if counts.count("backward") != 2:
        return f"{counts.count('backward')} hooks of the backward were called, expected 2"
    with contextlib.suppress(ShapeError):
        layers[0](torch.ones(2, c.k + 1, dtype=c.dtype, device=device))
    if counts.count("always") != len(layers) + 2:
        return "a hook that is always called was not called when the forward raised"
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        got = layers[0](x).cpu()
    why = bitwise_diff(got, reference.linear(x.detach().cpu(), *weights[0]))
    return why and f"after the hooks were removed: {why}"


def examples() -> st.SearchStrategy[ModuleCase]:
    """Strategy for cases of every kind."""
    dtypes = {"dtype": st.sampled_from(OUT_DTYPES), "bias": st.sampled_from((None, *OUT_DTYPES))}
    more = {"call": st.sampled_from(CALLS), "k": st.integers(1, 70), "n": st.integers(1, 30), "seed": st.integers(0, 7)}
    plain = st.builds(ModuleCase, kind=st.sampled_from(KINDS), **dtypes, **more)
    stored = st.builds(
        ModuleCase, kind=st.sampled_from(SCALED), stored=st.sampled_from(STORED), name=st.sampled_from(NAMES),
        **dtypes, **more,
    )  # fmt: skip
    return plain | stored.filter(lambda c: c.kind != "blocks" or c.stored is not torch.int8)


def always() -> Iterator[ModuleCase]:
    """Each kind and each form of scales, with and without biases, by each call."""
    for call in CALLS:
        for bias in (None, torch.float32, torch.bfloat16):
            for kind in KINDS:
                yield ModuleCase(kind, torch.float32, bias, call=call)
            for stored in STORED:
                for kind in SCALED[: 3 if stored is torch.int8 else 4]:
                    yield ModuleCase(kind, torch.bfloat16, bias, stored, call)
        yield from (ModuleCase("rows", torch.float32, None, torch.int8, call, name) for name in NAMES[1:])
        yield from (ModuleCase("plain", dtype, dtype, call=call, n=33, k=17) for dtype in OUT_DTYPES)
