"""Interleaved timing: each call once a round, in an order that is shuffled each round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from int8kit.timing.gpu_state import Sensors

SAMPLE_US = 4000  # launches are repeated to fill about this long, so that events' resolution does not matter

LOAD_US = 30000  # so much work is queued before the card is asked for its clock: idle cards clock down at once


@dataclass(frozen=True)
class Times:
    """Microseconds of one call over the rounds."""

    p20: float
    p50: float
    p80: float


def interleave(
    calls: Sequence[Callable[[], Any]], rounds: int, sample_us: int = SAMPLE_US, *, launches: int = 1
) -> list[Times]:
    """Time each of `calls` once a round, for about sample_us, in an order shuffled anew (but always alike) each round.

    launches: how many one call makes; times are of one.

    Shuffled, because a contestant inherits the clock of the one before it: at the power limit some per cent.
    """
    repeats = []
    for call in calls:
        us = _sample(call, 1)
        # what takes long is timed well by one launch; what is short may have waited for the host
        repeats.append(max(1, round(sample_us / (us if us > sample_us else _sample(call, 1)))))
    samples: list[list[float]] = [[] for _ in calls]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample(range(len(calls)), len(calls)):
            samples[i].append(_sample(calls[i], repeats[i]) / launches)
    return [_quantiles(times) for times in samples]


def under_load(call: Callable[[], Any], us: float) -> dict[str, Any] | None:
    """The card's state (`sensors`) while `call`, of `us` microseconds, is running."""
    for _ in range(max(1, round(LOAD_US / us))):
        call()
    state = Sensors().read()
    torch.cuda.synchronize()
    return state


def _quantiles(times: list[float]) -> Times:
    if len(times) < 2:
        return Times(times[0], times[0], times[0])
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return Times(cuts[1], statistics.median(times), cuts[7])


def _sample(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds a call, mean over `repeats` launches between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / repeats
