"""Wall-clock timing of long calls, such as the steps of a model: interleaved round by round, synchronized each time.

    interleaved({"int8": step, "bf16": other_step}, rounds=8)  ->  {"int8": Quantiles(p20=..., p50=..., ...), ...}

`interleave` times short calls by CUDA events. Here the host's time counts too, and a machine without a GPU works.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from int8kit.errors import InputError
from int8kit.gpus import present
from int8kit.timing.health import check_health
from int8kit.timing.interleave import quantiles

WARM_UP = 2

POLICY = (
    "wall clock around a synchronized call; contestants interleaved round by round in an order shuffled anew each "
    "time; medians with p20 and p80"
)
"""How `interleaved` measures, for result documents."""


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds of one call over the rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int


def interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = WARM_UP,
    on_round: Callable[[int, Mapping[str, float]], None] = lambda number, ms: None,
    *,
    gate: bool = True,
) -> dict[str, Quantiles]:
    """Milliseconds of each contestant, by name: one synchronized call per round, in a new but reproducible order.

    warm_up: rounds before the first timed one. on_round: receives the number of each timed round, from 1, and its
    milliseconds by name. gate: check the health of a CUDA device first (`check_health`).

    Raises InputError without contestants and for a bad number of rounds; CheckFailed for a GPU that is not healthy.
    """
    if not contestants:
        raise InputError("no contestants: expected 1 or more")
    if rounds < 1:
        raise InputError(f"{rounds} rounds: expected 1 or more")
    if warm_up < 0:
        raise InputError(f"{warm_up} rounds to warm up: expected 0 or more")
    gpu = present() if gate else None
    if gpu is not None:
        check_health(gpu)
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1 - warm_up, rounds + 1):
        ms = {name: synchronized_ms(contestants[name]) for name in order.sample(list(contestants), len(contestants))}
        if number >= 1:
            for name, one in ms.items():
                samples[name].append(one)
            on_round(number, ms)
    return {name: _quantiles(times) for name, times in samples.items()}


def synchronized_ms(call: Callable[[], Any]) -> float:
    """Milliseconds from the start of `call`, on an idle GPU, until the GPU is idle again."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def synchronize() -> None:
    """Wait for the current CUDA device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quantiles(ms: list[float]) -> Quantiles:
    times = quantiles(ms)
    return Quantiles(times.p20, times.p50, times.p80, len(ms))
