"""Hypothesis strategies of everything a kernel may be given, derived from `spec`, so that what is legal stands once.

Data are drawn as a kind and a seed, not element by element: a matrix of 10^5 elements is made in one call, and an
example that fails still shrinks, in its shape, its configuration and its kind.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from hypothesis import strategies as st

from int8kit.spec import GemmShape, Kernel, TileConfig, config_from

INT8_KINDS = ("ones", "normal", "uniform", "extremes", "least", "positive")
SCALE_KINDS = ("ordinary", "ordinary", "signed", "tiny", "huge", "nan")
FLOAT_KINDS = (
    "normal", "zero rows", "halves", "tiny", "huge", "subnormal", "nan", "inf", "one hot", "last",
    "brink",
)  # fmt: skip
Far = Literal["", "x", "w", "out"]
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Draw:
    """One example of a GEMM: shape, configuration, what the operands hold, the epilogue, and padding between rows."""

    shape: GemmShape
    config: TileConfig
    kind: str
    seed: int
    bias: torch.dtype | None
    out_dtype: torch.dtype
    padding: int = 0  # poisoned elements between rows of x and out; twice as many between those of w
    scales: str = "ordinary"
    far: Far = ""  # whose rows lie beyond 2**31 elements

    def __str__(self) -> str:
        bias = f"{_short(self.bias)} bias" if self.bias else "no bias"
        data = f"{self.kind} data of seed {self.seed}, {self.scales} scales"
        rows = f"rows of {self.far} far apart" if self.far else f"padding {self.padding}"
        return f"{self.shape}, {self.config}, {data}, {bias}, {_short(self.out_dtype)}, {rows}"


def to_json(d: Draw) -> str:
    """`d` on one line, for `from_json`."""
    row = asdict(d) | {"bias": d.bias and _short(d.bias), "out_dtype": _short(d.out_dtype)}
    return json.dumps(row)


def from_json(text: str) -> Draw:
    """The inverse of `to_json`. Raises ValueError, TypeError, KeyError or InputError for anything else."""
    row = json.loads(text)
    bias = row["bias"] and getattr(torch, row["bias"])
    shape, config, out_dtype = GemmShape(**row["shape"]), config_from(row["config"]), getattr(torch, row["out_dtype"])
    return Draw(**{**row, "shape": shape, "config": config, "bias": bias, "out_dtype": out_dtype})


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes(block: int, most: int) -> st.SearchStrategy[int]:
    """An extent of up to `most` elements, often around a multiple of `block`, where tails begin."""
    around = st.builds(
        lambda times, off: max(1, min(most, times * block + off)),
        st.integers(0, max(1, most // block)),
        st.sampled_from((-1, 0, 0, 1, 3, 16, 17, block // 2)),  # 16: what a tile may be copied in
    )
    return st.one_of(st.integers(1, most), around)


def served(d: Draw, config: TileConfig) -> bool:
    """False if another kernel than that of `config` would serve operands like those of `d`, and be judged."""
    aligned = d.shape.n % 8 == d.shape.k % 16 == d.padding % 16 == 0
    return aligned or config.kernel is Kernel.TRITON


@st.composite
def draws(draw: st.DrawFn, configs: tuple[TileConfig, ...], most: int, ops: int) -> Draw:
    """An example with M and N up to `most` and 2 M N K up to about `ops`."""
    config = draw(st.sampled_from(configs))
    m, n = draw(sizes(config.block_m, most)), draw(sizes(config.block_n, most))
    k = draw(sizes(config.block_k, max(config.block_k + 1, min(4096, ops // (2 * m * n)))))
    aligned = config.kernel is not Kernel.TRITON
    if aligned:  # see `served`
        n, k = -(-n // 8) * 8, -(-k // 16) * 16
    return Draw(
        GemmShape(m, n, k),
        config,
        draw(st.sampled_from(INT8_KINDS)),
        draw(st.integers(0, 7)),
        draw(st.sampled_from((None, *OUT_DTYPES))),
        draw(st.sampled_from(OUT_DTYPES)),
        draw(st.sampled_from((0, 16, 48) if aligned else (0, 3, 16))),
        draw(st.sampled_from(SCALE_KINDS)),
    )


@dataclass(frozen=True)
class Rows:
    """One example of a quantization."""

    m: int
    k: int
    kind: str
    seed: int
    dtype: torch.dtype
    padding: int  # poisoned elements between rows of x; twice as many sentinels between those of q

    def __str__(self) -> str:
        return (
            f"[{self.m}, {self.k}] {_short(self.dtype)}, {self.kind} data of seed {self.seed}, padding {self.padding}"
        )


@st.composite
def rows(draw: st.DrawFn, most_k: int) -> Rows:
    """An example of up to 5 rows of up to `most_k` elements."""
    return Rows(
        draw(st.integers(1, 5)),
        draw(sizes(128, most_k)),
        draw(st.sampled_from(FLOAT_KINDS)),
        draw(st.integers(0, 7)),
        draw(st.sampled_from(OUT_DTYPES)),
        draw(st.sampled_from((0, 3))),
    )


def int8_matrix(m: int, k: int, kind: str, seed: int, device: str) -> torch.Tensor:
    """[m, k] int8 of a kind: ones, quantized normal, every value, +-127 and -128 at random, -128 alone, or 90 to 127.

    Of the last, sums pass 2**24 from K of about 1500 on, with their low bits set: float32 cannot hold them.
    """
    g = torch.Generator(device).manual_seed(seed)
    q = torch.empty(m, k, dtype=torch.int8, device=device)
    for rows in q.split(max(1, _SLAB // k)):
        rows.copy_(_slab(rows, kind, g))
    return q


_SLAB = 2**26  # elements drawn at once: normal ones are float32, and the largest entry's operand has 2**30


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
    """[length] fp32, all different and none a power of two: an exchanged or misplaced one shows.

    kind: "ordinary"; "signed", every other one negative; "tiny" and "huge", whose products leave the ordinary range of
    the output; "nan", every third one.
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
    """[m, k] of a kind; the special rows are the odd ones, so that ordinary rows stand beside them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    odd = torch.arange(m) % 2 == (1 if m > 1 else 0)
    spot = torch.randint(0, k, (m,), generator=g)
    if kind == "zero rows":
        x[odd] = 0.0
    elif kind == "halves":  # quotients that end in .5 exactly: ties
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
    elif kind == "brink":  # of fp32, y / s = 0.5 (1 + 2**-24): q is 1, and 0 for a quotient that is a bit too small
        one = 2.0 ** (seed - 24)
        x = torch.randint(0, 2, (m, k), generator=g) * 2.0**24 * one - 2.0**23 * one
        x[torch.arange(m), spot] = 127 * (2.0**24 - 1) * one
    elif kind == "last":  # what a tail left out changes
        x[:, -1] = -9.0
    return x.to(dtype).to(device)
