"""The amount of work that a property may cause on an executor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from int8kit.verify.examples.guarded_buffers import HUGE_STRIDE_BYTES
from int8kit.verify.executors import Executor

T = TypeVar("T")
MAX_ROWS_REPEATED = 100  # M and N of an example for which the kernel runs several times


@dataclass(frozen=True)
class Share:
    """The part of a property's examples that one child tries: share `number` of `of`, from 0."""

    number: int = 0
    of: int = 1

    def pick(self, items: Iterable[T]) -> tuple[T, ...]:
        """The items of this share. The shares have no item in common, and together they have all items."""
        return tuple(items)[self.number :: self.of]

    def count(self, total: int) -> int:
        """The part of `total` drawn examples, at least 1."""
        return max(1, len(range(self.number, total, self.of)))


WHOLE = Share()


@dataclass(frozen=True)
class Budget:
    """The number of examples of a property, and the largest extents that an executor can afford."""

    examples: int
    max_m_n: int
    max_ops: int  # 2 M N K
    large_k: bool  # also the largest K
    huge_strides: bool  # also rows beyond 2**31 elements

    def divided(self, cost: int) -> Budget:
        """The budget of a property whose examples cost `cost` times as much."""
        if cost == 1:
            return self
        return replace(
            self,
            examples=max(1, self.examples // cost),
            max_m_n=min(self.max_m_n, MAX_ROWS_REPEATED),
            max_ops=self.max_ops // cost,
        )


def budget(executor: Executor, examples: int | None) -> Budget:
    """The budget of a property on `executor`; without `examples`, all properties take about a minute.

    The interpreter does some 10^7 operations a second. A GPU is fast, but compiles for half a second for each example.
    """
    if executor.on == "interpreter":
        return Budget(examples or 150, max_m_n=150, max_ops=4_000_000, large_k=False, huge_strides=True)
    roomy = torch.cuda.mem_get_info()[0] > HUGE_STRIDE_BYTES
    return Budget(examples or 60, max_m_n=600, max_ops=2_000_000_000, large_k=True, huge_strides=roomy)
