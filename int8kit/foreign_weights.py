"""Int8 weights from linears of other libraries: bitsandbytes, torchao, quanto, fp8 and int8 with scales.

    why_left(linear)      ->  "" or the reason for which the weight alone does not define the linear
    quantized(linear)     ->  (weight [N, K] int8, weight_scale [N] fp32)
    float_weight(linear)  ->  weight [N, K] of floats

A weight that is int8 with a scale per output channel keeps its integers and its scales. Any other known format is
dequantized first. An unknown format is refused in one line, and never taken for a weight. No library is imported
unless the linear is of that library.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from int8kit import ops
from int8kit.errors import InputError

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
"""Names of a scale beside a weight, in checkpoints of torch, ComfyUI and transformers. Each is a factor."""
BESIDE = (*SCALES, "input_scale", "scale_input", "activation_scale", "comfy_quant")
"""Attributes of a linear that belong to its format, and not to an int8 layer."""
_SHIFTS = ("weight_zero_point", "zero_point", "qzeros", "pre_quant_scale")
_READABLE = {
    ("bitsandbytes", "Linear4bit"),
    ("bitsandbytes", "Linear8bitLt"),
    ("int8kit", "Int8Linear"),
    ("optimum", "QLinear"),
    ("transformers", "FP8Linear"),
}
"""Library and class of linears whose own forward computes x W^T + b with a weight that `quantized` reads."""
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_PLAIN = "load the model without quantization, or dequantize the weight"

Int8 = tuple[torch.Tensor, torch.Tensor]
"""A weight [N, K] int8 and its scales [N] fp32."""


def is_of(module: object, library: str, name: str) -> bool:
    """True if a class `name` of `library` is among the classes of `module`. Imports nothing."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == library for c in type(module).__mro__)


def why_left(module: torch.nn.Module) -> str:
    """The reason for which the weight alone does not define the output of `module`, with the remedy; "" for none."""
    kind = type(module).__name__
    if is_of(module, "peft", "BaseTunerLayer"):
        return f"{kind} of peft holds adapters: quantize its base_layer, or merge first with merge_and_unload()"
    if not isinstance(module, torch.nn.Linear):
        return f"{kind} is no torch.nn.Linear"
    if kind == "NonDynamicallyQuantizableLinear":
        return "MultiheadAttention reads the weight itself"
    owner: Any = next(c for c in type(module).__mro__ if "forward" in vars(c))
    if owner is not torch.nn.Linear and (owner.__module__.partition(".")[0], owner.__name__) not in _READABLE:
        return f"{kind} has an own forward"
    if "forward" in vars(module):
        hooked = getattr(vars(module).get("_old_forward"), "__func__", None)
        if "_hf_hook" not in vars(module) or hooked is not owner.forward:
            return "its forward was replaced on the instance: quantize before the other library hooks it"
    if module._modules:
        first = next(iter(module._modules))
        remedy = ": remove_parametrizations first" if first == "parametrizations" else ""
        return f"it holds the module {first!r}{remedy}"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters, as by weight_norm: remove that first"
    if isinstance(module.weight, torch.nn.parameter.UninitializedParameter):
        return "it is lazy and has no weight yet: run the model once first"
    return ""


def quantized(linear: torch.nn.Linear, device: torch.device | str | None = None) -> Int8:
    """The int8 weight [N, K] and the scales [N] fp32 of `linear`, on `device` if given.

    Raises InputError for a linear that `why_left` refuses, a weight on meta, an unknown format and a weight that is not
    finite.
    """
    found, device = _read(linear, device)
    if isinstance(found, torch.Tensor):
        _check_shape(linear, found)
        moved = found if device is None else found.to(device)
        wq, scale = ops.quantize((moved.float() if moved.dtype is torch.float64 else moved).contiguous())
    else:
        _check_shape(linear, found[0])
        wq, scale = (part if device is None else part.to(device) for part in found)
    if not bool(scale.isfinite().all()):
        rows = int((~scale.isfinite()).sum())
        raise InputError(f"{rows} of {len(scale)} rows of the weight hold a NaN or an infinity; load the weights again")
    return wq, scale


