"""The configurations that the tuner considers for a GPU, and the kernels that they need.

    legal(gpu)               every legal configuration, thousands: the space of the local search
    seeds(gpu)               about a hundred of them: every run compiles these
    neighbours(config, gpu)  the legal ones a step away: the search tries them around the fastest

Legality is `spec.why_illegal` and nothing else. A configuration that it excludes would not run: tests/test_space.py
compiles some of these and finds more shared memory than the GPU has, or spills.

The seeds are a choice. For the Triton kernel they are a grid without values that never won:

    tiles under 64 x 64, for M of 64 and more
    more than 5 stages
    one or two warps on a large tile

The other kernels take longer to compile. Their seeds are a list of configurations that won for some shape, and some
between these.

A search over all of `legal` from the start was rejected: it compiles, for half an hour of one core, configurations that
the cost model rightly ranks as slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from int8kit.database.schema import Resources
from int8kit.gpus import Gpu
from int8kit.spec import (
    DOMAINS,
    GROUP_M,
    GemmShape,
    Kernel,
    SwigluShape,
    TileConfig,
    default_config,
    kernels_of,
    legal_configs,
    why_illegal,
)

SWIZZLE_WIDTHS = (4, 8, 12, 16)
"""Values of group_m, the width of the L2 swizzle, that are tried."""

_MMA_SYNC_SEEDS = (  # block_m, block_n, block_k, warps, stages, stream_k
    (128, 128, 64, 4, (3, 4), (0, 2)),
    (128, 128, 128, 4, (2, 3), (0, 2)),
    (128, 256, 64, 8, (3, 4), (0, 1)),
    (128, 256, 128, 8, (2,), (0,)),
    (256, 128, 64, 8, (4,), (0, 1)),
    (256, 128, 128, 8, (2,), (0,)),
    (64, 128, 128, 4, (3, 4), (0, 2)),
    (64, 64, 128, 4, (3, 4), (0, 3)),
    (32, 64, 128, 4, (4,), (0, 4)),
    (16, 64, 128, 4, (4,), (0, 4)),
    (16, 128, 128, 4, (4,), (0, 2)),
)
_WGMMA_SEEDS = (
    (128, 128, 128, 8, (6,), (0,)),
    (256, 128, 128, 8, (4,), (0, 1)),
    (64, 128, 128, 8, (8,), (0, 1)),
    (64, 64, 128, 8, (10,), (0, 1)),
)
_LISTED_SEEDS = {Kernel.MMA_SYNC: _MMA_SYNC_SEEDS, Kernel.WGMMA: _WGMMA_SEEDS}

Compilation = Resources | str
"""Resources of a compiled kernel, or why there is none. The reason begins with its class, such as "compile:"."""


class KernelVariant(NamedTuple):
    """Identity of one compiled kernel: several configurations and shapes can share it.

    config has group_m = GROUP_M, since the swizzle width is an argument at run time. even_k says whether K is a
    multiple of block_k. Only the Triton kernel is compiled differently for it; for the others it is None.
    """

    config: TileConfig
    even_k: bool | None = None
    swiglu: bool = False


def variant_of(config: TileConfig, shape: GemmShape) -> KernelVariant:
    """The kernel that `config` needs for `shape`."""
    return kernel_variant(config, shape.k % config.block_k == 0, isinstance(shape, SwigluShape))


def kernel_variant(config: TileConfig, even_k: bool, swiglu: bool = False) -> KernelVariant:
    """The kernel that `config` needs where K is a multiple of block_k, or is not. swiglu: with that epilogue."""
    return KernelVariant(without_swizzle(config), even_k if config.kernel is Kernel.TRITON else None, swiglu)


def without_swizzle(config: TileConfig) -> TileConfig:
    """`config` with the usual L2 swizzle width: equal for two configurations that are compiled to the same code."""
    return replace(config, group_m=GROUP_M)


def legal(gpu: Gpu) -> tuple[TileConfig, ...]:
    """Every legal configuration of the GPU's kernels."""
    return legal_configs(gpu.arch, gpu.shared_memory)


@cache
def seeds(gpu: Gpu) -> tuple[TileConfig, ...]:
    """The configurations that every run on `gpu` considers: sorted, legal and distinct."""
    grid = product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5))
    configs = {TileConfig(m, n, k, warps, stages, GROUP_M) for m, n, k, warps, stages in grid}
    configs |= {default_config(GemmShape(m, 4096, 4096)) for m in (16, 64, 4096)}
    configs |= set(_listed_seeds(gpu))
    return tuple(sorted(c for c in configs if _is_legal(c, gpu)))


def _listed_seeds(gpu: Gpu) -> Iterator[TileConfig]:
    for kernel in kernels_of(gpu.arch):
        for m, n, k, warps, all_stages, all_stream_k in _LISTED_SEEDS.get(kernel, ()):
            for stages, stream_k in product(all_stages, all_stream_k):
                yield TileConfig(m, n, k, warps, stages, GROUP_M, kernel, stream_k)


def candidates(shape: GemmShape, gpu: Gpu) -> list[TileConfig]:
    """The seeds that make sense for one shape, and the default configuration."""
    return sorted({*(c for c in seeds(gpu) if suits(c, shape)), default_config(shape)})


def suits(config: TileConfig, shape: GemmShape) -> bool:
    """Whether `config` makes sense for `shape`.

    False for a tile much higher than M. False for a Gluon kernel where K is not a multiple of 16, the number of bytes
    that it copies at once.
    """
    low = config.block_m <= max(64, 2 * shape.m)
    return low and (config.kernel is Kernel.TRITON or shape.k % 16 == 0)


def neighbours(config: TileConfig, gpu: Gpu) -> list[TileConfig]:
    """The legal configurations a step from `config`, sorted.

    A step changes one parameter to its next value, up or down. Or it changes two parameters that compensate each other,
    such as both sides of the tile, or a longer step of K and fewer stages.
    """
    found = {
        _with(config, dict(zip(names, values, strict=True)))
        for names in _STEPS
        for values in product(*(_adjacent_values(config, name) for name in names))
    }
    return sorted(c for c in found if _is_legal(c, gpu))


_STEPS = (
    ("block_m",), ("block_n",), ("block_k",), ("num_warps",), ("num_stages",), ("stream_k",), ("group_m",),
    ("block_m", "block_n"), ("block_k", "num_stages"), ("block_m", "num_warps"), ("block_n", "num_warps"),
    ("block_m", "num_stages"), ("block_n", "num_stages"),
)  # fmt: skip


def _adjacent_values(config: TileConfig, name: str) -> list[int]:
    """The next smaller and the next larger value of a parameter of `config`, where they exist."""
    values = SWIZZLE_WIDTHS if name == "group_m" else getattr(DOMAINS[config.kernel], name)
    own = getattr(config, name)
    lower = [value for value in values if value < own]
    higher = [value for value in values if value > own]
    return lower[-1:] + higher[:1]


def _with(config: TileConfig, values: dict[str, Any]) -> TileConfig:
    return replace(config, **values, schedule=None)  # the usual one of the new tile


def _is_legal(config: TileConfig, gpu: Gpu) -> bool:
    return why_illegal(config, arch=gpu.arch, shared_memory=gpu.shared_memory) is None
