"""Examples that every run tries, since a draw may leave out their extents, kinds or dtypes.

RANGES names the extents that are covered. A test computes them from the examples, and fails if one shrinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from int8kit.spec import GemmShape, Kernel, TileConfig, default_config
from int8kit.verify.examples.epilogue_table import TABLE_K, TABLE_M, TABLE_N
from int8kit.verify.examples.layouts import LAYOUTS
from int8kit.verify.examples.limits import K_MAX
from int8kit.verify.examples.strategies import OUT_DTYPES, Draw, HugeStride, Variant

RANGES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "M": (1, 70000),
        "N": (1, 70000),
        "N with bias": (1, 70000),
        "N with SwiGLU": (2, 70000),
        "K": (1, K_MAX),
        "tile rows": (1, 274),
        "tile columns": (1, 300),
        "tiles": (1, 390),
        "group_m": (1, 8),  # of a GEMM; the property `tile order` has all
        "k-steps": (1, 512),
    }
)
"""The least and the largest extent that the examples of the Triton kernel have, also in the interpreter."""

BIAS_DTYPES = (None, *OUT_DTYPES)
MIDDLE_K = (5100, 7333, 10500, 15200, 21999, 31111, 44800, 64001, 92222)
MIDDLE_M_N = (250, 511, 1050, 2150, 4400, 8900, 18000, 36000)
"""Extents between the drawn ones and the largest of RANGES."""

SMALL_TILES = (  # many tiles, swizzle groups and k-steps in a small matrix
    TileConfig(16, 16, 32, num_warps=1, num_stages=2, group_m=1),
    TileConfig(16, 32, 32, num_warps=1, num_stages=3, group_m=2),
    TileConfig(32, 16, 64, num_warps=2, num_stages=2, group_m=3),
)
TALL = TileConfig(256, 16, 32, num_warps=4, num_stages=2)
WIDE = TileConfig(16, 256, 32, num_warps=4, num_stages=2)
DEEP = TileConfig(16, 16, 256, num_warps=1, num_stages=2)


def _kernels(tiles: Iterable[TileConfig]) -> Iterator[tuple[Kernel, list[TileConfig]]]:
    """Each kernel of `tiles` and its configurations, from the smallest to the largest tile."""
    ordered = sorted(tiles, key=lambda c: (c.block_m * c.block_n, c))
    for kernel in Kernel:
        if found := [config for config in ordered if config.kernel is kernel]:
            yield kernel, found


def _both_ends(configs: list[TileConfig]) -> tuple[TileConfig, ...]:
    """The smallest and the largest tile: without stream-K and with it, and of each schedule."""
    kinds = dict.fromkeys((c.stream_k > 0, c.schedule) for c in configs)
    found = [[c for c in configs if (c.stream_k > 0, c.schedule) == kind] for kind in kinds]
    return tuple(dict.fromkeys(c for some in found for c in (some[0], some[-1])))


def epilogue_tables(tiles: Iterable[TileConfig]) -> Iterator[Draw]:
    """Every kind of scale, bias and sum, in every dtype: by the default tile, or the largest one of a Gluon kernel.

    The smallest tile has each dtype of the bias and of the output once.
    """
    shape = GemmShape(TABLE_M, TABLE_N, TABLE_K)
    for kernel, configs in _kernels(tiles):
        large = default_config(GemmShape(1024, 1, 1)) if kernel is Kernel.TRITON else configs[-1]
        for i, bias in enumerate(BIAS_DTYPES):
            for j, dtype in enumerate(OUT_DTYPES):
                example = Draw(shape, large, "table", i + 2 * j, bias, dtype, 16, "table", shift=(i + j) % 2)
                yield example
                if (i + 1) % 3 == j:
                    yield replace(example, config=configs[0], padding=48, offset=16, shift=1 - example.shift)


def tails(tiles: Iterable[TileConfig], *, roomy: bool) -> Iterator[Draw]:
    """Every remainder where a tail begins, of M, N and K, by the smallest and the largest tile.

    roomy: not by the other small tiles, since a GPU compiles most of the examples.
    """
    for kernel, configs in _kernels(tiles):
        triton = kernel is Kernel.TRITON
        chosen = (configs[0], configs[-1], *(SMALL_TILES if triton and not roomy else ()))
        for c in dict.fromkeys(chosen):
            rows, columns = (-1, 0, 1, 8, c.block_m // 2), (-1, 0, 1, 8, c.block_n // 2)
            if kernel is Kernel.WGMMA:  # see `strategies.n_step`
                columns = (-8, 0, 4, 8, c.block_n // 2)
            steps = (-1, 0, 1, 16, c.block_k // 2) if triton else (-16, 0, 16, 32, c.block_k // 2)
            for i in range(5):  # the factors give the three extents of an example different remainders
                m, n, k = c.block_m + rows[i], c.block_n + columns[(2 * i + 1) % 5], c.block_k + steps[(3 * i + 2) % 5]
                padding = (3, 16, 0, 1, 48)[i] if triton else (16, 48, 0, 16, 48)[i]
                yield Draw(
                    GemmShape(m, n, k), c, "uniform", i, BIAS_DTYPES[i % 4], OUT_DTYPES[i % 3], padding, "signed",
                    offset=(5, 0, 16, 1, 0)[i] if triton else 0, shift=i % 2,
                )  # fmt: skip


def extents(tiles: Iterable[TileConfig], *, roomy: bool, swizzle: bool = True) -> Iterator[Draw]:
    """The ends of RANGES in M, N and, with `swizzle`, in tiles. roomy: every width of the L2 swizzle, too.

    The interpreter executes tiles one after the other. So tall tiles have many rows, and wide tiles many columns.
    """
    (least_m, m), (least_n, n), (least_k, _) = (RANGES[name] for name in ("M", "N", "K"))
    for kernel, configs in _kernels(tiles):
        triton = kernel is Kernel.TRITON
        k, unit, fp32 = (33, 3, torch.float32) if triton else (48, 16, torch.float32)
        plain = [c for c in configs if not c.stream_k] or configs
        tall, wide = (TALL, WIDE) if triton else (plain[-1], plain[-1])
        yield Draw(GemmShape(m, 3, k), tall, "uniform", 1, torch.bfloat16, fp32, unit, "signed", offset=unit, shift=1)
        yield Draw(GemmShape(2, n, k), wide, "uniform", 2, torch.float16, fp32, unit, "signed", offset=unit, shift=1)
        yield Draw(GemmShape(least_m, least_n, least_k if triton else 16), plain[0], "uniform", 3, fp32, fp32, unit)
        yield from swizzles(plain[0]) if swizzle or not triton else swizzles(plain[0])[-1:]
        if not triton:
            yield Draw(GemmShape(m, 3, k), plain[0], "uniform", 1, torch.bfloat16, fp32, unit, "signed", shift=1)
            yield Draw(GemmShape(2, n, k), plain[0], "uniform", 2, torch.float16, fp32, unit, "signed", shift=1)
        for group_m in range(1, 65) if roomy else ():
            config = replace(plain[0], group_m=group_m)
            yield Draw(_tiled(config, 2 * group_m + 1, 131), config, "uniform", 4, None, fp32, 16)


def swizzles(config: TileConfig) -> tuple[Draw, ...]:
    """Many columns of tiles, and a last swizzle group that has fewer rows of tiles than the others."""
    grids = ((1, 1, 300), (2, 3, 130), (8, 3, 70))
    return tuple(
        Draw(_tiled(wide, rows, columns), wide, "uniform", 4, None, torch.float16, 16)
        for group_m, rows, columns in grids
        for wide in (replace(config, group_m=group_m),)
    )


def _tiled(config: TileConfig, rows: int, columns: int) -> GemmShape:
    """A shape of so many rows and columns of tiles, the last ones partial, and one partial k-step."""
    return GemmShape(rows * config.block_m - 3, columns * config.block_n - 5, min(16, config.block_k))


def large_sums(tiles: Iterable[TileConfig], *, roomy: bool) -> Iterator[Draw]:
    """Sums beyond 2**28, of both signs and with random low bits, and the largest sum of int32 that occurs.

    roomy: larger matrices, too, which the interpreter cannot afford.
    """
    fp32, k = torch.float32, RANGES["K"][1]
    for kernel, configs in _kernels(tiles):
        if kernel is Kernel.TRITON:
            yield Draw(GemmShape(17, 24, 2112), SMALL_TILES[2], "opposed", 1, fp32, fp32, 3)
            yield Draw(GemmShape(2, 3, k), DEEP, "opposed", 1, None, fp32, 1, "signed", offset=1, shift=1)
            yield Draw(GemmShape(1, 2, k), DEEP, "all minus 128", 1, fp32, fp32, 16)
        if roomy:
            for i, config in enumerate(_both_ends(configs)):
                aligned = k if kernel is Kernel.TRITON else k // 16 * 16
                yield Draw(GemmShape(17, 24, aligned), config, "opposed", 2, fp32, fp32, 16)
                if i == 0:
                    yield Draw(GemmShape(64, 64, 53248), config, "opposed", 3, torch.bfloat16, fp32, 16, shift=1)
                    yield Draw(GemmShape(17, 24, aligned), config, "all minus 128", 1, None, fp32, 16)


def layouts(tiles: Iterable[TileConfig]) -> Iterator[Draw]:
    """x and w in every layout of `layouts`, by the smallest tile of each kernel. K = 1 is for the Triton kernel."""
    for kernel, configs in _kernels(tiles):
        c = configs[0]
        for i, name in enumerate(("x", "w")):
            for layout in LAYOUTS if kernel is Kernel.TRITON else LAYOUTS[:-1]:
                k = 1 if layout == "apart" else 40 if kernel is Kernel.TRITON else 48
                shape = GemmShape(c.block_m + 3, c.block_n + 16, k)
                yield Draw(shape, c, "uniform", i, None, OUT_DTYPES[i], 16, "signed", layout=f"{layout} {name}")


def middle_sums(tiles: Iterable[TileConfig]) -> Iterator[Draw]:
    """K between the drawn ones and the largest one, in steps of a factor of at most 1.5."""
    for kernel, configs in _kernels(tiles):
        config = DEEP if kernel is Kernel.TRITON else configs[0]
        for i, k in enumerate(MIDDLE_K):
            shape = GemmShape(2, 3, k) if kernel is Kernel.TRITON else GemmShape(2, 16, k // 16 * 16)
            yield Draw(shape, config, "opposed", i, None, torch.float32, 16, "signed")


def middle_extents(tiles: Iterable[TileConfig]) -> Iterator[Draw]:
    """M and N between the drawn ones and the largest ones, in steps of a factor of 2, and both large at once."""
    for kernel, configs in _kernels(tiles):
        triton = kernel is Kernel.TRITON
        plain = [c for c in configs if not c.stream_k] or configs
        tall, wide, both = (TALL, WIDE, default_config(GemmShape(1024, 1, 1))) if triton else (plain[-1],) * 3
        for i, size in enumerate(MIDDLE_M_N):
            bias, dtype = BIAS_DTYPES[1 + i % 3], OUT_DTYPES[i // 2 % 3]
            yield Draw(GemmShape(size, 6 if triton else 16, 16), tall, "uniform", i, bias, dtype, 16, "signed")
            yield Draw(GemmShape(2, size // 16 * 16, 16), wide, "uniform", i, bias, dtype, 16, "signed", shift=1)
        for m, n in ((4400, 144), (160, 4400), (600, 720)):
            yield Draw(GemmShape(m, n, 16), both, "uniform", 1, torch.bfloat16, torch.float16, 16, "signed")


def over_2gib_strides(tiles: Iterable[TileConfig], *matrices: HugeStride) -> Iterator[Draw]:
    """Rows that start beyond 2**31 elements, in one of `matrices` at a time, for each kernel.

    The rows of x and w that the mma_sync kernel takes are less than 2**23 bytes apart. So it needs a second tile, whose
    first row lies beyond 2**31 bytes.
    """
    for kernel, configs in _kernels(tiles):
        config = SMALL_TILES[0] if kernel is Kernel.TRITON else configs[0]
        for one in matrices:
            m, n = 3, 6
            if kernel is Kernel.MMA_SYNC and one == "x":
                m = _past(258, config.block_m)
            if kernel is Kernel.MMA_SYNC and one == "w":
                n = _past(258, config.block_n)
            for dtype in (torch.float32, torch.bfloat16) if one == "out" else (torch.float16,):
                shape = GemmShape(m, n, 40 if kernel is Kernel.TRITON else 48)
                yield Draw(shape, config, "uniform", 1, None, dtype, 16, huge_stride=one)


def _past(rows: int, block: int) -> int:
    """A number of rows, the last one alone in a tile of `block` that begins at `rows` or later."""
    return -(-rows // block) * block + 1


def stream_k_examples(tiles: Iterable[TileConfig]) -> tuple[Draw, ...]:
    """100 tiles of nine k-steps, the last a partial step, for the smallest and largest stream-K tile of each kernel.

    No GPU's number of workers divides them evenly: segments begin and end inside tiles, and many are a worker's second.
    """
    found = {c for _, configs in _kernels(tiles) for c in _both_ends(configs) if c.stream_k}
    return tuple(
        Draw(
            GemmShape(10 * c.block_m - 3, 10 * c.block_n - 7, 8 * c.block_k + 16), c, "uniform", 1, torch.float16,
            torch.float32, 16, "signed", shift=1,
        )
        for c in sorted(found)
    )  # fmt: skip


LATE_TILES = {  # every schedule of the wgmma kernel, which alone starts early; one of the others
    Kernel.TRITON: (SMALL_TILES[2],),
    Kernel.MMA_SYNC: (TileConfig(16, 64, 64, num_warps=4, num_stages=2, group_m=2, kernel=Kernel.MMA_SYNC),),
    Kernel.WGMMA: tuple(
        TileConfig(block_m, 64, 128, num_warps=8, num_stages=3, group_m=2, kernel=Kernel.WGMMA, stream_k=stream_k)
        for block_m in (64, 256)
        for stream_k in (0, 1)
    ),
}
LATE_OPERANDS: Mapping[Variant, tuple[str, ...]] = MappingProxyType(
    {
        "output": ("x", "w", "sx", "sw", "bias", "out"),
        "int32": ("x", "w", "out"),
        "swiglu": ("x", "w", "sx", "sw", "bias", "out"),
    }
)
STREAM_K_OPERANDS = ("arrived", "workspace")


def late_operands(tiles: Iterable[TileConfig]) -> Iterator[Draw]:
    """Each operand of each variant written late, for every schedule of each kernel in `tiles`."""
    for kernel, _ in _kernels(tiles):
        for c in LATE_TILES[kernel]:
            # 300 tiles: both consumers of a program have some, and no number of multiprocessors divides them
            rows, columns = (20, 15) if kernel is Kernel.WGMMA else (3, 2)
            shape = GemmShape(rows * c.block_m, columns * c.block_n, 6 * c.block_k + 16)
            for variant, names in LATE_OPERANDS.items():
                for late in (*names, *(STREAM_K_OPERANDS if c.stream_k else ())):
                    yield Draw(
                        shape, c, "uniform", 5, torch.bfloat16, torch.float16, scales="signed",
                        variant=variant, late=late,
                    )  # fmt: skip
