"""What INT8 does to a model, layer by layer: each linear in INT8 beside itself, on the inputs that the model gives it.

    compare("tiny", Case(256, 256, text_tokens=32))  ->  [Branch("cond", output=Error(...), layers=[Layer(...), ...])]

Per layer, with y what the layer gives and e what INT8 changes of it:

    SQNR        10 log10(sum y^2 / sum e^2), decibels: 6 more are a bit more
    cosine      sum y y' / (|y| |y'|)
    max error   max |e| / max |y|
    saturated   share of the quantized input at +-127: at least one in K of each row, by construction

A layer is judged on its own input of the unchanged forward, so that its error is its own; the branch's output is of a
whole INT8 forward, where errors meet. Keeping every layer's output of both forwards and comparing those was rejected: a
full-size model has 20 GB of them, and what a late layer shows there is mostly what early ones did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from int8kit import gpus, models, ops
from int8kit.errors import FileError
from int8kit.layers import Int8Linear, replace_linears
from int8kit.lookup import Plan
from int8kit.models import Case
from int8kit.runtime import ideogram4


@dataclass(frozen=True)
class Error:
    """How far an INT8 result is from its original."""

    sqnr_db: float  # infinite if nothing changed
    cosine: float
    max_error: float  # of the largest magnitude


@dataclass(frozen=True)
class Layer:
    """One linear."""

    name: str
    n: int
    k: int
    rows: int
    error: Error
    saturated: float  # share of the quantized input


@dataclass(frozen=True)
class Branch:
    """One transformer of the pipeline: its output after an INT8 forward, and its linears, the worst first."""

    name: str
    output: Error
    layers: tuple[Layer, ...]


def error(original: torch.Tensor, changed: torch.Tensor) -> Error:
    """Of two tensors of one shape; sums in float64."""
    y, z = original.double(), changed.double()
    noise, signal = float((y - z).square().sum()), float(y.square().sum())
    ratio = signal / noise if noise else torch.inf
    sqnr = float(10 * torch.log10(torch.tensor(ratio))) if ratio else -torch.inf
    norm = float(y.norm() * z.norm())
    cosine = float((y * z).sum()) / norm if norm else 1.0
    top = float(y.abs().max())
    return Error(sqnr, cosine, float((y - z).abs().max()) / top if top else 0.0)


def compare(
    model: str,
    case: Case,
    *,
    seed: int = 0,
    inputs: Path | None = None,
    on_layer: Callable[[int], None] = lambda total: None,
) -> list[Branch]:
    """Both branches of `model`, "tiny", a folder in diffusers' layout or a hub id, on the card if there is one.

    inputs: a file that `torch.save` wrote of {"cond": {...}, "uncond": {...}}, the forwards' keyword arguments; random
    ones of `case` without it. on_layer: called after each layer with the number of all. Raises FileError, UnknownName.
    """
    given = _read(inputs) if inputs else {}
    pipe = ideogram4.load(model)
    policy = models.MODELS["ideogram4"]
    device = torch.device("cpu" if gpus.present() is None else "cuda")
    parts = {name: getattr(pipe, part) for name, part in ideogram4.BRANCHES.items()}
    wanted = {
        name: [n for n, m in part.named_modules() if isinstance(m, torch.nn.Linear) and policy.quantizes(n)]
        for name, part in parts.items()
    }
    total = sum(map(len, wanted.values()))
    found = []
    for name, transformer in parts.items():
        torch.manual_seed(seed)
        arguments = given.get(name) or policy.inputs(transformer, replace(case, branch=name))
        arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        transformer.to(device)
        found.append(_branch(name, transformer, wanted[name], arguments, lambda: on_layer(total)))
        transformer.to("cpu")
    return found


def _branch(
    name: str, transformer: Any, wanted: list[str], arguments: dict[str, Any], step: Callable[[], None]
) -> Branch:
    layers: list[Layer] = []

    def judge(layer: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(linear: Any, args: Any, y: torch.Tensor) -> None:
            x = args[0].reshape(-1, linear.in_features).contiguous()
            int8 = Int8Linear.from_linear(linear)
            q, _ = ops.quantize(x)
            saturated = float((q.abs() == 127).double().mean())
            layers.append(
                Layer(layer, linear.out_features, linear.in_features, len(x), error(y, int8(args[0])), saturated)
            )
            step()

        return hook

    hooks = [transformer.get_submodule(layer).register_forward_hook(judge(layer)) for layer in wanted]
    with torch.no_grad():
        try:
            original = transformer(**arguments).sample
        finally:
            for hook in hooks:
                hook.remove()
        replace_linears(transformer, lambda layer: layer in set(wanted), lambda n, k: Plan())
        changed = transformer(**arguments).sample
    return Branch(name, error(original, changed), tuple(sorted(layers, key=lambda one: (one.error.sqnr_db, one.name))))


def _read(path: Path) -> dict[str, Any]:
    remedy = 'torch.save({"cond": {...}, "uncond": {...}}, FILE) writes one: keyword arguments of the two forwards'
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # pickle, zip and torch each have their own
        raise FileError(f"cannot read inputs from {str(path)!r} ({type(reason).__name__}); {remedy}") from None
    if not isinstance(found, dict) or not set(found) <= set(ideogram4.BRANCHES):
        raise FileError(f"{str(path)!r} holds no inputs of cond and uncond; {remedy}")
    return found
