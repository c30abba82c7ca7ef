"""Data that take the epilogue through all of its cases: every kind of scale and of bias, with sums of every size.

    row m     kind m % 13 of sx, kind m % 5 of sums                                       65 rows have every pair
    column n  n = 2 j: kind j % 13 of sw; n = 2 j + 1: kind j // 13 % 13; kind n % 11 of the bias
              338 columns have every pair of a gate and an up column, and every pair of a scale and a bias

The periods have no common factor, so one GEMM of TABLE_M x TABLE_N crosses all kinds. Random draws were rejected: a
result such as 0 * inf or a subnormal number needs one kind of each operand at one element.
"""

from __future__ import annotations

import torch

TABLE_M, TABLE_N, TABLE_K = 65, 338, 48
SCALES: dict[str, tuple[float, float]] = {  # a value is the first number, plus up to so much of it at random
    "ordinary": (5e-3, 1.0),
    "negative": (-5e-3, 1.0),
    "one": (1.0, 0.0),  # sums are results: ties between two numbers of 16 bits, and numbers past the largest fp16
    "power of two": (2.0**-5, 0.0),  # more ties
    "tiny": (1e-20, 1.0),  # two of them give a subnormal number
    "huge": (1e36, 1.0),
    "subnormal": (1e-41, 1.0),
    "least": (2.0**-149, 0.0),
    "zero": (0.0, 0.0),
    "minus zero": (-0.0, 0.0),
    "nan": (torch.nan, 0.0),
    "inf": (torch.inf, 0.0),
    "minus inf": (-torch.inf, 0.0),
}
BIASES = (
    "ordinary", "negative", "large", "tiny", "huge", "subnormal", "zero", "minus zero", "nan", "inf", "minus inf"
)  # fmt: skip
SUMS = ("zero", "one", "minus one", "uniform", "all minus 128")


def x_rows(m: int, k: int, seed: int, device: str) -> torch.Tensor:
    """[m, k] int8: rows of zeros, 1 or -1 in the first column alone, random bytes, and -128."""
    g = torch.Generator(device).manual_seed(seed)
    x = torch.zeros(m, k, dtype=torch.int8, device=device)
    x[1::5, 0], x[2::5, 0] = 1, -1
    x[3::5] = torch.randint(-128, 128, x[3::5].shape, generator=g, dtype=torch.int8, device=device)
    x[4::5] = -128
    return x


def w_rows(n: int, k: int, seed: int, device: str) -> torch.Tensor:
    """[n, k] int8: random bytes, in some rows 127 or -128. The first column is 1, the sum with a row of x that is 1."""
    g = torch.Generator(device).manual_seed(seed)
    w = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8, device=device)
    w[3::7], w[5::7] = 127, -128
    w[:, 0] = 1
    return w


def row_scales(m: int, seed: int, device: str) -> torch.Tensor:
    """[m] fp32: sx, of each kind in turn."""
    return _scales(torch.arange(m, device=device) % len(SCALES), seed)


def column_scales(n: int, seed: int, device: str) -> torch.Tensor:
    """[n] fp32: sw, of each kind in turn, with every pair of kinds in neighbouring columns."""
    i = torch.arange(n, device=device)
    pair = i // 2
    return _scales(torch.where(i % 2 == 0, pair, pair // len(SCALES)) % len(SCALES), seed)


def _scales(kinds: torch.Tensor, seed: int) -> torch.Tensor:
    bases, spreads = torch.tensor(tuple(SCALES.values()), dtype=torch.float64, device=kinds.device).t()
    g = torch.Generator(kinds.device).manual_seed(seed)
    random = torch.rand(len(kinds), generator=g, dtype=torch.float64, device=kinds.device)
    spread = spreads[kinds] * random
    return torch.where(spread > 0, bases[kinds] * (1 + spread), bases[kinds]).float()


def bias(n: int, dtype: torch.dtype, seed: int, device: str) -> torch.Tensor:
    """[n] of `dtype`, of each kind of BIASES in turn. Tiny, huge and subnormal numbers are the dtype's.

    Triton's interpreter widens subnormal numbers of bf16 to wrong ones, so on a CPU they are normal.
    """
    limits = torch.finfo(dtype)
    part = 1.0 if dtype is torch.bfloat16 and torch.device(device).type == "cpu" else 0.25
    values = {
        "ordinary": 0.5, "negative": -0.5, "large": 300.0, "tiny": 4 * limits.smallest_normal, "huge": limits.max / 2,
        "subnormal": part * limits.smallest_normal, "zero": 0.0, "minus zero": -0.0, "nan": torch.nan, "inf": torch.inf,
        "minus inf": -torch.inf,
    }  # fmt: skip
    bases = torch.tensor([values[name] for name in BIASES], dtype=torch.float64, device=device)
    kinds = torch.arange(n, device=device) % len(BIASES)
    g = torch.Generator(device).manual_seed(seed)
    random = 1 + torch.rand(n, generator=g, dtype=torch.float64, device=device)
    spread = (bases[kinds] != 0) & bases[kinds].isfinite()
    return torch.where(spread, bases[kinds] * random, bases[kinds]).to(dtype)
