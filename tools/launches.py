"""Launch every kernel at small sizes with tails, for tools/sanitize.sh, which finds invalid accesses.

    python tools/launches.py             # on a GPU
    python tools/launches.py --dry-run   # in Triton's interpreter: only the kernels that are not in Gluon

The last line counts the launches; tools/hazards.py expects it.
"""

from __future__ import annotations

import os
import sys

DRY = "--dry-run" in sys.argv[1:]
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from int8kit import gpus  # noqa: E402
from int8kit.kernels import gemm  # noqa: E402
from int8kit.kernels.qk_norm_rope import qk_norm_rope  # noqa: E402
from int8kit.kernels.quantize import quantize  # noqa: E402
from int8kit.kernels.residual_norm_quantize import residual_norm_quantize  # noqa: E402
from int8kit.kernels.rms_norm_quantize import rms_norm_quantize  # noqa: E402
from int8kit.kernels.swiglu_quantize import swiglu_quantize  # noqa: E402
from int8kit.spec import Kernel, TileConfig  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
SHAPES = ((1, 128, 256), (300, 400, 1040))  # M, N, K: a single row, and tails in all three
TRITON = (TileConfig(16, 64, 128, 4, 4), TileConfig(128, 128, 64, 8, 4))
MMA_SYNC = tuple(
    TileConfig(*tile, 8, Kernel.MMA_SYNC, stream_k)
    for *tile, stream_k in (
        (128, 128, 128, 4, 3, 0), (128, 128, 128, 4, 3, 2), (256, 128, 64, 8, 4, 1), (16, 64, 128, 4, 4, 4),
    )
)  # fmt: skip
WGMMA = tuple(
    TileConfig(m, n, 128, 8, stages, 8, Kernel.WGMMA, stream_k)
    for m, n, stages, stream_k in ((128, 128, 6, 0), (256, 128, 4, 0), (256, 128, 4, 1), (64, 128, 8, 1))
)


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE).bfloat16()


def products(config: TileConfig) -> None:
    """Launch one configuration at each shape: accumulators, output and SwiGLU."""
    arch = "sm86" if config.kernel is Kernel.MMA_SYNC else None
    for m, n, k in SHAPES:
        x, w = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=DEVICE) for rows in (m, n))
        sx, sw, bias = torch.rand(m, device=DEVICE), torch.rand(n, device=DEVICE), normal(n)
        gemm.accumulate(x, w, config=config, arch=arch)
        gemm.scaled_mm(x, w, sx, sw, bias, config=config, arch=arch)
        gemm.scaled_mm_swiglu(x, w, sx, sw, bias, config=config, arch=arch)


def over_rows(m: int) -> None:
    """Launch the row kernels at Ideogram 4's widths; the longest row is read from memory twice."""
    for k in (100, 4608) if DRY else (100, 4608, 53248):
        quantize(normal(m, k))
    one = normal(4608), normal(1, 4608)
    rms_norm_quantize(normal(m, 4608), *one)
    residual_norm_quantize(normal(m, 4608), normal(m, 4608), *one, *one)
    swiglu_quantize(normal(m, 2 * 12288))
    qk_norm_rope(normal(m, 3 * 18 * 256), normal(256), normal(256), normal(m, 256), normal(m, 256), 18)


def main() -> None:
    gpu = gpus.present()
    if gpu is None and not DRY:
        sys.exit("launches: no CUDA device; --dry-run uses Triton's interpreter")
    configs = [*TRITON, *(() if DRY else MMA_SYNC), *(WGMMA if gpu and gpu.arch == 90 else ())]
    with np.errstate(all="ignore"):
        for config in configs:
            products(config)
        for m in (1, 5):
            over_rows(m)
    if not DRY:
        torch.cuda.synchronize()
    print(f"{len(configs)} configurations at {len(SHAPES)} shapes, 5 kernels over rows: launched")


if __name__ == "__main__":
    main()
