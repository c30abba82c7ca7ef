"""Interleaved timing: every call is timed once per round, in an order that is shuffled in each round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from int8kit.spec import POLICIES, POLICY
from int8kit.timing.gpu_state import Sensors

SAMPLE_US = 4000  # a sample repeats its call for about this long, so that the resolution of events does not matter

LOAD_US = 30000  # length of the work that is queued before the clock is read: an idle GPU lowers its clock at once


def shared_policy() -> str:
    """The part of the measurement policy that the tuner and the benchmark share.

    `spec.POLICIES` adds the tuner's operation (first clause), its sample length and its capture (last clause).
    """
    _, *shared, _ = POLICIES[POLICY].split("; ")
    return "; ".join(clause.partition(", in samples of")[0] for clause in shared)


@dataclass(frozen=True)
class Times:
    """Microseconds of one call over the rounds."""

    p20: float
    p50: float
    p80: float


def interleave(
    calls: Sequence[Callable[[], Any]], rounds: int, sample_us: int = SAMPLE_US, *, launches: int = 1
) -> list[Times]:
    """Times of each of `calls`: one sample of about sample_us per round, in a new but reproducible order each round.

    launches: number of launches in one call; the times are of one launch.

    The order is shuffled because a call inherits the GPU's clock from the one before it. At the power limit that
    changes a time by some per cent.
    """
    repeats = []
    for call in calls:
        us = sample(call, 1)
        # one launch is enough for a long call; a short one may have waited for the host, so it is timed again
        repeats.append(max(1, round(sample_us / (us if us > sample_us else sample(call, 1)))))
    samples: list[list[float]] = [[] for _ in calls]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample(range(len(calls)), len(calls)):
            samples[i].append(sample(calls[i], repeats[i]) / launches)
    return [quantiles(times) for times in samples]


def under_load(call: Callable[[], Any], us: float) -> dict[str, Any] | None:
    """State of the GPU (`Sensors.read`) while `call`, which takes `us` microseconds, is running."""
    for _ in range(max(1, round(LOAD_US / us))):
        call()
    state = Sensors().read()
    torch.cuda.synchronize()
    return state


def sample(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds per call: the mean of `repeats` calls between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / repeats


def quantiles(times: list[float]) -> Times:
    """The 20 %, 50 % and 80 % quantiles of one or more times, in the unit of the times."""
    if len(times) < 2:
        return Times(times[0], times[0], times[0])
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return Times(cuts[1], statistics.median(times), cuts[7])
