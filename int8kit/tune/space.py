"""The configurations that a tuner considers for a card: every legal combination of a small grid, each once.

The grid leaves out what is legal and never wins: tiles under 64 x 64 (for M of 64 and more), more than 5 stages on
cards with 100 KiB of shared memory, one or two warps on a large tile.
"""

from __future__ import annotations

from itertools import product

from int8kit.gpus import Gpu
from int8kit.spec import GemmShape, TileConfig, default_config, why_illegal

GROUP_M = 8


def configs(gpu: Gpu) -> list[TileConfig]:
    """The tuner's candidates on `gpu`, sorted; each is legal, and none comes twice."""
    grid = product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5))
    candidates = {TileConfig(m, n, k, warps, stages, GROUP_M) for m, n, k, warps, stages in grid}
    candidates |= {default_config(GemmShape(m, 4096, 4096)) for m in (16, 64, 4096)}
    return sorted(c for c in candidates if why_illegal(c, arch=gpu.arch, shared_memory=gpu.shared_memory) is None)


def candidates(shape: GemmShape, gpu: Gpu) -> list[TileConfig]:
    """The candidates for one shape: tiles no higher than M needs, and the default always among them."""
    low = [c for c in configs(gpu) if c.block_m <= max(64, 2 * shape.m)]
    return sorted({*low, default_config(shape)})
