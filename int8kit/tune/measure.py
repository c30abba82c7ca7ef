"""Timing on the card in this machine, by one stated policy.

The policy is `spec.POLICIES[spec.POLICY]`, which every database carries in its header: change one, change the other.

Before anything is timed, `check_health` multiplies two bf16 matrices: a card that throttles gives no figures worth
storing (a throttled RTX 3090 has been seen at an eighth of its rate). Zeros are never timed: they draw less power, so
clocks rise and the figure flatters.
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from int8kit import reference
from int8kit.gpus import Gpu
from int8kit.kernels import gemm, quantize
from int8kit.spec import CheckFailed, ConfigError, GemmShape, TileConfig

HEALTHY_SHARE = 0.5  # of the data sheet's dense bf16 rate; healthy cards reach 0.75 to 0.92 of it
SAMPLE_US = 4000  # launches are repeated to fill about this long, so that events' resolution does not matter
HOT_US = 20000  # of finalists: long enough that the card's power limit counts, as it does in a run of a model


@dataclass(frozen=True)
class Times:
    """Microseconds of one call over the rounds."""

    p20: float
    p50: float
    p80: float


def check_health(gpu: Gpu) -> float:
    """TFLOP/s of a 4096^3 bf16 product on this card. Raises CheckFailed if the card is far under its rate."""
    a, b = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        a @ b
    us = _sample(lambda: a @ b, 20)
    tflops = 2 * 4096**3 / us / 1e6
    if tflops < HEALTHY_SHARE * gpu.bf16_tflops:
        raise CheckFailed(
            f"{gpu.name} makes {tflops:.0f} bf16 TFLOP/s; healthy is {HEALTHY_SHARE * gpu.bf16_tflops:.0f} or more; "
            "nothing was stored: close other programs, let it cool, and see `nvidia-smi -q -d PERFORMANCE`"
        )
    return tflops


class Bench:
    """One shape's operands on the card, with enough copies of the weight that none is found in L2."""

    def __init__(self, shape: GemmShape, gpu: Gpu, *, arch: str | None = None, seed: int = 0) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        m, n, k = shape.m, shape.n, shape.k
        self.shape, self.arch = shape, arch
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=generator)
        self.xq, self.sx = quantize.quantize(x)
        copies = 1 + -(-2 * gpu.l2_bytes // (n * k))
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
        wq, self.sw = quantize.quantize(w)
        self.weights = [wq] + [wq.clone() for _ in range(copies - 1)]
        self.bias = torch.randn(n, device="cuda", dtype=torch.bfloat16, generator=generator)
        self.out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        self.x, self.w16 = x, [w] + [w.clone() for _ in range(copies - 1)]
        acc = torch._int_mm(self.xq, wq.t()) if m > 16 else reference.accumulate(self.xq, wq)
        self.truth = reference.dequantize(acc, self.sx, self.sw, self.bias, torch.bfloat16)
        self._turn = 0

    def call(self, config: TileConfig) -> Callable[[], Any]:
        """A function that launches the GEMM once under `config`, each time on the next copy of the weight."""

        def launch() -> None:
            self._turn += 1
            w = self.weights[self._turn % len(self.weights)]
            gemm.scaled_mm(self.xq, w, self.sx, self.sw, self.bias, config=config, out=self.out, arch=self.arch)

        return launch

    def bf16(self) -> None:
        """One bf16 product of the same shape by torch's library, on the next copy of the weight."""
        self._turn += 1
        torch.mm(self.x, self.w16[self._turn % len(self.w16)].t(), out=self.out)

    def why_not(self, config: TileConfig) -> str | None:
        """None if `config` runs here, bit-equal to the truth; else the reason, opening with its class."""
        self.out.fill_(torch.nan)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", gemm.Fallback)
                self.call(config)()
            torch.cuda.synchronize()
        except ConfigError as error:
            return f"resources: {error}"
        except Exception as error:  # the compiler's own errors have no common root
            return f"compile: {config}: {type(error).__name__}: {error}"
        return None if torch.equal(self.out, self.truth) else f"wrong: {config} is not bit-equal to the reference"


def interleave(calls: Sequence[Callable[[], Any]], rounds: int, sample_us: int = SAMPLE_US) -> list[Times]:
    """Time each of `calls` once a round, for about sample_us, in an order shuffled anew (but always alike) each round.

    Shuffled, because a contestant inherits the clock of the one before it: at the power limit some per cent.
    """
    repeats = []
    for call in calls:
        _sample(call, 2)
        repeats.append(max(1, round(sample_us / _sample(call, 2))))
    samples: list[list[float]] = [[] for _ in calls]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample(range(len(calls)), len(calls)):
            samples[i].append(_sample(calls[i], repeats[i]))
    return [_quantiles(times) for times in samples]


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
