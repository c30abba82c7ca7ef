"""Tensors of a checkpoint on their way into a model with INT8 layers, one tensor at a time.

A file holds, for each linear:

    <name>.weight float                         quantized on arrival, if the layer is INT8
    <name>.weight int8, <name>.weight_scale     kept as they are
    <name>.weight fp8, <name>.weight_scale      weight x scale in float32, then as a float weight

The official layout of Ideogram 4 has other names: `qkv` stands for `to_q`, `to_k`, `to_v`, and `o` for `to_out.0`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import torch

from int8kit import ops
from int8kit.errors import FileError, InputError
from int8kit.integrations.config import linears
from int8kit.layers import Int8Linear

FUSED = {"qkv": ("to_q", "to_k", "to_v"), "o": ("to_out.0",)}
"""Last part of a linear's name in the official layout, and the names in diffusers, in the order of the rows."""
SCALE = "weight_scale"
BASE = ".base_layer."  # part of the name of each tensor under an adapter of peft
WITHOUT_LORA = (
    "expected a model without adapters; call pipe.unload_lora_weights() before save_pretrained, after "
    "pipe.fuse_lora() to keep the effect"
)
AT_A_TIME = 1 << 22  # elements of a weight: a CPU needs some 20 bytes for each while it quantizes
NOTE = "comfy_quant"  # ComfyUI's description of a linear, JSON as bytes
_OF_QUANTIZATION = re.compile(r"scale|absmax|quant|zero_point|smooth|^w[qs]$", re.IGNORECASE)


def describes_weight(key: str) -> bool:
    """Whether the last part of a tensor's name is one of a scale, or of other data that a weight is read with."""
    return bool(_OF_QUANTIZATION.search(key.rpartition(".")[2]))


