"""The error of INT8 in a model: each linear in INT8 is compared with the original, on the inputs that it gets there.

    compare("tiny", Case(256, 256, text_tokens=32))  ->  [Branch("cond", output=Distance(...), layers=[Layer(...)])]

For a layer with the output y, the INT8 output y' and the error e = y' - y:

    SQNR        10 log10(sum y^2 / sum e^2), decibels; 6 dB are one bit
    cosine      sum y y' / (|y| |y'|)
    max error   max |e| / max |y|
    saturated   share of the quantized input at +-127; by construction at least one of the K elements of each row

Each layer gets its input from the unchanged forward, so that its error excludes the errors of earlier layers. The
output of a branch comes from a whole INT8 forward, which accumulates all errors. Comparing every layer's output of both
forwards was rejected: a full-size model has 20 GB of them, and a late layer would mostly show the errors of early ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from int8kit import gpus, models, ops
from int8kit.errors import FileError
from int8kit.layers import Int8Linear
from int8kit.lookup import Plan
from int8kit.models import Case
from int8kit.quantization import replace_linears
from int8kit.runtime import ideogram4


@dataclass(frozen=True)
class Distance:
    """The distance of an INT8 result from the original."""

    sqnr_db: float  # infinite if the two are equal
    cosine: float
    max_error: float  # relative to the largest magnitude


@dataclass(frozen=True)
class Layer:
    """The error of one linear."""

    name: str
    n: int
    k: int
    rows: int
    error: Distance
    saturated: float  # share of the quantized input


@dataclass(frozen=True)
class Branch:
    """One transformer of the pipeline: the error of its output, and of its linears, the largest first."""

    name: str
    output: Distance
    layers: tuple[Layer, ...]


def error(original: torch.Tensor, changed: torch.Tensor) -> Distance:
    """The error of `changed`, which has the shape of `original`; sums are float64."""
    y, z = original.double(), changed.double()
    noise, signal = float((y - z).square().sum()), float(y.square().sum())
    ratio = signal / noise if noise else torch.inf
    sqnr = float(10 * torch.log10(torch.tensor(ratio))) if ratio else -torch.inf
    norm = float(y.norm() * z.norm())
    cosine = float((y * z).sum()) / norm if norm else 1.0
    top = float(y.abs().max())
    return Distance(sqnr, cosine, float((y - z).abs().max()) / top if top else 0.0)


def compare(
    model: str,
    case: Case,
    *,
    seed: int = 0,
    inputs: Path | None = None,
    on_layer: Callable[[int], None] = lambda total: None,
) -> list[Branch]:
    """The errors of both branches of `model`, on the GPU if there is one.

    model: "tiny", a folder in diffusers' layout, or a hub id. inputs: a file that `torch.save` wrote, with the keyword
    arguments of the two forwards, {"cond": {...}, "uncond": {...}}; without it, random inputs of `case`. on_layer:
    called after each layer with the number of all layers. Raises FileError or UnknownName.
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
        with _blaming(inputs if name in given else None):
            found.append(_branch(name, transformer, wanted[name], arguments, lambda: on_layer(total)))
        transformer.to("cpu")
    return found


def _branch(
    name: str, transformer: Any, wanted: list[str], arguments: dict[str, Any], step: Callable[[], None]
) -> Branch:
    layers: list[Layer] = []

    def compare_layer(layer: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def hook(linear: Any, args: Any, y: torch.Tensor) -> None:
            x = args[0].reshape(-1, linear.in_features).contiguous()
            int8 = Int8Linear.from_linear(linear, Plan())  # any configuration gives the same error
            q, _ = ops.quantize(x)
            saturated = float((q.abs() == 127).double().mean())
            layers.append(
                Layer(layer, linear.out_features, linear.in_features, len(x), error(y, int8(args[0])), saturated)
            )
            step()

        return hook

    hooks = [transformer.get_submodule(layer).register_forward_hook(compare_layer(layer)) for layer in wanted]
    with torch.no_grad():
        try:
            original = transformer(**arguments).sample
        finally:
            for hook in hooks:
                hook.remove()
        replace_linears(transformer, lambda layer: layer in set(wanted), lambda n, k: Plan())
        changed = transformer(**arguments).sample
    return Branch(name, error(original, changed), tuple(sorted(layers, key=lambda one: (one.error.sqnr_db, one.name))))


_REMEDY = 'torch.save({"cond": {...}, "uncond": {...}}, FILE) writes one: keyword arguments of the two forwards'


@contextlib.contextmanager
def _blaming(inputs: Path | None) -> Iterator[None]:
    """Raise an error of a forward as a FileError about its inputs. Without a file the error passes."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        if inputs is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise FileError(
            f"the forward refuses the inputs of {str(inputs)!r} ({models.first_line(error)}); {_REMEDY}"
        ) from error


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        raise FileError(f"cannot read inputs from {str(path)!r} ({models.first_line(error)}); {_REMEDY}") from None
    is_dict = isinstance(found, dict) and set(found) <= set(ideogram4.BRANCHES)
    if not is_dict or not all(isinstance(one, dict) and all(isinstance(k, str) for k in one) for one in found.values()):
        raise FileError(f"{str(path)!r} holds no inputs of cond and uncond; {_REMEDY}")
    return {branch: arguments for branch, arguments in found.items() if arguments}
