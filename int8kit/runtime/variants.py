"""Variants of a transformer: the same pipeline with another kind of linear, so that times and errors compare.

    check(name)                                   the `Variant`, or UnknownName
    why_not(name, device, gpu)                    the reason why it cannot run here, or None
    remark(name, device, gpu)                     the reason why it runs in another way here than its line says, or None
    convert(transformer, name, quantizes, ...)    put its linears in place -> the new layers by name

Every variant leaves the same linears as they are: those that `quantizes` refuses. Importing this module and asking it
loads no torch, so that a mistake is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from int8kit.errors import InputError, Int8kitError, UnknownName

if TYPE_CHECKING:
    import torch

    from int8kit.gpus import Gpu
    from int8kit.lookup import Plan


@dataclass(frozen=True)
class Variant:
    """A kind of linear."""

    name: str
    description: str  # one line
    needs: str = ""  # a package, and its extra of int8kit in brackets


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("int8", "INT8 linears inside the fused forward"),
        Variant("bf16", "float linears, not quantized"),
        Variant("fp8", "e4m3 weights and activations, scales per row; without FP8 products, e4m3 weights alone"),
        Variant("nf4", "4-bit weights of bitsandbytes in blocks of 64, bf16 products", "bitsandbytes[nf4]"),
        Variant("fake-quant", "the operands of INT8, dequantized to bf16 before a bf16 product"),
        Variant("unfused", "INT8 linears, each with its own quantization, between the stock operations"),
    )
}
FP8_ARCH = 89
"""The first architecture whose tensor cores multiply FP8."""


def check(name: str) -> Variant:
    """The variant of this name. Raises UnknownName."""
    if name not in VARIANTS:
        raise UnknownName("variant", name, VARIANTS)
    return VARIANTS[name]


def why_not(name: str, device: torch.device, gpu: Gpu | None) -> str | None:
    """The reason, with its remedy, why the variant cannot run on `device`; None if it can.

    gpu: the record of a CUDA device, else None. Raises UnknownName. fp8 runs everywhere: see `remark`.
    """
    package, _, extra = check(name).needs.partition("[")
    if package and find_spec(package) is None:
        return f"variant {name} needs {package}, which is not installed; pip install 'int8kit[{extra}'"
    if device.type not in ("cpu", "cuda"):
        return f"variant {name} on {device.type}: expected a CPU or a CUDA device"
    if device.type == "cuda" and gpu is None:
        return f"variant {name} on {device}: no GPU is here; run on the CPU"
    return None


def remark(name: str, device: torch.device, gpu: Gpu | None) -> str | None:
    """The reason why the variant runs in another way on `device` than its line says; None if it does not.

    Loads torch where the record of the GPU cannot answer. Raises UnknownName.
    """
    if check(name).name != "fp8":
        return None
    path = "fp8 is weight-only here: weights are dequantized to bf16 at each call"
    if device.type != "cuda" or gpu is None:
        return f"{path}; a CPU has no FP8 products"
    if gpu.arch < FP8_ARCH:
        return f"{path}; {gpu.name} is sm_{gpu.arch}, and FP8 products need sm_{FP8_ARCH}"
    import torch

    from int8kit.runtime.float8_linear import has_products

    if not has_products(torch.cuda.current_device() if device.index is None else device.index):
        return f"{path}; this torch has no FP8 products with scales per row for sm_{gpu.arch}"
    return None


def convert(
    transformer: torch.nn.Module,
    variant: str,
    quantizes: Callable[[str], bool],
    plan: Callable[[int, int], Plan] | None = None,
    device: torch.device | str | None = None,
    *,
    compiled: bool = False,
) -> dict[str, torch.nn.Module]:
    """Replace the linears whose dotted name `quantizes` accepts, in place -> the new layers by name.

    plan: as in `replace_linears`, for int8 and unfused. device: where the new layers are made; default: where each
    weight is. compiled: FP8 activations are quantized by a kernel of torch.compile. A linear that cannot be replaced
    stays, as in `replace_linears`. bf16 replaces only weights that are packed or have scales, by bf16 ones.

    One float weight at a time is beside its new layer. So an error about the values of a weight leaves the linears
    before it converted: load the model again. Raises UnknownName, and InputError for a weight that cannot be read.
    """
    name = check(variant).name
    from int8kit.quantization import replace_linears

    if name in ("int8", "unfused"):
        return {**replace_linears(transformer, quantizes, plan, device)}
    make = _maker(name, device, compiled)
    return _replace_each(transformer, quantizes, make, packed_only=name == "bf16")


_Make = Callable[["torch.nn.Linear"], "torch.nn.Module"]


def _maker(name: str, device: torch.device | str | None, compiled: bool) -> _Make:
    """The function that makes a layer of a linear, on `device`."""
    import torch

    from int8kit import foreign_weights

    def operands(linear: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = foreign_weights.float_weight(linear, device)
        return weight, foreign_weights.bias_of(linear, weight.device)

    def bf16(linear: torch.nn.Linear) -> torch.nn.Module:
        weight, bias = operands(linear)
        with torch.device("meta"):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        layer.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.to(torch.bfloat16), requires_grad=False)
        return layer

    def fp8(linear: torch.nn.Linear) -> torch.nn.Module:
        from int8kit.runtime.float8_linear import Float8Linear

        layer = Float8Linear.from_weight(*operands(linear))
        layer.compiled = compiled
        return layer

    def nf4(linear: torch.nn.Linear) -> torch.nn.Module:
        from int8kit.runtime.nf4_linear import NF4Linear

        return NF4Linear.from_weight(*operands(linear))

    def fake_quant(linear: torch.nn.Linear) -> torch.nn.Module:
        from int8kit.runtime.fake_quant import FakeQuantLinear

        return FakeQuantLinear.from_weight(*operands(linear))

    return {"bf16": bf16, "fp8": fp8, "nf4": nf4, "fake-quant": fake_quant}[name]


def _replace_each(
    transformer: torch.nn.Module, quantizes: Callable[[str], bool], make: _Make, *, packed_only: bool
) -> dict[str, torch.nn.Module]:
    """Exchange one linear after the other, so that only one float weight is beside its new layer."""
    import torch

    from int8kit.quantization import Policy, chosen

    if not any(isinstance(module, torch.nn.Linear) for module in transformer.modules()):
        return {}
    replaceable = set(chosen(transformer, Policy(force=["*"])))
    plain = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    names: dict[int, list[str]] = {}  # of each linear, under all its names; the first one decides
    for name, module in transformer.named_modules(remove_duplicate=False):
        if name in replaceable:
            names.setdefault(id(module), []).append(name)
    done: dict[str, torch.nn.Module] = {}
    for first, *others in names.values():
        linear = transformer.get_submodule(first)
        if not isinstance(linear, torch.nn.Linear) or not quantizes(first):
            continue
        if packed_only and linear.weight.dtype in plain:
            continue
        try:
            layer = make(linear).train(linear.training)
        except Int8kitError as error:
            raise InputError(f"{first!r}: {error}") from error
        for name in (first, *others):
            parent, _, leaf = name.rpartition(".")
            transformer.get_submodule(parent)._modules[leaf] = layer
            done[name] = layer
    return done
