"""Memory that a generation needs, and the memory that there is."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from int8kit.errors import InputError

if TYPE_CHECKING:
    import torch

    from int8kit.gpus import Gpu


def is_short(device: torch.device, needed: int) -> bool:
    """Whether a GPU may not have `needed` bytes left. False on a CPU."""
    if device.type != "cuda":
        return False
    import torch

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached < needed


def check_size(height: int, width: int, present: Gpu | None) -> None:
    """Raise InputError for an image of this size in pixels that no memory here holds.

    A lower bound: the VAE's last layer reads and writes 8 channels or more in bf16, and its image is float32.
    """
    needed = (2 * 8 * 2 + 3 * 4) * height * width
    _check(needed, present, f"size {width}x{height}: needs more than", "name a smaller --size")


def check_batch(needed: int, count: int, height: int, width: int, present: Gpu | None) -> None:
    """Raise InputError for `count` images at once whose activations, `needed` bytes, no memory here holds."""
    what = f"{count} images of {width}x{height} at once: they need about"
    _check(needed, present, what, "name fewer --images, fewer prompts, or a smaller --size")


def _check(needed: int, present: Gpu | None, what: str, remedy: str) -> None:
    total = _machine_bytes() if present is None else present.memory_gib << 30
    if total and needed > total:
        where = "this machine" if present is None else present.name
        raise InputError(f"{what} {needed / 2**30:.0f} GiB, and {where} has {total / 2**30:.0f}; {remedy}")


def _machine_bytes() -> int:
    """Memory of this machine; 0 where Python cannot ask."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0


def peak_bytes(device: torch.device) -> int:
    """Peak memory of the GPU, or of this process on a CPU; 0 on Windows, which does not count it this way."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
