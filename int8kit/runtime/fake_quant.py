"""Fake quantization: the operands of `Int8Linear`, dequantized to bf16 before a bf16 product.

It has the error of INT8 and the time of bf16 plus the conversions. The paper's fused kernel starts from this path.
"""

from __future__ import annotations

import torch

from int8kit import ops
from int8kit.runtime.scaled_linear import ScaledLinear, rows_of


class FakeQuantLinear(ScaledLinear):
    """y = bf16(xq * sx) bf16(wq * sw)^T + b with the int8 operands and scales of `Int8Linear`.

    x: [..., K] bf16, fp16 or fp32 -> [..., N] of x's dtype. Each call dequantizes both operands; the product is bf16.
    """

    weight_dtype = torch.int8

    @staticmethod
    def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weight [N, K] -> int8 [N, K] and scales [N] fp32, as `int8kit.quantize`."""
        return ops.quantize((weight.float() if weight.dtype is torch.float64 else weight).contiguous())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., K] -> [..., N] of its dtype."""
        xq, sx = ops.quantize(rows_of(input, self.in_features))
        x = xq.to(torch.bfloat16).mul_(sx[:, None])
        y = torch.nn.functional.linear(x, self.dequantized(), self.bias_as(torch.bfloat16))
        return y.to(input.dtype).reshape(*input.shape[:-1], self.out_features)
