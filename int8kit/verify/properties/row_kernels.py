"""Properties of the row kernels: each gives the bits of its reference.

    quantize                x [M, K]                                                       -> q, s
    rms_norm_quantize       x [M, K], weight [K], modulation [B, K]                        -> q, s
    residual_norm_quantize  residual, branch [M, K], two weights, gate, modulation [B, K]  -> new, q, s
    swiglu_quantize         gu [M, 2 K]                                                    -> q, s
    qk_norm_rope            qkv [M, 3 H K], two weights [K], cos, sin [L, K]               -> q, k

An example has B images of L rows, M = B L; K is the width of a head in the last kernel. In real models each operand is
a slice of a larger tensor. So each has another stride and another offset, in a buffer of NaN. Outputs that a kernel
allocates lie in buffers of sentinels. Triton's interpreter converts 16-bit operands to contiguous fp32, so float32
examples show strides there. `row_tables` has the examples that every run tries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from int8kit import reference
from int8kit.errors import InputError
from int8kit.kernels import quantize as quantize_module
from int8kit.kernels.qk_norm_rope import HeadTile, qk_norm_rope
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize
from int8kit.kernels.row_primitives import RowTile
from int8kit.kernels.swiglu_quantize import swiglu_quantize
from int8kit.verify.compare import Unchanged, another_default_dtype, bitwise_diff
from int8kit.verify.examples.guarded_buffers import SENTINEL, GuardedOutput, huge_stride_matrix
from int8kit.verify.examples.layouts import laid_out
from int8kit.verify.examples.limits import CHUNKS, HEAD_DIMS, WARPS
from int8kit.verify.examples.row_memory import LARGE, GuardedAllocations, only_rows, picked, placed
from int8kit.verify.examples.strategies import FLOAT_KINDS, OUT_DTYPES, float_matrix, sizes
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation


def _quantize(*args: Any, **more: Any) -> tuple[torch.Tensor, ...]:
    return quantize_module.quantize(*args, **more)


KERNELS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "quantize": _quantize,
    "rms_norm_quantize": rms_norm_quantize,
    "residual_norm_quantize": residual_norm_quantize,
    "swiglu_quantize": swiglu_quantize,
    "qk_norm_rope": qk_norm_rope,
}
OPERANDS = {
    "quantize": ("x",),
    "rms_norm_quantize": ("x", "weight", "modulation"),
    "residual_norm_quantize": ("residual", "branch", "branch_weight", "gate", "weight", "modulation"),
    "swiglu_quantize": ("gu",),
    "qk_norm_rope": ("qkv", "q_weight", "k_weight", "cos", "sin"),
}
"""The operands of each kernel, in the order of its parameters."""

VECTORS = ("weight", "branch_weight", "q_weight", "k_weight")  # [K]; of all rows
PER_IMAGE = ("gate", "modulation")  # [B, K]
TABLES = ("cos", "sin")  # [L, K]
DEFAULT_EPS = 1e-5  # of the reference
_OUTPUTS = {"residual_norm_quantize": ("new", "q", "s"), "qk_norm_rope": ("q", "k")}
_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("weight",), ("modulation",), ("weight", "modulation"))


@dataclass(frozen=True)
class RowExample:
    """One example of a row kernel. Operand i, from 1, has i * padding elements between rows, at i * offset elements."""

    kernel: str  # of KERNELS
    images: int
    rows: int  # of each image
    k: int
    kind: str  # one of `strategies.FLOAT_KINDS`
    seed: int
    dtype: torch.dtype  # of the matrices of M rows
    vectors: torch.dtype  # of weights, gates, modulations, cos and sin
    padding: int = 0
    heads: int = 1
    left_out: tuple[str, ...] = ()  # optional operands of `rms_norm_quantize` that are None
    eps: float = DEFAULT_EPS
    tile: RowTile | HeadTile | None = None
    offset: int = 0
    other_dtype: str = ""  # the operand that has the next dtype of OUT_DTYPES
    unaligned: str = ""  # the operand that lies one element further on
    huge_stride: str = ""  # the operand, or the output q of `quantize`, whose third row starts beyond 2**31 elements
    special: str = ""  # the operand that has a NaN, an infinity and a zero in its first row; or "extreme" and its name
    given_out: bool = False  # `quantize` writes into given tensors
    layout: str = ""  # an unusual layout of `layouts`, and the operand that has it: "expanded gate"
    refused: str = (
        ""  # why the kernel must raise InputError: "k", "tile", or tensors and their fault, as "cos,sin longer"
    )

    def __str__(self) -> str:
        heads = f" of {self.heads} heads" if self.kernel == "qk_norm_rope" else ""
        more = "".join(f", no {name}" for name in self.left_out)
        more += f", {self.other_dtype} of another dtype" if self.other_dtype else ""
        more += f", unaligned {self.unaligned}" if self.unaligned else ""
        more += f", huge row stride in {self.huge_stride}" if self.huge_stride else ""
        more += f", special {self.special}" if self.special else ""
        more += f", {self.layout}" if self.layout else ""
        more += ", outputs given" if self.given_out else ""
        more += f", to be refused for {self.refused}" if self.refused else ""
        return (
            f"{self.images} x {self.rows} rows of K = {self.k}{heads}, {_short(self.dtype)}, {self.kind} data of seed "
            f"{self.seed}, {_short(self.vectors)} vectors, padding {self.padding}, offset {self.offset}, "
            f"eps {self.eps}, tile {self.tile or 'by default'}{more}"
        )

    @property
    def m(self) -> int:
        """Rows of all images."""
        return self.images * self.rows

    @property
    def width(self) -> int:
        """Columns of the kernel's first operand."""
        return {"swiglu_quantize": 2 * self.k, "qk_norm_rope": 3 * self.heads * self.k}.get(self.kernel, self.k)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def examples(kernel: str, most_k: int = 3000) -> st.SearchStrategy[RowExample]:
    """Strategy for examples of `kernel`, a name of KERNELS, with rows of up to `most_k` elements."""
    heads, names = kernel == "qk_norm_rope", ("", *OPERANDS[kernel])
    norms = kernel in ("rms_norm_quantize", "residual_norm_quantize")
    row_tiles = st.builds(RowTile, st.sampled_from(CHUNKS[: 4 if norms else 5]), st.sampled_from(WARPS))
    head_tiles = st.builds(HeadTile, st.sampled_from((1, 2, 4, 16)), st.integers(1, 4), st.sampled_from(WARPS[:3]))
    return st.builds(
        RowExample,
        kernel=st.just(kernel),
        images=st.integers(1, 3),
        rows=st.integers(1, 4),
        k=st.sampled_from(HEAD_DIMS) if heads else sizes(128, most_k),
        kind=st.sampled_from(FLOAT_KINDS),
        seed=st.integers(0, 7),
        dtype=st.sampled_from(OUT_DTYPES),
        vectors=st.sampled_from(OUT_DTYPES),
        padding=st.sampled_from((0, 3, 16)),
        heads=st.integers(1, 7) if heads else st.just(1),
        left_out=st.sampled_from(_LEFT_OUT) if kernel == "rms_norm_quantize" else st.just(()),
        eps=st.sampled_from((DEFAULT_EPS, 1e-6)),
        tile=st.none() | (head_tiles if heads else row_tiles),
        offset=st.sampled_from((0, 1, 8)),
        other_dtype=st.sampled_from(names),
        unaligned=st.sampled_from(names),
        given_out=st.booleans() if kernel == "quantize" else st.just(False),
    )


