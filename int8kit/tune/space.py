"""The configurations that a tuner considers for a card, each legal and each once.

The pointer kernel's are a grid that leaves out what is legal and never wins: tiles under 64 x 64 (for M of 64 and
more), more than 5 stages on cards with 100 KiB of shared memory, one or two warps on a large tile. The other kernels
take longer to compile, and their space is smoother: a list. Widths of a band other than GROUP_M are tried on the card,
with the fastest tiles; they change neither registers nor shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from int8kit.gpus import Gpu
from int8kit.spec import GemmShape, Kernel, TileConfig, default_config, why_illegal

GROUP_M = 8
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


def _listed(gpu: Gpu) -> Iterator[TileConfig]:
    kernel, rows = (Kernel.HOPPER, _HOPPER) if gpu.arch == 90 else (Kernel.AMPERE, _AMPERE)
    for m, n, k, warps, all_stages, shares in rows:
        for stages, stream_k in product(all_stages, shares):
            yield TileConfig(m, n, k, warps, stages, GROUP_M, kernel, stream_k)


def configs(gpu: Gpu) -> list[TileConfig]:
    """The tuner's candidates on `gpu`, sorted; each is legal, and none comes twice."""
    grid = product((64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4, 5))
    candidates = {TileConfig(m, n, k, warps, stages, GROUP_M) for m, n, k, warps, stages in grid}
    candidates |= {default_config(GemmShape(m, 4096, 4096)) for m in (16, 64, 4096)}
    candidates |= set(_listed(gpu))
    return sorted(c for c in candidates if why_illegal(c, arch=gpu.arch, shared_memory=gpu.shared_memory) is None)


def candidates(shape: GemmShape, gpu: Gpu) -> list[TileConfig]:
    """The candidates for one shape: tiles no higher than M needs, and the default always among them.

    The kernels that copy 16 bytes at a time are left out where K is no multiple of 16.
    """
    low = [c for c in configs(gpu) if c.block_m <= max(64, 2 * shape.m)]
    served = [c for c in low if c.kernel is Kernel.POINTER or shape.k % 16 == 0]
    return sorted({*served, default_config(shape)})


def bands(config: TileConfig) -> list[TileConfig]:
    """`config` with each other width of a band."""
    from dataclasses import replace

    return [replace(config, group_m=width) for width in BANDS if width != config.group_m]
