"""Examples that every run tries, since a draw may leave out their extents, kinds or dtypes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from int8kit.spec import GemmShape, Kernel, TileConfig
from int8kit.verify.examples.strategies import Draw, HugeStride

SMALL_TILES = (  # many tiles, swizzle groups and k-steps in a small matrix
    TileConfig(16, 16, 32, num_warps=1, num_stages=2, group_m=1),
    TileConfig(16, 32, 32, num_warps=1, num_stages=3, group_m=2),
    TileConfig(32, 16, 64, num_warps=2, num_stages=2, group_m=3),
)
LARGE_SUM_EXAMPLES = tuple(  # sums beyond 2**24, where the conversion to float32 rounds
    Draw(GemmShape(m, n, k), SMALL_TILES[2], kind, 1, bias, torch.float32)
    for m, n, k, kind, bias in ((17, 24, 2112, "positive", torch.float32), (2, 3, 131071, "all minus 128", None))
)
LARGE_K_EXAMPLES = tuple(  # the same in larger matrices, up to the largest K, which the interpreter cannot afford
    Draw(GemmShape(m, n, k), SMALL_TILES[2], kind, 1, bias, torch.float32)
    for m, n, k, kind, bias in (
        (17, 24, 53248, "normal", None),
        (64, 64, 53248, "positive", torch.bfloat16),
        (17, 24, 131071, "all minus 128", None),
    )
)


def over_2gib_strides(*matrices: HugeStride) -> tuple[Draw, ...]:
    """Rows that start beyond 2**31 elements, in one of `matrices` at a time."""
    return tuple(
        Draw(GemmShape(3, 6, 40), SMALL_TILES[0], "uniform", 1, None, torch.float16, huge_stride=one)
        for one in matrices
    )


def over_65536_rows(tiles: Iterable[TileConfig]) -> tuple[Draw, ...]:
    """More than 2**16 rows, and columns: by tall and wide tiles of the plain kernel, by the largest tile of the others.

    The interpreter executes tiles one after the other, and these need the fewest.
    """
    tall, wide = (TileConfig(*block, num_warps=4, num_stages=2) for block in ((256, 16, 32), (16, 256, 32)))
    largest = {config.kernel: config for config in sorted(tiles, key=lambda c: c.block_m * c.block_n)}
    shapes = (GemmShape(65600, 16, 64), GemmShape(16, 65600, 64))
    pairs = [(config, config) if kernel is not Kernel.TRITON else (tall, wide) for kernel, config in largest.items()]
    return tuple(
        Draw(s, tile, "uniform", 1, None, torch.float32) for pair in pairs for s, tile in zip(shapes, pair, strict=True)
    )


def stream_k_examples(tiles: Iterable[TileConfig]) -> tuple[Draw, ...]:
    """100 tiles of nine k-steps, the last a partial step, for the smallest and largest stream-K tile of each kernel.

    No GPU's number of workers divides them evenly: segments begin and end inside tiles, and many are a worker's second.
    """
    stream_k = sorted((c for c in tiles if c.stream_k), key=lambda c: c.block_m * c.block_n)
    by_kernel = [[c for c in stream_k if c.kernel is kernel] for kernel in Kernel]
    return tuple(
        Draw(
            GemmShape(10 * c.block_m - 3, 10 * c.block_n - 8, 8 * c.block_k + 16), c, "uniform", 1, None, torch.float32
        )
        for c in sorted({c for some in by_kernel for c in (*some[:1], *some[-1:])})
    )