def replace(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Put an Int8Linear on the meta device in the place of each named linear, everywhere it is used."""
    found = linears(model)
    made: dict[int, Int8Linear] = {}
    wanted = {id(found[name]): found[name] for name in names}
    for name, linear in found.items():
        if id(linear) in wanted:
            if id(linear) not in made:
                made[id(linear)] = Int8Linear(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    device="meta",
                    dtype=linear.weight.dtype,
                )
                made[id(linear)].train(linear.training)
            model.set_submodule(name, made[id(linear)])


def dequantize_layers(model: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace each Int8Linear by an nn.Linear of weight x scale. dtype: None takes that of the model's floats."""
    if dtype is None:
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(floats, torch.float32)
    made: dict[int, torch.nn.Linear] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if type(layer) is not Int8Linear:
            continue
        if id(layer) not in made:
            with torch.device("meta"):
                linear = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
            linear.weight = torch.nn.Parameter(_expanded(layer.weight, layer.weight_scale).to(dtype))
            if layer.bias is not None:
                linear.bias = torch.nn.Parameter(layer.bias.detach().to(dtype))
            made[id(layer)] = linear.train(layer.training)
        model.set_submodule(name, made[id(layer)])


def names_of(names: Iterable[str], most: int = 20) -> str:
    """Names for a message: the first ones, and how many follow."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


class Loader:
    """Reads the tensors of a checkpoint into a model whose INT8 layers are in place.

    int8: names of the INT8 layers. ours: whether the files come from `save_pretrained`, and so hold int8 weights.
    keys: names of all tensors in the files. After `check`, each file's tensors pass `read`, then `create`.
    """

    def __init__(self, model: torch.nn.Module, int8: Iterable[str], keys: Iterable[str], ours: bool) -> None:
        self.int8, self.ours = set(int8), ours
        self.modules = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
        self.rows = {
            name: module.out_features
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, torch.nn.Linear)
        }
        self.expected = set(model.state_dict())
        self.keys = [target for key in keys for target, _ in self.targets(key)]
        self.scaled = {key.removesuffix(f".{SCALE}") for key in self.keys if key.endswith(f".{SCALE}")}
        self.scales: dict[str, torch.Tensor] = {}
        self.held: dict[str, torch.Tensor] = {}  # weights whose scale is in a file that comes later

    def targets(self, key: str) -> list[tuple[str, slice | None]]:
        """The model's tensors that a tensor of a file becomes, and their rows in it; None stands for all rows."""
        module, _, leaf = key.rpartition(".")
        parent, _, last = module.rpartition(".")
        names = [f"{parent}.{part}" for part in FUSED.get(last, ())]
        if module in self.modules or not names or not all(name in self.rows for name in names):
            return [(key, None)]
        if len(names) == 1:
            return [(f"{names[0]}.{leaf}", None)]
        found: list[tuple[str, slice | None]] = []
        start = 0
        for name in names:
            found.append((f"{name}.{leaf}", slice(start, start + self.rows[name])))
            start += self.rows[name]
        return found

    def unread(self) -> list[str]:
        """Names of tensors that the model has no place for, in the names of the model."""
        read = {f"{name}.{leaf}" for name in self.rows for leaf in (SCALE, NOTE)}
        return [key for key in self.keys if key not in self.expected and key not in read]

    def loaded(self) -> list[str]:
        """Names of the model's tensors in the files, then the names that the model has no place for."""
        return [*dict.fromkeys(key for key in self.keys if key in self.expected), *self.unread()]

    def check(self) -> None:
        """Raise FileError for tensors that are missing, and for scales that nothing reads."""
        if adapted := [key for key in self.keys if BASE in key and key not in self.expected]:
            raise FileError(f"the files hold {adapted[0]!r}, which was saved under a LoRA: {WITHOUT_LORA}")
        made = set() if self.ours else {f"{name}.{SCALE}" for name in self.int8 - self.scaled}
        missing = self.expected - set(self.keys) - made
        if missing:
            raise FileError(f"the files lack {names_of(missing)}; expected all tensors of the model")
        strange = [key for key in self.unread() if describes_weight(key) or self._owner(key) in self.rows]
        if strange:
            raise FileError(
                f"the files hold tensors of another layout: {names_of(strange)}; expected weight, "
                f"{SCALE} and bias for each linear"
            )

    def _owner(self, key: str) -> str:
        return key.rpartition(".")[0]

    def read(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of one file under the model's names, without scales. Raises FileError for a wrong dtype.

        A weight whose scale has not come yet is held back. It returns with the file that has the scale.
        """
        found: dict[str, torch.Tensor] = {}
        for key, tensor in tensors.items():
            for name, rows in self.targets(key):
                whole = rows is None or tensor.numel() == 1 or name.endswith(f".{NOTE}")
                found[name] = tensor if whole else self._third(key, tensor, rows)
        for name in [name for name in found if name.endswith(f".{NOTE}")]:
            _check_note(name, found.pop(name))
        for module in self.scaled & {self._owner(name) for name in found if name.endswith(f".{SCALE}")}:
            self.scales[module] = self._scale(module, found.pop(f"{module}.{SCALE}"))
        self._check_dtypes(found)
        self.held.update({name: found.pop(name) for name in list(found) if self._waits(name)})
        found.update({name: self.held.pop(name) for name in list(self.held) if not self._waits(name)})
        return found

    def _third(self, key: str, tensor: torch.Tensor, rows: slice | None) -> torch.Tensor:
        total = sum(self.rows[self._owner(name)] for name, _ in self.targets(key))
        if rows is None or tensor.shape[0] != total:
            raise FileError(f"{key} has shape {list(tensor.shape)}; expected {total} rows, for q, k and v")
        return tensor[rows]

    def _scale(self, module: str, scale: torch.Tensor) -> torch.Tensor:
        rows = self.rows[module]
        if scale.numel() not in (1, rows) or scale.numel() != max([1, *scale.shape]):
            raise FileError(
                f"{module}.{SCALE} has shape {list(scale.shape)}; expected one scale, or {rows}, one for each row"
            )
        if not scale.is_floating_point() or (self.ours and scale.dtype is not torch.float32):
            raise FileError(f"{module}.{SCALE} is {scale.dtype}; expected torch.float32; save the model again")
        return scale.float().reshape(-1).expand(rows).clone()  # not a view of the file, which may be written again

    def _waits(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf == "weight" and module in self.scaled and module not in self.scales

    def _check_dtypes(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raise FileError, with all names, for weights in another dtype than their scales ask for."""
        of_int8 = {f"{name}.weight" for name in self.int8}
        if self.ours:
            wrong = [name for name, t in tensors.items() if name in of_int8 and t.dtype is not torch.int8]
            if wrong:
                raise FileError(
                    f"INT8 weights are stored as {tensors[wrong[0]].dtype}: {names_of(wrong)}; expected "
                    "torch.int8; save the model again"
                )
        scaled = {f"{name}.weight" for name in self.scaled}
        plain = {f"{name}.{leaf}" for name in self.rows for leaf in ("weight", "bias")} - scaled
        wrong = [name for name, t in tensors.items() if name in plain and not t.is_floating_point()]
        if wrong:
            raise FileError(
                f"weights are {tensors[wrong[0]].dtype} without a scale: {names_of(wrong)}; expected "
                f"floats, or torch.int8 with {SCALE}"
            )
        wrong = [n for n, t in tensors.items() if n in scaled and t.dtype is not torch.int8 and t.element_size() != 1]
        if wrong:
            raise FileError(
                f"weights are {tensors[wrong[0]].dtype} with a scale: {names_of(wrong)}; expected "
                "torch.int8 or 8-bit floats"
            )

    def handles(self, name: str) -> bool:
        """Whether `create` is to set this tensor: the weight of an INT8 layer, or a weight with a scale."""
        module, _, leaf = name.rpartition(".")
        return leaf == "weight" and (module in self.int8 or module in self.scaled)

    def create(self, model: torch.nn.Module, name: str, value: torch.Tensor, device: Any, dtype: torch.dtype) -> None:
        """Set a weight. value: the tensor that `read` returned for it. Only this weight is expanded to float."""
        module = self._owner(name)
        layer, scale = model.get_submodule(module), self.scales.pop(module, None)
        if module in self.int8:
            if value.dtype is torch.int8 and scale is not None:
                weight, scale = value.to(device, copy=True), scale.to(device)
            else:
                weight, scale = quantized(value, scale, device)
            layer.weight_scale = scale
        else:
            weight = _expanded(value.to(device), scale).to(dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=module not in self.int8)

    def finish(self, model: torch.nn.Module) -> None:
        """Raise FileError if a tensor of the model was not set."""
        unset = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if self.held or unset:
            raise FileError(
                f"tensors were not set: {names_of({*self.held, *unset})}; expected files with them, and no "
                "offload_state_dict"
            )
        self.scales.clear()


def quantized(
    weight: torch.Tensor, scale: torch.Tensor | None = None, device: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`int8kit.quantize` of weight x scale on `device`: int8 [N, K] and scales [N]. Few rows are floats at a time.

    weight: floats or fp8 [N, K]. scale: float32 [N] or None. The rows do not depend on each other.
    """
    device = weight.device if device is None else device
    rows = max(1, AT_A_TIME // max(1, weight.shape[1]))
    made = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=device)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        floats = _expanded(weight[part].to(device), None if scale is None else scale[part])
        made[part], scales[part] = ops.quantize(floats)
    return made, scales


def _expanded(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A weight as floats that `ops.quantize` takes, times its scale for each row."""
    if scale is not None:
        return weight.float() * scale.to(weight.device)[:, None]
    wide = weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return (weight if wide else weight.float()).contiguous()


def _check_note(name: str, note: torch.Tensor) -> None:
    """Raise InputError for a rotated linear. note: ComfyUI's JSON, as bytes."""
    try:
        settings = json.loads(bytes(note.tolist()))
        rotated = bool(settings.get("convrot"))
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{name} holds no JSON object; expected ComfyUI's description of a linear") from error
    if rotated:
        raise InputError(f"{name} describes a rotated weight (convrot); expected weights that are not rotated")
