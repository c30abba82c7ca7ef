"""Hypothesis strategies for all inputs that a kernel accepts, derived from the limits in `spec`.

Data are drawn as a kind and a seed, not element by element. So a matrix of 10^5 elements is made in one call, and a
failing example still shrinks in its shape, its configuration and its kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from hypothesis import strategies as st

from int8kit.spec import GemmShape, Kernel, TileConfig
from int8kit.verify.examples import epilogue_table

INT8_KINDS = ("ones", "normal", "uniform", "extremes", "all minus 128", "opposed")
SCALE_KINDS = ("ordinary", "ordinary", "signed", "tiny", "huge", "nan", "table")
FLOAT_KINDS = (
    "normal", "zero rows", "exact ties", "tiny", "huge", "subnormal", "nan", "inf", "one hot", "extreme last column",
    "extreme first column", "near half quotient", "ties of every scale", "wide", "largest",
)  # fmt: skip
HugeStride = Literal["", "x", "w", "out"]
Variant = Literal["output", "int32", "swiglu"]
"""A result of the kernels: the dequantized output, the accumulators, or the output of the SwiGLU epilogue."""

VARIANTS: tuple[Variant, ...] = ("output", "int32", "swiglu")
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Draw:
    """One example of a GEMM: its shape, configuration, data, epilogue, and the places of its operands.

    `layout` makes strides and addresses from padding, offset and shift. Fields with a default keep stored examples
    readable.
    """

    shape: GemmShape
    config: TileConfig
    kind: str
    seed: int
    bias: torch.dtype | None
    out_dtype: torch.dtype
    padding: int = 0  # least number of poisoned elements between rows; 0: dense matrices
    scales: str = "ordinary"
    huge_stride: HugeStride = ""  # the matrix in which a row starts beyond 2**31 elements
    offset: int = 0  # elements by which the address of x is past a multiple of 16; the other matrices have multiples
    shift: int = 0  # the same for sx, sw and bias
    variant: Variant = "output"  # the result that a property of any result looks at
    late: str = ""  # the operand that the kernel ahead writes late, in the property `order`; "": x
    layout: str = ""  # an unusual layout of `layouts`, and its matrix: "expanded x"
    other: TileConfig | None = None  # the second configuration, in the property `configuration`

    def __str__(self) -> str:
        bias = f"{_short(self.bias)} bias" if self.bias else "no bias"
        data = f"{self.kind} data of seed {self.seed}, {self.scales} scales"
        rows = f"huge row stride in {self.huge_stride}" if self.huge_stride else f"padding {self.padding}"
        more = [f"{name} {value}" for name in ("offset", "shift", "late", "layout") if (value := getattr(self, name))]
        variant: list[str] = [] if self.variant == "output" else [self.variant]
        variant += [f"against {self.other}"] if self.other else []
        parts = (str(self.shape), str(self.config), data, bias, _short(self.out_dtype), rows, *more, *variant)
        return ", ".join(parts)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes(block: int, most: int) -> st.SearchStrategy[int]:
    """An extent of up to `most` elements, often near a multiple of `block`, where tails begin."""
    around = st.builds(
        lambda times, off: max(1, min(most, times * block + off)),
        st.integers(0, max(1, most // block)),
        st.sampled_from((-1, 0, 0, 1, 3, 16, 17, block // 2)),  # 16: the bytes of one asynchronous copy
    )
    return st.one_of(st.integers(1, most), around)


def is_aligned(d: Draw) -> bool:
    """True if the rows of x and w start at multiples of 16 bytes, as the Gluon kernels need."""
    return d.shape.k % 16 == d.padding % 16 == d.offset % 16 == 0


def n_step(d: Draw, config: TileConfig) -> int:
    """The number that must divide N: TMA, of the wgmma kernel, stores 16 bytes of a row at once."""
    single = d.variant == "int32" or d.out_dtype is torch.float32
    columns = 1 if config.kernel is not Kernel.WGMMA else 4 if single else 8
    return columns * (2 if d.variant == "swiglu" else 1)


def takes_operands(d: Draw, config: TileConfig) -> bool:
    """False if the kernel of `config` rejects a matrix of `d`, so that another kernel would be tested."""
    return config.kernel is Kernel.TRITON or (is_aligned(d) and d.shape.n % n_step(d, config) == 0)


def admitted(d: Draw) -> Draw:
    """The example nearest to `d` that its own kernel and its variant admit."""
    step = n_step(d, d.config)
    shape = replace(d.shape, n=-(-d.shape.n // step) * step)
    if not (d.config.kernel is Kernel.TRITON or is_aligned(d)):
        shape = replace(shape, k=-(-shape.k // 16) * 16)
        d = replace(d, padding=-(-d.padding // 16) * 16, offset=-(-d.offset // 16) * 16)
    return replace(d, shape=shape)


@st.composite
def draws(draw: st.DrawFn, configs: tuple[TileConfig, ...], most: int, ops: int) -> Draw:
    """A GEMM example with M and N up to `most` and 2 M N K up to about `ops`."""
    config = draw(st.sampled_from(configs))
    m, n = draw(sizes(config.block_m, most)), draw(sizes(config.block_n, most))
    k = draw(sizes(config.block_k, max(config.block_k + 1, min(4096, ops // (2 * m * n)))))
    return admitted(
        Draw(
            GemmShape(m, n, k),
            config,
            draw(st.sampled_from(INT8_KINDS)),
            draw(st.integers(0, 7)),
            draw(st.sampled_from((None, *OUT_DTYPES))),
            draw(st.sampled_from(OUT_DTYPES)),
            draw(st.sampled_from((0, 3, 1, 16, 48))),
            draw(st.sampled_from(SCALE_KINDS)),
            offset=draw(st.sampled_from((0, 0, 1, 5, 16))),
            shift=draw(st.sampled_from((0, 1, 3))),
            variant=draw(st.sampled_from(VARIANTS)),
        )
    )


def int8_matrix(m: int, k: int, kind: str, seed: int, device: str) -> torch.Tensor:
    """An [m, k] int8 matrix of one of these kinds.

    Kinds:

        ones             1
        normal           normal data, quantized
        uniform          every value, at random
        extremes         -128, -127 and 127, at random
        all minus 128    -128
        opposed          90 to 127, with the other sign in odd rows: sums of both signs that pass 2**24 from K of about
                         1500 on, and 2**28 from 23000 on, with random low bits, which float32 loses
        positive         the same without the other sign, in examples of earlier versions
        table            rows of `epilogue_table`: sums of 0, 1, -1, and larger ones
    """
    g = torch.Generator(device).manual_seed(seed)
    q = torch.empty(m, k, dtype=torch.int8, device=device)
    if kind == "table":
        return epilogue_table.x_rows(m, k, seed, device)
    if kind == "opposed":
        positive = int8_matrix(m, k, "positive", seed, device)
        positive[1::2] = ~positive[1::2]  # -1 - q: -128 to -91
        return positive
    for rows in q.split(max(1, _SLAB // k)):
        rows.copy_(_slab(rows, kind, g))
    return q


_SLAB = 2**26  # elements drawn at once: normal data are float32, and the largest entry's operand has 2**30 elements


def _slab(like: torch.Tensor, kind: str, g: torch.Generator) -> torch.Tensor:
    if kind == "ones":
        return torch.ones_like(like)
    if kind == "normal":
        return (torch.randn(like.shape, generator=g, device=like.device) * 34).round().clamp(-127, 127)
    if kind == "uniform":
        return torch.randint(-128, 128, like.shape, generator=g, dtype=torch.int8, device=like.device)
    if kind == "extremes":
        choice = torch.randint(0, 3, like.shape, generator=g, dtype=torch.int8, device=like.device)
        return torch.tensor((-128, -127, 127), dtype=torch.int8, device=like.device)[choice.int()]
    if kind == "positive":
        return torch.randint(90, 128, like.shape, generator=g, dtype=torch.int8, device=like.device)
    return torch.full_like(like, -128)


def scales(length: int, kind: str, seed: int, device: str) -> torch.Tensor:
    """[length] fp32 scales, all different and none a power of two, so that an exchanged or misplaced scale shows.

    kind: "ordinary"; "signed", every second scale negative; "tiny" and "huge", whose products leave the normal range of
    the output; "nan", every third scale NaN.
    """
    g = torch.Generator(device).manual_seed(seed + 1000)
    s = torch.rand(length, generator=g, device=device) * 0.011 + 0.0003
    if kind == "signed":
        s[1::2] *= -1
    elif kind == "tiny":
        s *= 1e-19
    elif kind == "huge":
        s *= 1e17
    elif kind == "nan":
        s[::3] = torch.nan
    return s


def float_matrix(m: int, k: int, kind: str, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """An [m, k] matrix of a kind of FLOAT_KINDS. The odd rows are special, so that ordinary rows lie beside them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    odd = torch.arange(m) % 2 == (1 if m > 1 else 0)
    spot = torch.randint(0, k, (m,), generator=g)
    if kind == "zero rows":
        x[odd] = 0.0
    elif kind == "exact ties":  # quotients that end in .5 exactly
        x = torch.randint(-253, 254, (m, k), generator=g) * 0.5
        x[torch.arange(m), spot] = 127.0
    elif kind == "tiny":
        x *= 1e-30 if dtype is not torch.float16 else 1e-4
    elif kind == "huge":
        x *= 1e37 if dtype is not torch.float16 else 1e4
    elif kind == "subnormal":  # down to the last bit: the scale is subnormal too, or underflows to zero
        bits = torch.randint(0, 300, (m, k), generator=g, dtype=torch.int32)
        if dtype is torch.float32:
            return (bits.view(torch.float32) * (1 - 2 * (bits % 2))).to(device)
        return bits.remainder(100).to(torch.int16).view(dtype).to(device)
    elif kind in ("nan", "inf"):
        x[odd, spot[odd]] = float(kind) * (1 if seed % 2 else -1)
    elif kind == "one hot":
        x = torch.zeros(m, k)
        x[torch.arange(m), spot] = -3.0
    elif kind == "near half quotient":  # y / s = 0.5 (1 + 2**-24) in fp32: q is 1, or 0 if the quotient is one bit low
        one = 2.0 ** (seed - 24)
        x = torch.randint(0, 2, (m, k), generator=g) * 2.0**24 * one - 2.0**23 * one
        x[torch.arange(m), spot] = 127 * (2.0**24 - 1) * one
    elif kind == "ties of every scale":
        x = _near_ties(m, k, spot, seed, dtype, g)
    elif kind == "largest":  # a sum with a little more is infinite
        x = x.sign() * torch.finfo(dtype).max * (1 - torch.rand(m, k, generator=g) * 1e-3)
    elif kind == "wide":  # gates beyond the limits of silu
        x *= 40.0
    elif kind == "extreme last column":  # a dropped tail changes the scale
        x[:, -1] = -9.0
    elif kind == "extreme first column":
        x[:, 0] = 9.0
    return x.to(dtype).to(device)


def _near_ties(m: int, k: int, spot: torch.Tensor, seed: int, dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """An [m, k] fp32 matrix whose quotients by the scale of the row end in .5, or lie up to two bits beside that.

    The scale of each row has another exponent, from the least one up: a shorter division errs first where its scale
    is tiny. spot: [m], the place of each row's largest number.
    """
    low, high = (-126, 120) if dtype is not torch.float16 else (-20, 8)
    exponents = low + (torch.arange(m) + seed) % (high - low)
    top = (127 * (1 + torch.rand(m, generator=g, dtype=torch.float64)) * 2.0**exponents).to(dtype).float()
    scale = (top / torch.tensor(127.0)).double()[:, None]
    ties = torch.randint(-127, 127, (m, k), generator=g) + 0.5
    near = (ties * scale).float().view(torch.int32) + torch.randint(-2, 3, (m, k), generator=g, dtype=torch.int32)
    x = near.view(torch.float32).clamp(-top[:, None], top[:, None])
    x[torch.arange(m), spot] = top
    return x