def float_weight(linear: torch.nn.Linear, device: torch.device | str | None = None) -> torch.Tensor:
    """The weight [N, K] of `linear` in bf16, fp16, fp32 or fp64, on `device` if given. Int8 with scales gives fp32.

    A plain weight on the same device is returned as it is, without a copy. Raises InputError as `quantized` does, but
    the values are not looked at.
    """
    found, device = _read(linear, device)
    if isinstance(found, torch.Tensor):
        _check_shape(linear, found)
        return found if device is None else found.to(device)
    _check_shape(linear, found[0])
    wq, scale = (part if device is None else part.to(device) for part in found)
    return wq * scale[:, None]


def _read(
    linear: torch.nn.Linear, device: torch.device | str | None
) -> tuple[torch.Tensor | Int8, torch.device | None]:
    """The weight of `linear` where it lies, in floats or in int8 with scales, and the checked `device`."""
    if reason := why_left(linear):
        raise InputError(f"cannot take the weight of this linear: {reason}")
    device = None if device is None else usable(device)
    weight = linear.weight.detach()
    if weight.is_meta:
        raise InputError("the weight is on the device meta and has no values; load or move the weights first")
    found = _bitsandbytes(linear)
    return (_beside(linear, weight) if found is None else found), device


def usable(device: torch.device | str) -> torch.device:
    """The device on which to quantize. Raises InputError for one that torch does not know or that is not here."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device = {device!r}: expected a device of this machine, such as 'cpu'; {reason}") from error
    if found.type == "meta":
        raise InputError("device = 'meta': expected a device with memory; the weights have no values there")
    return found


def bias_of(linear: torch.nn.Linear, device: torch.device) -> torch.Tensor | None:
    """The bias [N] of `linear` on `device`, float32 if it is float64, or None."""
    if linear.bias is None:
        return None
    bias = linear.bias.detach().to(device)
    return bias.float() if bias.dtype is torch.float64 else bias


def _check_shape(linear: torch.nn.Linear, weight: torch.Tensor) -> None:
    expected = (linear.out_features, linear.in_features)
    if tuple(weight.shape) != expected:
        raise InputError(
            f"a weight {list(weight.shape)} of {_name(weight.dtype)}: expected {list(expected)}, so it is packed; "
            + _PLAIN
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bitsandbytes(linear: torch.nn.Linear) -> torch.Tensor | Int8 | None:
    """The weight of a bitsandbytes linear; None for any other weight."""
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return four_bits(weight.data, state)
    if is_of(weight, "bitsandbytes", "Params4bit") and not weight.is_floating_point():
        raise InputError(f"a 4-bit weight of bitsandbytes without its quant_state: it cannot be read; {_PLAIN}")
    if is_of(weight, "bitsandbytes", "Int8Params") and weight.dtype is torch.int8:
        # the first forward moves the scales from the weight to the state
        rows = weight.SCB if weight.SCB is not None else getattr(getattr(linear, "state", None), "SCB", None)
        if rows is None:
            raise InputError(f"an 8-bit weight of bitsandbytes without its scales SCB: it cannot be read; {_PLAIN}")
        return _with_scale(linear, weight.data, rows.detach().to(weight.device).float() / 127)
    return None


def four_bits(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The float weight of a packed NF4 or FP4 weight, of the dtype and shape that its `quant_state` holds."""
    import bitsandbytes

    if packed.is_cuda or state.shape[-1] % state.blocksize == 0:
        full: torch.Tensor = bitsandbytes.functional.dequantize_4bit(packed, state)
        return full
    # On a CPU the library is wrong for rows that are not whole blocks: there, blocks run on through the rows.
    largest = state.absmax
    if state.nested:
        largest = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    pairs = packed.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1)[: state.shape.numel()].long()
    blocks = largest.float().repeat_interleave(state.blocksize)[: len(codes)]
    flat: torch.Tensor = state.code.float()[codes] * blocks
    return flat.reshape(state.shape).to(state.dtype)


