"""The record of a seeded fault, and the tiles with which faults of the Gluon kernels run."""

from __future__ import annotations

from dataclasses import dataclass

from int8kit.spec import Kernel, TileConfig

_GLUON = "written in Gluon, which the interpreter does not run"
_FILES = {
    "kernels/gemm_mma_sync.py": Kernel.MMA_SYNC, "kernels/gemm_wgmma.py": Kernel.WGMMA,
    "kernels/stream_k.py": Kernel.MMA_SYNC,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` becomes `new` at its only place in `file`, a path within the package, and so do `more` pairs."""

    name: str
    file: str
    old: str
    new: str
    fault: str  # the mistake, in one line
    expected: str  # the property that should fail, tried first
    gpu_only: str = ""  # the reason why only a GPU shows it; "" if the interpreter does too
    more: tuple[tuple[str, str], ...] = ()  # further replacements in the file, each of a text with one place

    @property
    def edits(self) -> tuple[tuple[str, str], ...]:
        """All replacements, (old, new)."""
        return (self.old, self.new), *self.more

    @property
    def kernel(self) -> Kernel:
        """The kernel whose configurations run the fault. `stream_k` serves two; mma_sync runs on more GPUs."""
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
        TileConfig(256, 64, 128, num_warps=8, num_stages=2, group_m=1, kernel=Kernel.WGMMA),
        TileConfig(64, 128, 128, num_warps=8, num_stages=4, group_m=8, kernel=Kernel.WGMMA, stream_k=1),
        TileConfig(256, 64, 128, num_warps=8, num_stages=3, group_m=3, kernel=Kernel.WGMMA, stream_k=1),
    ),
}
"""Configurations for faults of the Gluon kernels. Other faults run with `verify_kernels.DEFAULT_TILES`."""