def operands(e: RowExample, device: str) -> tuple[Any, ...]:
    """The arguments of the kernel and of its reference for `e`."""
    names = OPERANDS[e.kernel]
    layout, _, layout_of = e.layout.partition(" ")
    plain = _vectors(e) | dict.fromkeys(e.left_out)
    args: list[Any] = []
    for number, name in enumerate(names, 1):
        if name in e.left_out:
            args.append(None)
            continue
        dtype = _dtype_of(e, name)
        if name in plain:
            data = plain[name].to(dtype)
            data = _with_special(data) if name == e.special else data
            data = _with_extremes(data) if f"extreme {name}" == e.special else data
        else:
            rows = e.m if e.m * e.width <= LARGE else 1
            kind = "normal" if name == "residual" and e.seed % 2 == 0 else e.kind
            data = float_matrix(rows, e.width, kind, e.seed + (name == "residual"), dtype, "cpu")
        data = data.to(device)
        if name == e.huge_stride:
            view = huge_stride_matrix(len(data), data.shape[1], dtype, device).copy_(data)
        elif layout_of == name:
            view = laid_out(data, layout, torch.nan)
        else:
            view = placed(data, number * e.padding, number * e.offset + (name == e.unaligned))
        args.append(view if view.dim() == 1 or len(view) > 1 or name in plain else view.expand(e.m, -1))
    if e.kernel == "qk_norm_rope":
        args.append(e.heads)
    normalizes = e.kernel in ("rms_norm_quantize", "residual_norm_quantize", "qk_norm_rope")
    return (*args, e.eps) if normalizes and e.eps != DEFAULT_EPS else (*args,)  # a default is left to the kernel


