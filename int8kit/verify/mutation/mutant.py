"""A seeded fault, and the tiles that faults of the Gluon kernels run with."""

from __future__ import annotations

from dataclasses import dataclass

from int8kit.spec import Kernel, TileConfig

_GLUON = "written in Gluon, which the interpreter does not run"
_FILES = {
    "kernels/gemm_mma_sync.py": Kernel.MMA_SYNC, "kernels/gemm_wgmma.py": Kernel.WGMMA,
    "kernels/tile_scheduler.py": Kernel.MMA_SYNC,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` becomes `new` at its only place in `file`, a path within the package."""

    name: str
    file: str
    old: str
    new: str
    fault: str  # what is wrong, in one line
    expected: str  # the property of `checks` that should differ, tried first
    gpu_only: str = ""  # why only a GPU shows it; "" if the interpreter does too

    @property
    def kernel(self) -> Kernel:
        """The kernel whose configurations run the fault. `schedule` serves two; Ampere's runs on more cards."""
        return _FILES.get(self.file, Kernel.TRITON)

    @property
    def needs_gpu(self) -> str:
        """Why Triton's interpreter cannot show the fault, or ""."""
        return _GLUON if self.kernel is not Kernel.TRITON else self.gpu_only


TILES = {  # small, so that a small matrix has many of them; whole tiles and stream-K
    Kernel.MMA_SYNC: (
        TileConfig(16, 64, 64, num_warps=4, num_stages=2, group_m=2, kernel=Kernel.MMA_SYNC),
        TileConfig(64, 64, 128, num_warps=4, num_stages=3, group_m=1, kernel=Kernel.MMA_SYNC),
        TileConfig(16, 64, 64, num_warps=4, num_stages=3, group_m=3, kernel=Kernel.MMA_SYNC, stream_k=1),
        TileConfig(32, 64, 128, num_warps=4, num_stages=2, group_m=8, kernel=Kernel.MMA_SYNC, stream_k=2),
    ),
    Kernel.WGMMA: (
        TileConfig(64, 64, 128, num_warps=8, num_stages=3, group_m=2, kernel=Kernel.WGMMA),
        TileConfig(256, 64, 128, num_warps=8, num_stages=4, group_m=1, kernel=Kernel.WGMMA),
        TileConfig(64, 128, 128, num_warps=8, num_stages=4, group_m=8, kernel=Kernel.WGMMA, stream_k=1),
        TileConfig(256, 64, 128, num_warps=8, num_stages=3, group_m=3, kernel=Kernel.WGMMA, stream_k=1),
    ),
}
"""Configurations of the Gluon kernels that their mutants run with; those of the plain one are `checks.SMALL_TILES`."""
