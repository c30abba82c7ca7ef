"""The property `layers`: an INT8 layer computes the reference's linear of the weights and biases that it was made of.

    made          from                                       expected
    from_linear   one float linear                           `reference.linear` of its quantized weight
    from_int8     an int8 weight, its scales and its bias    the same
    joined        several linears                            their outputs side by side
    from_linears  a gate and an up                           `reference.linear_swiglu` of the rows in turn

A part without a bias beside parts with one has a bias of zeros. Afterwards the layer may be cast, copied, or loaded
from a state dict or a pickle, also of an earlier version or with scales of another dtype. A cast changes the bias
alone. A layer that was not loaded gives NaN. The expected weight never passes through the layer.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from int8kit import reference
from int8kit.layers import Int8Linear, Int8SwiGLU
from int8kit.lookup import Plan
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.examples.strategies import OUT_DTYPES
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation

MADE = ("from_linear", "from_int8", "joined", "from_linears")
UNLOADED = ("new", "to_empty")
LOADED = ("state dict", "old names", "float64 scales", "bfloat16 scales")
STEPS = ("", "cast", "copy", "pickle", "old pickle", *LOADED, *UNLOADED)
Biases = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class LayerCase:
    """One layer, and one call of it."""

    made: str  # of MADE
    biases: Biases  # of each part; its linears are in that dtype, or in `dtype` without a bias
    rows: tuple[int, ...]  # the shape of x without K
    k: int
    n: int  # rows of the weight of the first part; `joined` has one row more in each further part
    dtype: torch.dtype  # of x
    step: str = ""  # one of STEPS
    seed: int = 0

    def __str__(self) -> str:
        biases = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.biases)
        return (
            f"{self.made} of parts with biases ({biases}), rows {list(self.rows)}, N = {self.n}, K = {self.k}, "
            f"{str(self.dtype).removeprefix('torch.')}, seed {self.seed}{f', then {self.step}' if self.step else ''}"
        )


def check(c: LayerCase, on: Executor | Implementation) -> str | None:
    """How the output of the layer, or its form, differs from the expected one, or None."""
    linears = _linears(c)
    x = torch.randn(*c.rows, c.k, generator=torch.Generator().manual_seed(c.seed)).to(c.dtype)
    wq, sw, bias = _weight(c, linears)
    if c.step == "cast" and bias is not None:
        bias = bias.to(torch.float16)
    if c.step == "bfloat16 scales":
        sw = sw.bfloat16().float()
    swiglu = c.made == "from_linears"
    want = (reference.linear_swiglu if swiglu else reference.linear)(x, wq, sw, bias)
    want = torch.full_like(want, torch.nan) if c.step in UNLOADED else want
    layer = _after(c, _layer(c, linears).to(on.device), on.device)
    if (layer.bias is None) is not (bias is None):
        return f"the layer has {'no' if layer.bias is None else 'a'} bias, expected the opposite"
    if (layer.in_features, layer.out_features) != (c.k, len(wq)):
        return f"{layer.in_features} to {layer.out_features} features, expected {c.k} to {len(wq)}"
    with torch.no_grad():
        got = layer(x.to(on.device)).cpu()
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return f"{got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    return bitwise_diff(got, want)


def _linears(c: LayerCase) -> list[torch.nn.Linear]:
    """The float linears of which the layer is made."""
    g, found = torch.Generator().manual_seed(c.seed + 1), []
    for number, dtype in enumerate(c.biases):
        n = c.n + number if c.made == "joined" else c.n
        linear = torch.nn.Linear(c.k, n, dtype is not None, dtype=dtype or c.dtype).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
        found.append(linear)
    return found


def _weight(c: LayerCase, linears: list[torch.nn.Linear]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The int8 weight, its scales and the bias of the whole layer."""
    parts = [reference.quantize(linear.weight) for linear in linears]
    biases = [torch.zeros(one.out_features) if one.bias is None else one.bias.detach() for one in linears]
    whole = None if all(one.bias is None for one in linears) else biases
    put: Callable[[list[torch.Tensor]], torch.Tensor] = _in_turn if c.made == "from_linears" else torch.cat
    return put([wq for wq, _ in parts]), put([sw for _, sw in parts]), None if whole is None else put(whole)


