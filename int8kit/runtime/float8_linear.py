"""FP8 linears: e4m3 weights with one scale per output channel, and e4m3 activations with one scale per token.

    quantize_rows_e4m3(x)         x [M, K] -> q [M, K] e4m3, s [M, 1] fp32, with x ~ q * s
    Float8Linear(...).product     (q, s) -> y [M, N] bf16, on FP8 tensor cores
    emulated_product(...)         the same product with an exact sum, on any device

`s = amax / 448`, and 448 is the largest e4m3 number. Layers with the same input, such as w1 and w3, share `q` and `s`.

FP8 products need a GPU of compute capability 8.9 or more, and N and K that are multiples of 16. Elsewhere a layer is
weight-only: it dequantizes its weight to bf16 at each call, and the product is bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from int8kit.errors import ShapeError
from int8kit.runtime.scaled_linear import ScaledLinear, rows_of

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
_MULTIPLE = 16  # of N and K, for torch._scaled_mm
_Quantized = tuple[torch.Tensor, torch.Tensor]


def quantize_rows_e4m3(x: torch.Tensor, compiled: bool = False) -> _Quantized:
    """Quantize the rows of x [M, K] (bf16, fp16 or fp32) -> q [M, K] e4m3, s [M, 1] fp32.

        s = amax * (1 / 448)                       fp32; amax = max|x[m, :]|
        q = e4m3(clamp(x / s, -448, 448))          fp32 quotient, ties to even

    A row of zeros, or one whose s underflows, has s = 0 and q = 0. A row with a NaN or an infinity has s = NaN and
    q = 0. compiled: run one kernel that torch.compile makes at the first call for this K, instead of eager ones. M may
    change without a new compilation. The kernel's quotient may differ from IEEE's by two units of fp32.
    """
    if not compiled or torch.compiler.is_compiling():  # an outer compilation fuses the plain function itself
        return _quantize_rows(x)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    torch._dynamo.mark_static(x, 1)  # a constant K gives the faster reduction
    return _compiled_quantize_rows()(x)


def _quantize_rows(x: torch.Tensor) -> _Quantized:
    xf = x.float()
    amax = xf.abs().amax(-1, keepdim=True)
    s = torch.where(amax.isfinite(), amax * (1 / E4M3_MAX), torch.nan)
    usable = s > 0
    q = torch.where(usable, xf / torch.where(usable, s, 1.0), 0.0)
    return q.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).contiguous(), s


@functools.cache
def _compiled_quantize_rows() -> Callable[[torch.Tensor], _Quantized]:
    return torch.compile(_quantize_rows)


def emulated_product(
    q: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """bf16((fp32(sum_k q[m, k] * weight[n, k]) * s[m]) * weight_scale[n] + bias[n]): [M, N] bf16.

    The sum is exact before it is rounded to fp32. Products of e4m3 numbers are multiples of 2**-18 below 2**18, and
    float64 has 53 bits, which hold any sum of 2**17 of them.
    """
    y = (q.double() @ weight.double().t()).float() * s * weight_scale
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


def has_products(device: int) -> bool:
    """Whether CUDA device `device` runs the FP8 product here: by its compute capability, then by a trial.

    The trial matters: some versions of torch refuse scales per row on GPUs that have FP8 tensor cores.
    """
    return _tried(device)


@functools.cache
def _tried(device: int) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(256, 256, device=f"cuda:{device}").to(E4M3)
    scale = torch.ones(256, 1, device=ones.device)
    try:
        torch._scaled_mm(ones, ones.t(), scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


# A constant for torch.compile, which cannot trace the trial: the mark of `torch.compiler.assume_constant_result`.
has_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Float8Linear(ScaledLinear):
    """y = x W^T + b with e4m3 operands, or with an e4m3 weight alone where there are no FP8 products.

    x: [..., K] bf16, fp16 or fp32 -> [..., N] of x's dtype. `native` is the path. compiled: as in `quantize_rows_e4m3`.
    """

    weight_dtype = E4M3
    compiled = False

    @staticmethod
    def quantize_weight(weight: torch.Tensor) -> _Quantized:
        """weight [N, K] -> e4m3 [N, K] and scales [N] fp32, by `quantize_rows_e4m3`."""
        q, s = quantize_rows_e4m3(weight)
        return q, s[:, 0]

    @property
    def native(self) -> bool:
        """Whether the product of this layer runs on FP8 tensor cores, at its present device."""
        weight = self.weight
        fits = self.in_features % _MULTIPLE == 0 and self.out_features % _MULTIPLE == 0
        return fits and weight.is_cuda and has_products(weight.device.index)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., K] -> [..., N] of its dtype."""
        x = rows_of(input, self.in_features)
        if self.native:
            y = self.product(*quantize_rows_e4m3(x, self.compiled and x.shape[0] > 0))
        else:
            bf16 = torch.bfloat16
            y = torch.nn.functional.linear(x.to(bf16), self.dequantized(), self.bias_as(bf16))
        return y.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def product(self, q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """q [M, K] e4m3 and s [M, 1] fp32 of `quantize_rows_e4m3` -> y [M, N] bf16, with the bias.

        Without FP8 products it is `emulated_product`, which is slow. Raises ShapeError for operands that do not fit.
        """
        if q.dtype is not E4M3 or q.dim() != 2 or q.shape[1] != self.in_features or s.shape != (q.shape[0], 1):
            raise ShapeError(
                f"q {q.dtype} {tuple(q.shape)}, s {tuple(s.shape)}: expected e4m3 [M, {self.in_features}] and [M, 1], "
                "as quantize_rows_e4m3 returns them"
            )
        if not self.native:
            return emulated_product(q, s, self.weight, self.weight_scale, self.bias)
        if q.shape[0] == 0:
            return q.new_empty((0, self.out_features), dtype=torch.bfloat16)
        if not torch.compiler.is_compiling() and s.storage_offset() % 4:
            s = s.clone()  # cuBLAS demands an address that 16 divides
        y = torch._scaled_mm(
            q,
            self.weight.t(),  # K along the memory, as the tensor cores read it
            s,
            self.weight_scale[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        bias = self.bias_as(torch.bfloat16)
        return y if bias is None else y + bias  # by itself, since cuBLAS refuses some shapes with a bias

    def extra_repr(self) -> str:
        """Text for print(model), with the path of the product."""
        path = "fp8 products" if self.native else "weight-only: bf16 products"
        return f"{super().extra_repr()}, {path}"
