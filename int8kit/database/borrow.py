"""The database that a GPU borrows until somebody tunes for it.

    lender_of(Database(gpus.get("h100")), toolchain, read)  ->  the database of the h200

A GPU whose own database has few kernels borrows the nearest one of its architecture. If none is of its
architecture, one of an architecture with the same kernels lends. Databases with timed entries come first: their
configurations won among thousands, and those of a modelled database among a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from int8kit.database.database import Database
from int8kit.gpus import GPUS, Gpu
from int8kit.spec import Source
from int8kit.toolchain import Toolchain

ENOUGH = 8
"""Winning kernels with which a database needs no other one. A tuner's run over a model leaves 11 or more."""

_FAMILIES = ((80, 86, 87, 88, 89), (90,), (100, 101, 103, 110), (120, 121))
"""Architectures whose kernels and tensor cores are alike."""

_FIGURES = ("sms", "l2_bytes", "clock_mhz", "shared_memory")


def lender_of(own: Database, toolchain: Toolchain, read: Callable[[str], Database | None]) -> Database | None:
    """The database that `own` borrows, or None if it has enough configurations or nobody lends.

    read: gives the database of a GPU by its alias, or None.
    """
    if has_enough(own, toolchain):
        return None
    family = next((archs for archs in _FAMILIES if own.gpu.arch in archs), (own.gpu.arch,))
    others = (read(gpu.alias) for gpu in GPUS.values() if gpu.arch in family and gpu.alias != own.gpu.alias)
    able = [one for one in others if one is not None and has_enough(one, toolchain)]
    return min(able, key=lambda one: _rank(one, own.gpu), default=None)


def has_enough(database: Database, toolchain: Toolchain) -> bool:
    """Whether entries of ENOUGH different kernels may serve."""
    return len({replace(entry.config, group_m=0) for entry in database.usable_entries(toolchain)}) >= ENOUGH


def _rank(lender: Database, gpu: Gpu) -> tuple[int, bool, float, str]:
    """The less, the better: distance of the architectures, whether nothing was timed, distance of the figures."""
    timed = any(entry.source is not Source.MODELLED for entry in lender.entries)
    distance = sum(abs(math.log(getattr(lender.gpu, name) / getattr(gpu, name))) for name in _FIGURES)
    return abs(lender.gpu.arch - gpu.arch), not timed, distance, lender.gpu.alias
