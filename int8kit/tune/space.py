"""The configurations that a tuner considers for a card: every legal one, of which a run begins with a few.

    legal(gpu)               all of them, thousands: what a local search may reach
    seeds(gpu)               about a hundred, which every run compiles
    neighbours(config, gpu)  the legal ones a step away: what the search tries around the fastest

Legality is `spec.why_illegal` and nothing else: what it leaves out would not run (tests/test_space.py compiles some of
it, and finds more shared memory than the card has, or spills). The seeds are a choice: of the Triton kernel a grid
without what is legal and never won, tiles under 64 x 64 (for M of 64 and more), more than 5 stages, one or two warps on
a large tile; of the other kernels, which take longer to compile, a list of those that won somewhere and some between.

A search over all of `legal` from the start was rejected: it compiles, for half an hour of a core, what a model knows to
be slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from int8kit.gpus import Gpu
from int8kit.spec import (
    DOMAINS,
    GROUP_M,
    GemmShape,
    Kernel,
    TileConfig,
    default_config,
    legal_configs,
    why_illegal,
)

BANDS = (4, 8, 12, 16)

_AMPERE = (  # block_m, block_n, block_k, warps, stages, stream_k
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
_HOPPER = (
    (128, 128, 128, 8, (6,), (0,)),
    (256, 128, 128, 8, (4,), (0, 1)),
    (64, 128, 128, 8, (8,), (0, 1)),
    (64, 64, 128, 8, (10,), (0, 1)),
)


def legal(gpu: Gpu) -> tuple[TileConfig, ...]:
    """Every legal configuration of the card's kernels."""
    return legal_configs(gpu.arch, gpu.shared_memory)


@cache
def seeds(gpu: Gpu) -> tuple[TileConfig, ...]:
    """What every run on `gpu` considers, sorted; each is legal, and none comes twice."""
    grid = product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5))
    found = {TileConfig(m, n, k, warps, stages, GROUP_M) for m, n, k, warps, stages in grid}
    found |= {default_config(GemmShape(m, 4096, 4096)) for m in (16, 64, 4096)}
    found |= set(_listed(gpu))
    return tuple(sorted(c for c in found if _is_legal(c, gpu)))


def _listed(gpu: Gpu) -> Iterator[TileConfig]:
    kernel, rows = (Kernel.WGMMA, _HOPPER) if gpu.arch == 90 else (Kernel.MMA_SYNC, _AMPERE)
    for m, n, k, warps, all_stages, shares in rows:
        for stages, stream_k in product(all_stages, shares):
            yield TileConfig(m, n, k, warps, stages, GROUP_M, kernel, stream_k)


def candidates(shape: GemmShape, gpu: Gpu) -> list[TileConfig]:
    """The seeds that make sense for one shape, the default always among them."""
    return sorted({*(c for c in seeds(gpu) if suits(c, shape)), default_config(shape)})


def suits(config: TileConfig, shape: GemmShape) -> bool:
    """False for a tile much higher than M, and where K is no multiple of the 16 bytes that a kernel copies at once."""
    low = config.block_m <= max(64, 2 * shape.m)
    return low and (config.kernel is Kernel.TRITON or shape.k % 16 == 0)


def neighbours(config: TileConfig, gpu: Gpu) -> list[TileConfig]:
    """The legal configurations a step from `config`, sorted.

    A step is the next value of one parameter either way, or of two that pay for each other: a side of the tile for the
    other, a longer step of K for fewer stages, a larger tile for more warps.
    """
    found = {
        _with(config, dict(zip(names, values, strict=True)))
        for names in _STEPS
        for values in product(*(_beside(config, name) for name in names))
    }
    return sorted(c for c in found if _is_legal(c, gpu))


_STEPS = (
    ("block_m",), ("block_n",), ("block_k",), ("num_warps",), ("num_stages",), ("stream_k",), ("group_m",),
    ("block_m", "block_n"), ("block_k", "num_stages"), ("block_m", "num_warps"), ("block_n", "num_warps"),
    ("block_m", "num_stages"), ("block_n", "num_stages"),
)  # fmt: skip


def _beside(config: TileConfig, name: str) -> list[int]:
    """The values next to the one that `config` has."""
    values = BANDS if name == "group_m" else getattr(DOMAINS[config.kernel], name)
    mine = getattr(config, name)
    lower = [value for value in values if value < mine]
    higher = [value for value in values if value > mine]
    return lower[-1:] + higher[:1]


def _with(config: TileConfig, values: dict[str, Any]) -> TileConfig:
    return replace(config, **values, schedule=None)  # the usual one of the new tile


def _is_legal(config: TileConfig, gpu: Gpu) -> bool:
    return why_illegal(config, arch=gpu.arch, shared_memory=gpu.shared_memory) is None