def _dtype_of(e: RowExample, name: str) -> torch.dtype:
    matrix = name not in (*VECTORS, *PER_IMAGE, *TABLES)
    dtype = e.dtype if matrix else e.vectors
    return OUT_DTYPES[(OUT_DTYPES.index(dtype) + 1) % len(OUT_DTYPES)] if name == e.other_dtype else dtype


def _vectors(e: RowExample) -> dict[str, Any]:
    """Weights near 1, modulations near 0, gates inside (-1, 1) and the cosines and sines of angles, all in fp32."""
    g = torch.Generator().manual_seed(e.seed)
    found: dict[str, Any] = {}
    for name in OPERANDS[e.kernel]:
        if name in VECTORS:
            found[name] = torch.randn(e.k, generator=g) * 0.5 + 1.0
        elif name in PER_IMAGE:
            found[name] = torch.randn(e.images, e.k, generator=g) * 0.5
        elif name == "cos":
            angles = torch.rand(e.rows, e.k, generator=g) * 100
            found |= {"cos": angles.cos(), "sin": angles.sin()}
    if "gate" in found:
        found["gate"] = found["gate"].tanh()
    return found


def _with_special(data: torch.Tensor) -> torch.Tensor:
    """`data` with a NaN, an infinity, a zero and a negative zero at the start of its first row."""
    first = data if data.dim() == 1 else data[0]
    values = torch.tensor((torch.nan, torch.inf, 0.0, -0.0), dtype=data.dtype)
    first[: len(values)] = values[: len(first)]
    return data


def _with_extremes(data: torch.Tensor) -> torch.Tensor:
    """`data` times a power of two in each element, the largest near the end of fp16, and 1, -1, -0 and a subnormal.

    A NaN or an infinity would hide the rest of the row: its scale is NaN.
    """
    most = 13 if data.dtype is torch.float16 else 30
    spread = data * 2.0 ** ((torch.arange(data.numel()) * 5).reshape(data.shape) % (2 * most + 1) - most)
    first = spread if spread.dim() == 1 else spread[0]
    values = torch.tensor((1.0, -1.0, -0.0, torch.finfo(data.dtype).smallest_normal / 4), dtype=data.dtype)
    first[: len(values)] = values[: len(first)]
    return spread.to(data.dtype)


def check(e: RowExample, on: Executor | Implementation) -> str | None:
    """How an output of the row kernel differs from the reference's output, or None."""
    if e.refused:
        return _refusal(e, on.device)
    args = operands(e, on.device)
    rows = picked(e.m, e.m * e.width)
    more: dict[str, Any] = {} if e.tile is None else {"tile": e.tile}
    given = _Given(e, on.device) if e.given_out else None
    if given is not None:
        more["out"] = given.out
    allocated, kept = GuardedAllocations(rows), Unchanged(zip(OPERANDS[e.kernel], args, strict=False))
    with allocated.active(), only_rows(rows), another_default_dtype():
        got = KERNELS[e.kernel](*args, **more)
    if why := kept.written():
        return why
    want = getattr(reference, e.kernel)(*(args if rows is None else _arguments_of_rows(e, args, rows)))
    for name, mine, theirs in zip(_OUTPUTS.get(e.kernel, ("q", "s")), got, want, strict=True):
        if why := _unlike(mine, theirs.dtype, (e.m, *theirs.shape[1:]), on.device, strided=e.given_out):
            return f"{name}: {why}"
        if why := bitwise_diff(mine if rows is None else mine[rows], theirs):
            return f"{name}: {why}"
    return allocated.written_outside() or (given.written_outside() if given else None)


_FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda t: t.to(torch.int16),
    "longer": lambda t: torch.cat((t, t[..., :1]), -1),
    "shorter": lambda t: t[..., :-1],
    "taller": lambda t: torch.cat((t, t[:1])),
    "empty": lambda t: t[:0],
    "axes": lambda t: t[None],
    "flat": lambda t: t[0],
    "stride": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "device": lambda t: t.to("meta"),
}


def _refusal(e: RowExample, device: str) -> str | None:
    """None if the kernel raises InputError for an example that it must refuse; else the other outcome."""
    more: dict[str, Any] = {} if e.tile is None else {"tile": e.tile}
    names, _, fault = e.refused.partition(" ")
    wrong: Callable[[torch.Tensor], torch.Tensor] = _FAULTS.get(fault, torch.Tensor.detach)
    if e.given_out:
        given = zip(("q", "s"), _Given(e, device).out, strict=True)
        more["out"] = tuple(wrong(one) if name in names.split(",") else one for name, one in given)
    args = list(operands(e, device))
    for number, name in enumerate(OPERANDS[e.kernel]):
        if name in names.split(","):
            args[number] = wrong(args[number])
    try:
        KERNELS[e.kernel](*args, **more)
    except InputError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}, expected InputError"
    return "no error, expected InputError"


def _unlike(got: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: str, *, strided: bool) -> str | None:
    """How the dtype, the shape, the strides or the device of an output differ from the expected ones, or None."""
    if got.dtype is not dtype:
        return f"{got.dtype}, expected {dtype}"
    if tuple(got.shape) != shape:
        return f"shape {tuple(got.shape)}, expected {shape}"
    if not strided and not got.is_contiguous():
        return f"strides {got.stride()}, expected a contiguous tensor"
    return None if got.device.type == device.partition(":")[0] else f"on {got.device}, expected {device}"


def _arguments_of_rows(e: RowExample, args: tuple[Any, ...], rows: list[int]) -> tuple[Any, ...]:
    """The reference's arguments for these rows alone: each is an image of one row, with its own cos and sin."""
    at = torch.tensor(rows)
    index = dict.fromkeys(OPERANDS[e.kernel], at) | dict.fromkeys(PER_IMAGE, at // e.rows)
    index |= dict.fromkeys(TABLES, at % e.rows)
    found = list(args)
    for number, name in enumerate(OPERANDS[e.kernel]):
        if name not in VECTORS and args[number] is not None:
            found[number] = args[number][index[name].to(args[number].device)]
    return tuple(found)


class _Given:
    """Tensors that `quantize` writes into: another stride between rows than that of x, and sentinels around."""

    def __init__(self, e: RowExample, device: str) -> None:
        self.values = GuardedOutput(e.m, e.k, 2 * e.padding, CHUNKS[-1] // e.k + 2, torch.int8, device)
        self.column = torch.full((3, e.m), SENTINEL, dtype=torch.float32, device=device)
        self.huge = huge_stride_matrix(e.m, e.k, torch.int8, device) if e.huge_stride == "q" else None  # not guarded
        self.apart = torch.full((e.m, 4), SENTINEL, dtype=torch.int8, device=device)
        q = self.values.view if self.huge is None else self.huge
        q = self.apart[:, 1::2][:, :1] if e.layout == "apart q" else q
        self.out = q, self.column[1]

    def written_outside(self) -> str | None:
        """As text, or None."""
        outside = int((self.column[::2] != SENTINEL).sum()) + int((self.apart[:, [0, 2, 3]] != SENTINEL).sum())
        return f"{outside} elements around the outputs were written" if outside else self.values.written_outside()