def _in_turn(two: list[torch.Tensor]) -> torch.Tensor:
    """The rows of a gate and of an up in turn, in the dtype that holds both."""
    gate, up = two
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return torch.stack((gate.to(dtype), up.to(dtype)), 1).flatten(0, 1)


def _layer(c: LayerCase, linears: list[torch.nn.Linear]) -> Int8Linear:
    if c.made == "from_int8":
        return Int8Linear.from_int8(*_weight(c, linears))
    if c.made == "from_linears":
        gate, up = linears
        return Int8SwiGLU.from_linears(gate, up)
    return Int8Linear.joined(linears) if c.made == "joined" else Int8Linear.from_linear(linears[0])


def _after(c: LayerCase, layer: Int8Linear, device: str) -> Int8Linear:
    """`layer` after the step of the case."""
    if c.step == "cast":
        return layer.to(torch.float16)
    if c.step == "copy":
        return copy.deepcopy(layer)
    if c.step in (*LOADED, *UNLOADED):
        return _loaded(c, layer, device)
    if c.step == "pickle":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        loaded: Int8Linear = torch.load(file, weights_only=False)
        return loaded
    if c.step == "old pickle":
        old = {"wq": layer.weight.detach().clone(), "sw": layer.weight_scale, "bias": layer.bias}
        restored = type(layer).__new__(type(layer))
        restored.__setstate__({**vars(layer), "_buffers": old, "_parameters": {}, "plan": Plan()})
        return restored
    return layer


def _loaded(c: LayerCase, layer: Int8Linear, device: str) -> Int8Linear:
    """A new layer inside a module, loaded with the state of `layer` as the step says, or not loaded."""
    dtype = None if layer.bias is None else layer.bias.dtype
    place = "meta" if c.step == "to_empty" else device
    made = type(layer)(layer.in_features, layer.out_features, layer.bias is not None, place, dtype)
    if c.step in UNLOADED:
        return made.to_empty(device=device) if c.step == "to_empty" else made
    state = {f"inner.{name}": value for name, value in layer.state_dict().items()}
    if c.step == "old names":
        state |= {"inner.wq": state.pop("inner.weight"), "inner.sw": state.pop("inner.weight_scale")}
    elif c.step.endswith(" scales"):
        state["inner.weight_scale"] = state["inner.weight_scale"].to(getattr(torch, c.step.removesuffix(" scales")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scales were rounded
        torch.nn.ModuleDict({"inner": made}).load_state_dict(state)
    return made


def _parts(made: str) -> Iterator[Biases]:
    """Parts with a bias, without one, and both."""
    if made in ("from_linear", "from_int8"):
        yield from ((dtype,) for dtype in (None, *OUT_DTYPES))
        return
    fp32, bf16 = torch.float32, torch.bfloat16
    yield from ((None, None), (fp32, fp32), (fp32, None), (None, bf16), (bf16, bf16), (fp32, bf16))
    if made == "joined":
        yield from ((bf16,), (None, fp32, None), (bf16, bf16, bf16))


def always() -> Iterator[LayerCase]:
    """Each way to make a layer, with each kind of bias, in each dtype of x, after each step."""
    for made in MADE:
        for biases in _parts(made):
            for dtype in OUT_DTYPES:
                yield LayerCase(made, biases, (3, 2), 40, 24, dtype)
            yield from (LayerCase(made, biases, (3,), 40, 24, torch.float32, step) for step in STEPS[1:])
        for rows in ((), (0,), (2, 0), (300,)):
            yield LayerCase(made, next(_parts(made)), rows, 17, 6, torch.bfloat16)


def examples() -> st.SearchStrategy[LayerCase]:
    """Strategy for cases of every kind."""
    return st.sampled_from(MADE).flatmap(
        lambda made: st.builds(
            LayerCase, made=st.just(made), biases=st.sampled_from(tuple(_parts(made))),
            rows=st.lists(st.integers(0, 5), max_size=3).map(tuple), k=st.integers(1, 70), n=st.integers(1, 30),
            dtype=st.sampled_from(OUT_DTYPES), step=st.sampled_from(STEPS), seed=st.integers(0, 7),
        )
    )  # fmt: skip
