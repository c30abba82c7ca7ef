"""Ranking of known configurations for a shape that was not tuned, by the cost model.

    ranking = Ranking(machine_of(gpu), (Ranked(config, needs), ...))
    ranking.estimates(GemmShape(700, 3000, 2048))   ->  [Estimate(14.2, config, Origin.OWN), ...], the fastest first

Ranked are the configurations that the GPU's database uses, those that it borrows, and the default of its architecture.
Nothing is compiled or timed: each configuration comes with the resources of its compiled kernel.

A borrowed database knows more than the model: its entries were the fastest on their GPU. The model may put another
configuration before an entry, for the lender and for the entry's shape. Then it estimates that one too fast by at least
that factor. The factor counts for shapes that are close to the entry's, and the entry is preferred. So on a GPU like
the lender the entry's configuration serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from int8kit import cost_model
from int8kit.cost_model import Machine, Needs
from int8kit.spec import GemmShape, Operation, TileConfig, architecture_default, supports

CLOSE = 1.1
"""An entry serves extents up to this many times larger or smaller. Beyond it the cost model chooses better.

93 shapes of an H200, and of sm_86 code, were looked up without the entries of their weights. The model's choice ran at
0.99 of the fastest in the mean, and the entry's configuration within a factor of 4 at 0.92 and 0.90, at least 0.29.
"""

TOLERANCE = 0.02
"""Estimates that differ by less count as equal. Then the configuration serves that won for the most shapes.

Without it, RTX 3090 figures made a rare configuration win by 0.3 %, which took 1.09 times the time on a GPU.
"""


class Origin(StrEnum):
    """Where a ranked configuration comes from."""

    OWN = "own"
    BORROWED = "borrowed"
    DEFAULT = "default"


class Ranked(NamedTuple):
    """A configuration, the resources of its kernel, and whether it comes from the lender's database."""

    config: TileConfig
    needs: Needs
    borrowed: bool = False


class Evidence(NamedTuple):
    """An entry of the lender: the fastest configuration of a shape on its GPU."""

    shape: GemmShape
    config: TileConfig


class Estimate(NamedTuple):
    """The cost model's microseconds for a configuration."""

    us: float
    config: TileConfig
    origin: Origin


@dataclass(frozen=True)
class Ranking:
    """Everything that ranks configurations for one weight on one GPU."""

    machine: Machine
    kernels: tuple[Ranked, ...] = ()  # the preferred ones first
    lender: Machine | None = None
    evidence: tuple[Evidence, ...] = ()  # the lender's entries of close weights

    def estimates(self, shape: GemmShape, operation: Operation = Operation.GEMM) -> list[Estimate]:
        """The configurations that can serve, fastest first.

        The order of `kernels` decides among those within TOLERANCE of the least time; the lender's entry comes first.
        """
        tuned, factors = self._correction(shape)
        machine = self.machine
        default = architecture_default(shape, machine.arch, machine.shared_memory, operation)
        own = [(one, Origin.BORROWED if one.borrowed else Origin.OWN) for one in self.kernels]
        last = Ranked(default, cost_model.assumed_needs(default, machine.arch))
        found = []
        for (config, needs, _), origin in (*own, (last, Origin.DEFAULT)):
            if supports(config.kernel, shape, operation):
                us = cost_model.estimate(shape, config, needs, machine, operation) * factors.get(config, 1.0)
                found.append(Estimate(us, config, origin))
        fitting = [one for one in found if math.isfinite(one.us)]
        least = min((one.us for one in fitting), default=0.0)
        bound = least + TOLERANCE * (least - cost_model.LAUNCH_US)  # the launch is the same for all
        level = [one for one in fitting if one.us <= bound]
        level.sort(key=lambda one: one.config != tuned)  # a stable sort
        return level + sorted((one for one in fitting if one.us > bound), key=lambda one: one.us)

    def _correction(self, shape: GemmShape) -> tuple[TileConfig | None, dict[TileConfig, float]]:
        """The configuration of the lender's closest entry, and how much too fast the model estimates the others."""
        close = [one for one in self.evidence if are_within(one.shape, shape, CLOSE)]
        if self.lender is None or not close:
            return None, {}
        entry = min(close, key=lambda one: distance(one.shape, shape))
        us = {
            config: cost_model.estimate(entry.shape, config, needs, self.lender)
            for config, needs, borrowed in self.kernels
            if borrowed
        }
        fastest = us.get(entry.config, 0.0)
        return entry.config, {config: max(1.0, fastest / own) for config, own in us.items()}


def are_within(a: GemmShape, b: GemmShape, factor: float) -> bool:
    """Whether no extent of one shape is more than `factor` times that of the other."""
    return all(max(x, y) <= factor * min(x, y) for x, y in ((a.m, b.m), (a.n, b.n), (a.k, b.k)))


def distance(a: GemmShape, b: GemmShape) -> float:
    """The sum of the log ratios of M, N and K."""
    return sum(abs(math.log(x / y)) for x, y in ((a.m, b.m), (a.n, b.n), (a.k, b.k)))
