"""GPU memory that several children share: an example waits for memory that another child holds.

The largest examples have matrices of eight gigabytes. A child that keeps one cached, or several that need one at the
same moment, must not fail: that would be taken for a failure of the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
KEPT_BYTES = 1 << 30  # that a child may keep cached between two examples
TRIES = 20
PAUSE_S = 2.0  # in all less than the silence that ends a child


def with_memory(check: Callable[[], T], pause: float = PAUSE_S) -> T:
    """Return `check()`; try it again after a pause if the GPU's memory is full. Raises what the last try raises."""
    for _ in range(TRIES - 1):
        try:
            return check()
        except torch.OutOfMemoryError:
            pass  # the traceback, which holds tensors, is gone behind this block
        finally:
            _release()
        time.sleep(pause)
    return check()


def _release() -> None:
    """Give large cached memory back to the other children."""
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()
