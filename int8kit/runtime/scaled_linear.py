"""Base of linears that hold a weight of few bits and one fp32 scale per output channel, beside `Int8Linear`.

    weight [N, K] of `weight_dtype`, weight_scale [N] fp32, bias [N] or None;  w[n, k] = weight[n, k] * weight_scale[n]

These layers are the other variants of `int8kit.runtime.variants`. They have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch

from int8kit.errors import InputError, ShapeError
from int8kit.operand_checks import FLOATS

_AT_ONCE = 1 << 26  # elements of a float weight that are quantized together: bounds the temporary copies


def rows_of(x: torch.Tensor, k: int) -> torch.Tensor:
    """x [..., K] -> [M, K] with contiguous rows. Raises ShapeError for another K or for no float of 16 or 32 bits."""
    if x.dim() < 1 or x.shape[-1] != k:
        raise ShapeError(f"x {tuple(x.shape)}: expected [..., {k}], the in_features of the layer")
    if x.dtype not in FLOATS:
        raise ShapeError(f"x {x.dtype}: expected {' or '.join(map(str, FLOATS))}; cast it first")
    return x.reshape(-1, k).contiguous()


class ScaledLinear(torch.nn.Linear):
    """A linear with a weight of `weight_dtype` and fp32 scales. A subclass quantizes, and multiplies.

    x: [..., K] bf16, fp16 or fp32 -> [..., N] of x's dtype. A new layer gives NaN until it is loaded. A cast such as
    `.half()` changes the bias alone.
    """

    weight_dtype: ClassVar[torch.dtype]
    weight: torch.nn.Parameter  # [N, K] of weight_dtype, without a gradient
    weight_scale: torch.Tensor  # [N] fp32
    bias: torch.nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise ShapeError(f"a weight [{out_features}, {in_features}]: expected at least 1 of each")
        torch.nn.Module.__init__(self)  # that of nn.Linear makes a float weight
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=self.weight_dtype, device=device)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", torch.full((out_features,), torch.nan, device=device, dtype=torch.float32))
        filled = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if filled is None else torch.nn.Parameter(filled, requires_grad=False)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Self:
        """Quantize a float weight [N, K], where it lies. The bias [N] is kept.

        Raises ShapeError for a weight that is no matrix, and InputError for one that is not finite.
        """
        if weight.dim() != 2:
            raise ShapeError(f"weight {tuple(weight.shape)}: expected [N, K]")
        with torch.device("meta"):
            layer = cls(weight.shape[1], weight.shape[0], bias is not None)
        weight = weight.detach()
        rows = max(1, _AT_ONCE // weight.shape[1])
        parts = [cls.quantize_weight(block) for block in weight.split(rows)]
        scale = torch.cat([s for _, s in parts])
        if bad := int((~scale.isfinite()).sum()):
            raise InputError(f"{bad} of {len(scale)} rows of the weight hold a NaN or an infinity; load it again")
        layer.weight = torch.nn.Parameter(torch.cat([q for q, _ in parts]), requires_grad=False)
        layer.weight_scale = scale
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @staticmethod
    def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A float weight [N, K] -> the same of `weight_dtype`, and its scales [N] fp32."""
        raise NotImplementedError

    def dequantized(self) -> torch.Tensor:
        """The weight [N, K] in bf16: the product in fp32, rounded once."""
        w = self.weight.to(torch.bfloat16)  # exact: bf16 holds every int8 and every e4m3 number
        return w.mul_(self.weight_scale[:, None])

    def bias_as(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias in the dtype of a product, or None."""
        return None if self.bias is None else self.bias.to(dtype)

    def reset_parameters(self) -> None:
        """Raise InputError: torch would fill the weight with floats."""
        raise InputError("a quantized layer has no initial values: load a state dict, or call from_weight")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = self.weight, self.weight_scale

        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            """`fn`, but the weight and its scales keep dtype and values when a model is cast, and follow its device."""
            made = fn(tensor)
            if tensor is self.weight_scale and tensor.is_meta and not made.is_meta:
                return torch.full_like(tensor, torch.nan, device=made.device)  # of to_empty: as in a new layer
            cast = made.dtype is not tensor.dtype and any(tensor is one for one in kept)
            return tensor.to(made.device) if cast else made

        return super()._apply(without_cast, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        expected = {"weight": self.weight_dtype, "weight_scale": torch.float32}
        for name, dtype in expected.items():
            found = state_dict.get(prefix + name)
            if isinstance(found, torch.Tensor) and found.dtype is not dtype:
                raise InputError(f"{prefix}{name} is {found.dtype}: expected {dtype}; quantize it with from_weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Text for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