def _beside(linear: torch.nn.Linear, weight: torch.Tensor) -> torch.Tensor | Int8:
    """The weight by its class, its dtype and the scales beside it."""
    _refuse_transformed(linear)
    if type(weight).dequantize is not torch.Tensor.dequantize or weight.is_quantized:
        return _subclass(weight)
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(weight) or weight.layout is not torch.strided:
        raise InputError(f"a weight of the class {type(weight).__name__} without dequantize(); {_PLAIN}")
    plain = weight.as_subclass(torch.Tensor)
    names = [name for name in SCALES if getattr(linear, name, None) is not None]
    found = f"a weight {list(plain.shape)} of {_name(plain.dtype)}"
    if plain.dtype in _FLOATS:
        if names:
            raise InputError(f"{found} with {names[0]} beside it; multiply the weight by it and remove it")
        return plain
    if plain.dtype not in (torch.int8, *_FP8):
        raise InputError(f"{found}: expected floats, or int8 or fp8 with a scale; {_PLAIN}")
    if len(names) != 1:
        raise InputError(
            f"{found} with {' and '.join(names) or 'no scale'}: expected one of {', '.join(SCALES)}; set it, or "
            + _PLAIN
        )
    return _with_scale(linear, plain, getattr(linear, names[0]))


def _refuse_transformed(linear: torch.nn.Linear) -> None:
    """Raise InputError for a weight that its layer does not use as it is: shifted, smoothed or rotated."""
    for name in _SHIFTS:
        if getattr(linear, name, None) is not None:
            raise InputError(f"a weight with {name} beside it: expected a scale only; {_PLAIN}")
    if getattr(linear.weight, "act_pre_scale", None) is not None:
        raise InputError(f"a weight with act_pre_scale, which scales the input: expected a scale only; {_PLAIN}")
    marked = getattr(linear, "comfy_quant", None)
    if isinstance(marked, torch.Tensor):
        try:
            rotated = json.loads(bytes(marked.flatten().tolist())).get("convrot")
        except (ValueError, AttributeError):
            raise InputError(f"comfy_quant beside the weight is no JSON object; {_PLAIN}") from None
        if rotated:
            raise InputError(f"a weight with convrot in comfy_quant is rotated; {_PLAIN}")


def _with_scale(linear: torch.nn.Linear, weight: torch.Tensor, scale: Any) -> torch.Tensor | Int8:
    """int8 with its scales where there is one for each row; else the float weight. weight: int8 or fp8."""
    _check_shape(linear, weight)
    n, k = weight.shape
    factor = torch.as_tensor(scale).detach().to(weight.device).float()
    block = getattr(linear, "block_size", None)
    if factor.numel() == 1:
        rows = factor.reshape(1).expand(n)
    elif factor.shape in ((n,), (n, 1)):
        rows = factor.reshape(n)
    elif block and factor.shape == (-(-n // block[0]), -(-k // block[1])):
        wide = factor.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
        return weight.float() * wide
    else:
        raise InputError(
            f"a scale {list(factor.shape)} for a weight {[n, k]}: expected one value, [{n}] or [{n}, 1]; {_PLAIN}"
        )
    if weight.dtype is torch.int8:
        return weight.contiguous(), rows.contiguous()
    return weight.float() * rows[:, None]


def _subclass(weight: Any) -> torch.Tensor | Int8:
    """The weight of a tensor class with an own dequantize(), as torchao and quanto have them."""
    try:
        full = weight.dequantize()
    except Exception as error:  # each class has its own errors
        raise InputError(
            f"a weight of the class {type(weight).__name__}: its dequantize() fails ({type(error).__name__}); {_PLAIN}"
        ) from error
    if type(full) is not torch.Tensor or full.dtype not in _FLOATS:
        raise InputError(f"a weight of the class {type(weight).__name__}: dequantize() gives no floats; {_PLAIN}")
    for data, scales in (("qdata", "scale"), ("_data", "_scale")):  # torchao; quanto
        wq, scale = getattr(weight, data, None), getattr(weight, scales, None)
        if not isinstance(wq, torch.Tensor) or not isinstance(scale, torch.Tensor) or wq.dtype is not torch.int8:
            continue
        if wq.shape == full.shape and (scale.numel() == 1 or scale.shape in (full.shape[:1], (len(full), 1))):
            rows = scale.detach().reshape(-1).expand(len(full))
            if torch.equal((wq * rows[:, None]).to(full.dtype), full):  # there is no shift and no other factor
                return wq.detach().contiguous(), rows.float().contiguous()
    return full
