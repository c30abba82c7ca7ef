"""Examples of the row kernels that every run tries, since a draw may leave out an extent, a dtype or a layout.

`always` puts together, for each kernel:

    dtypes     every kind of data in every dtype, with every dtype of the vectors
    tails      a last chunk of 1, 2, 15 and 16 elements, for every size of a chunk
    extents    RANGES: the least and the most rows, images, heads and elements, and blocks of the mean of squares
    layouts    each operand unaligned, of another dtype, with a huge stride, left out, with a NaN; every tile
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from int8kit.kernels.launch import interpreted
from int8kit.kernels.qk_norm_rope import HeadTile
from int8kit.kernels.row_primitives import RowTile
from int8kit.verify.examples.layouts import LAYOUTS
from int8kit.verify.examples.limits import BLOCK, CHUNKS, K_MAX, K_MAX_HELD
from int8kit.verify.examples.strategies import FLOAT_KINDS, OUT_DTYPES
from int8kit.verify.properties.row_kernels import DEFAULT_EPS, OPERANDS, PER_IMAGE, TABLES, VECTORS, RowExample

MANY, LONGEST = 70000, 131071
MIDDLE_K = (3300, 3700, 4100, 5500, 6200, 7000, 7777, 8999, 9500, 11300, 13333, 14444, 15500)
"""Row lengths between the drawn ones and the longest ones, in steps of a factor of at most 1.15 or so."""


@dataclass(frozen=True)
class Range:
    """The least and the most of an extent that the examples reach."""

    least: int
    most: int


RANGES = {
    "m": Range(1, MANY),
    "images": Range(1, 7000),
    "rows": Range(1, MANY),
    "k": Range(1, K_MAX_HELD),
    "heads": Range(1, 128),
    "padding": Range(0, 16),
    "offset": Range(0, 8),
    "chunk": Range(CHUNKS[0], CHUNKS[-1]),
    "tile heads": Range(1, 64),
    "head tiles": Range(1, 16),
}
"""Extents of the examples of every row kernel; exceptions are in `range_of`."""


def range_of(kernel: str, extent: str) -> Range | None:
    """The range of an extent in the examples of `kernel`; None if the kernel does not have it."""
    heads, norms = kernel == "qk_norm_rope", kernel in ("rms_norm_quantize", "residual_norm_quantize")
    if extent in ("chunk", "tile heads", "head tiles", "heads") and heads is (extent == "chunk"):
        return None
    exceptions = {
        ("qk_norm_rope", "k"): Range(16, 256),
        ("quantize", "k"): Range(1, LONGEST),
    }
    if norms and extent == "chunk":
        return Range(CHUNKS[0], BLOCK)
    return exceptions.get((kernel, extent), RANGES[extent])


def base(kernel: str) -> RowExample:
    """A small example in float32, in which every operand has its own stride and offset."""
    fp32, heads = torch.float32, kernel == "qk_norm_rope"
    k, count = (32, 3) if heads else (300, 1)
    return RowExample(kernel, 2, 2, k, "normal", 1, fp32, fp32, padding=3, heads=count, offset=1)


def always(kernel: str, *, huge_strides: bool) -> Iterator[RowExample]:
    """The examples of `kernel`."""
    yield from _layouts(kernel)
    yield from _heads() if kernel == "qk_norm_rope" else _widths(kernel)
    yield from _many_rows(kernel)
    if huge_strides:
        yield from _beyond_32_bits(kernel)
    yield from _dtypes(kernel)


def _dtypes(kernel: str) -> Iterator[RowExample]:
    with_vectors = kernel not in ("quantize", "swiglu_quantize")
    small = replace(base(kernel), rows=1)
    for kind in FLOAT_KINDS:
        for dtype in OUT_DTYPES:
            for vectors in OUT_DTYPES if with_vectors else (dtype,):
                yield replace(small, kind=kind, dtype=dtype, vectors=vectors, given_out=kernel == "quantize")


def _chunks(kernel: str) -> tuple[int, ...]:
    return tuple(chunk for chunk in CHUNKS if chunk <= BLOCK or kernel in ("quantize", "swiglu_quantize"))


def _widths(kernel: str) -> Iterator[RowExample]:
    """Row lengths: tails of each chunk, partial blocks of the mean of squares, the model's, and the limits."""
    one = replace(base(kernel), images=1, given_out=kernel == "quantize")
    last = replace(one, kind="extreme last column")
    for chunk in _chunks(kernel):
        for tail in (1, 2, 15, 16, chunk):
            yield replace(last, k=chunk + tail, tile=RowTile(chunk, max(1, chunk // 256)))
        yield replace(one, k=5000, rows=1, tile=RowTile(chunk, max(1, chunk // 256)))
    for k in (1, 2, 3, 15, 16, 255, 256, 2047, 2048, 2049, 4608):
        yield replace(last, k=k)
    for k in MIDDLE_K:
        yield replace(one, k=k, rows=1, seed=3)
    for k in (8192 + 100, 10241, 12288, K_MAX_HELD - 1, K_MAX_HELD):
        yield replace(last, k=k, rows=1, seed=2)
        yield replace(one, k=k, rows=1, seed=3)
    if kernel == "swiglu_quantize":  # the scale of a row of one element shows the bits of its silu
        yield from (replace(one, k=1, rows=150, kind=kind) for kind in ("normal", "wide"))
    if kernel == "quantize":
        for rows, k in ((30, K_MAX_HELD), (246, 300)):  # the tiniest scales; every exponent of a scale
            yield replace(one, rows=rows, k=k, kind="ties of every scale")
        yield from _long_rows(replace(one, rows=1))


def _long_rows(one: RowExample) -> Iterator[RowExample]:
    """Rows of `quantize` that registers do not hold: each kind, each tail, and the longest K of a GEMM."""
    for kind in FLOAT_KINDS:
        for dtype in (torch.bfloat16, torch.float32):
            yield replace(one, rows=2, k=17000, kind=kind, dtype=dtype)
    for tail in (1, 2, 15, 16, CHUNKS[-1]):
        for kind in ("extreme last column", "subnormal"):
            yield replace(one, k=K_MAX_HELD + CHUNKS[-1] + tail, kind=kind)
    yield replace(one, k=K_MAX_HELD + 1, kind="extreme last column")
    yield replace(one, k=K_MAX_HELD + 300, tile=RowTile(512, 2), kind="extreme last column")
    for k in (25001, 33000, 43000, 53248, 70000, 95000):
        yield replace(one, k=k)
    yield replace(one, k=K_MAX, kind="extreme last column")


def _heads() -> Iterator[RowExample]:
    """Numbers and widths of heads, up to more than one program's; every size of a tile."""
    one = replace(base("qk_norm_rope"), images=1, rows=2)
    for heads in (1, 2, 4, 18, 33, 40, 64, 65, 127):
        yield replace(one, heads=heads, k=16)
    for k in (16, 32, 64, 128, 256):
        yield replace(one, heads=18 if k == 256 else 5, k=k)
    yield replace(one, heads=128, k=32, rows=1)
    yield replace(one, heads=128, k=16, rows=1)  # more than a tile may have
    for count in (1, 2, 4, 8, 16, 32, 64):
        yield replace(one, heads=count + 1, k=16, tile=HeadTile(count, 1, 1))
        yield replace(one, heads=2 * count, k=16, tile=HeadTile(count, 2, 2), rows=1)
    for tiles in (3, 16):
        yield replace(one, heads=37, k=16, tile=HeadTile(1, tiles, 1), rows=1)
        yield replace(one, heads=4 * tiles, k=16, tile=HeadTile(2, tiles, 1), rows=1)


def _layouts(kernel: str) -> Iterator[RowExample]:
    small, names = base(kernel), OPERANDS[kernel]
    images = replace(small, images=3)
    yield replace(small, padding=0, offset=0)
    yield replace(small, padding=16, offset=8)
    for name in names:
        yield replace(small, padding=16, offset=8, unaligned=name)
        for dtype in (torch.float32, torch.bfloat16):
            yield replace(small, dtype=dtype, vectors=dtype, other_dtype=name)
        if name in (*VECTORS, *PER_IMAGE, *TABLES):
            yield replace(images, special=name)
            for dtype in OUT_DTYPES:
                yield replace(images, special=f"extreme {name}", dtype=dtype)
        if name not in VECTORS:
            yield from (replace(images, layout=f"{layout} {name}") for layout in LAYOUTS[:-1])
            if kernel not in ("swiglu_quantize", "qk_norm_rope"):  # K = 1
                yield replace(images, layout=f"apart {name}", k=1)
    for eps in (0.0, 1e-12, 1e-9, 1e-6, DEFAULT_EPS, 1e-3, 1.0) if len(names) > 1 else ():
        yield replace(small, eps=eps)
        yield replace(small, eps=eps, kind="tiny")
    if kernel == "rms_norm_quantize":
        for left_out in (("weight",), ("modulation",), ("weight", "modulation")):
            yield replace(images, left_out=left_out)
    if kernel == "quantize":
        for given_out in (False, True):
            yield from (replace(images, given_out=given_out, padding=padding) for padding in (0, 3))
        yield replace(images, k=1, given_out=True, layout="apart q")
    if kernel == "residual_norm_quantize":  # sums beyond the largest fp16
        for seed in (1, 3):
            weight = replace(images, special="extreme branch_weight", seed=seed)
            yield replace(weight, kind="largest", dtype=torch.float16)
    yield from _refused(small)
    yield replace(images, rows=1)
    yield replace(images, rows=4, images=1)
    yield replace(images, rows=3, images=5)


def _refused(small: RowExample) -> Iterator[RowExample]:
    """Examples outside the kernel's domain: sizes of rows, chunks and heads, and each tensor wrong in each way."""
    for names, faults in wrong_tensors(small.kernel):
        yield from (replace(small, refused=f"{names} {fault}") for fault in faults)
    if small.kernel != "qk_norm_rope":  # two elements in a row are the fewest that a stride parts
        yield replace(small, k=2, refused=f"{OPERANDS[small.kernel][0]} stride")
    if small.kernel == "quantize":
        for output in ("q", "s"):
            for fault in ("dtype", "shorter", "stride"):
                yield replace(small, rows=3, given_out=True, refused=f"{output} {fault}")
    elif small.kernel == "qk_norm_rope":
        yield from (replace(small, k=k, refused="k") for k in (8, 24, 512))
    else:
        yield replace(small, k=K_MAX_HELD + 1, rows=1, refused="k")
        if max(_chunks(small.kernel)) == BLOCK:
            yield replace(small, tile=RowTile(2 * BLOCK, 16), refused="tile")


def wrong_tensors(kernel: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Operands of `kernel`, or two that must agree with others, and the faults for which it must refuse them.

    A longer or taller operand alone is right if nothing says how long or tall it must be.
    """
    names = OPERANDS[kernel]
    always = ("dtype", "axes", "flat", "stride")
    if len(names) == 1:
        yield names[0], (*always, *(("longer", "shorter") if kernel == "swiglu_quantize" else ()))
        return
    for name in names:
        yield name, (*always, "longer", "shorter", "device", *(() if name in VECTORS else ("taller",)))
    for together, faults in {
        "cos,sin": ("longer", "shorter", "taller", "empty"),
        "gate,modulation": ("longer", "shorter", "taller", "empty"),
        "modulation": ("empty",),
    }.items():
        if set(together.split(",")) <= set(names):
            yield together, faults


def _many_rows(kernel: str) -> Iterator[RowExample]:
    """More than 2**16 rows: of one image, and of many images."""
    one = replace(base(kernel), k=16 if kernel == "qk_norm_rope" else 7, heads=1, padding=1)
    if kernel == "quantize":
        yield replace(one, images=1, rows=MANY, given_out=True)
        yield replace(one, images=1, rows=MANY if interpreted() else 4200, k=K_MAX_HELD + 1, padding=0)
    yield replace(one, images=1, rows=MANY)
    if kernel != "qk_norm_rope":
        yield replace(one, images=2, rows=4500, k=300)
    yield replace(one, images=7, rows=MANY // 7)
    yield replace(one, images=7000, rows=MANY // 7000)
    yield replace(one, images=1, rows=1)


def _beyond_32_bits(kernel: str) -> Iterator[RowExample]:
    """Offsets beyond 2**31 elements: of each operand, by its stride, and of the outputs, by their size.

    The interpreter keeps strides of float32 alone.
    """
    dtype = torch.float32 if interpreted() else torch.bfloat16
    small = replace(base(kernel), dtype=dtype, vectors=dtype, padding=3)
    for name in OPERANDS[kernel]:
        if name not in VECTORS:
            by_image = name in PER_IMAGE
            yield replace(small, huge_stride=name, images=3 if by_image else 1, rows=1 if by_image else 3)
    if kernel == "quantize":
        yield replace(small, huge_stride="q", images=1, rows=3, given_out=True)
        yield replace(small, huge_stride="x", images=1, rows=3, k=K_MAX_HELD + 5)
        yield replace(small, huge_stride="q", images=1, rows=3, k=K_MAX_HELD + 5, given_out=True)
    k, heads = (256, 64) if kernel == "qk_norm_rope" else (K_MAX_HELD, 1)
    rows = 2**31 // (k * heads) + 3
    if kernel == "qk_norm_rope":  # cos and sin have L rows, so L is small
        yield replace(small, images=rows, rows=1, k=k, heads=heads)
    else:
        yield replace(small, images=1, rows=rows, k=k, heads=heads)


def extents(e: RowExample) -> Iterable[tuple[str, Any]]:
    """The extents of an example, by their names in RANGES."""
    yield from (("m", e.m), ("images", e.images), ("rows", e.rows), ("k", e.k), ("heads", e.heads))
    yield from (("padding", e.padding), ("offset", e.offset))
    if isinstance(e.tile, RowTile):
        yield "chunk", e.tile.chunk
    if isinstance(e.tile, HeadTile):
        yield from (("tile heads", e.tile.heads), ("head tiles", e.tile.tiles))
