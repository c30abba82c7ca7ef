"""NF4 linears of bitsandbytes: blocks of 64, fp32 maxima, bf16 products. Importing this module loads bitsandbytes."""

from __future__ import annotations

import bitsandbytes
import torch

from int8kit.errors import InputError
from int8kit.foreign_weights import four_bits
from int8kit.runtime.scaled_linear import rows_of

BLOCK = 64


class NF4Linear(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' Linear4bit with the checks of our layers, and with a CPU path for every shape.

    x: [..., K] bf16, fp16 or fp32 -> [..., N] of x's dtype. Raises ShapeError for another K.
    """

    @classmethod
    def from_weight(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device | str | None = None
    ) -> NF4Linear:
        """Quantize a float weight [N, K] on `device`. bitsandbytes starts from bf16. Raises InputError for a NaN."""
        settings = {"compress_statistics": False, "quant_type": "nf4"}
        n, k = weight.shape
        layer = cls(k, n, bias is not None, torch.bfloat16, device="meta", **settings)
        data = weight.detach().to(weight.device if device is None else device, torch.bfloat16)
        if not bool(data.isfinite().all()):
            raise InputError("the weight holds a NaN or an infinity in bf16; load it again")
        layer.weight = bitsandbytes.nn.Params4bit(data, False, blocksize=BLOCK, module=layer, **settings).to(
            data.device
        )
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach().to(data.device), requires_grad=False)
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., K] -> [..., N] of its dtype."""
        x = rows_of(input, self.in_features)
        if input.is_cuda:
            y: torch.Tensor = super().forward(x)
        else:  # the library's CPU kernels refuse some N, and read blocks that cross a row wrongly
            bf16 = torch.bfloat16
            bias = None if self.bias is None else self.bias.to(bf16)
            y = torch.nn.functional.linear(x.to(bf16), four_bits(self.weight.data, self.weight.quant_state), bias)
        return y.to(input.dtype).reshape(*input.shape[:-1], self.out_features)
