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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from int8kit import reference
from int8kit.gpus import Gpu
from int8kit.kernels import gemm, quantize
from int8kit.sensors import Sensors
from int8kit.spec import CheckFailed, ConfigError, GemmShape, TileConfig

HEALTHY_SHARE = 0.5  # of the data sheet's dense bf16 rate; healthy cards reach 0.75 to 0.92 of it
SAMPLE_US = 4000  # launches are repeated to fill about this long, so that events' resolution does not matter
LOAD_US = 30000  # so much work is queued before the card is asked for its clock: idle cards clock down at once
HARMFUL = {"hardware slowdown", "software thermal", "hardware thermal", "power brake"}  # a power cap is everyday life
HOT_US = 20000  # of finalists: long enough that the card's power limit counts, as it does in a run of a model


@dataclass(frozen=True)
class Times:
    """Microseconds of one call over the rounds."""

    p20: float
    p50: float
    p80: float


def check_health(gpu: Gpu) -> float:
    """TFLOP/s of a 4096^3 bf16 product on this card.

    Raises CheckFailed if the card is far under its rate, or slowed by heat or its power supply.
    """
    a, b = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        a @ b
    us = _sample(lambda: a @ b, 20)
    tflops = 2 * 4096**3 / us / 1e6
    state = under_load(lambda: a @ b, us) or {}
    if held := HARMFUL & set(state.get("throttle") or ()):
        raise CheckFailed(
            f"{gpu.name} is held back by {', '.join(sorted(held))} at {state['temperature_c']} C and "
            f"{state['sm_mhz']} MHz; nothing was stored: let it cool, see `nvidia-smi -q -d PERFORMANCE`, try again"
        )
    if tflops < HEALTHY_SHARE * gpu.bf16_tflops:
        raise CheckFailed(
            f"{gpu.name} makes {tflops:.0f} bf16 TFLOP/s; healthy is {HEALTHY_SHARE * gpu.bf16_tflops:.0f} or more; "
            "nothing was stored: close other programs, let it cool, and see `nvidia-smi -q -d PERFORMANCE`"
        )
    return tflops


class ContextLost(Exception):
    """A kernel has broken this process's CUDA context: whatever is launched from now on fails."""


class Bench:
    """One shape's operands on the card, with enough copies of the weight that none is found in L2."""

    def __init__(self, shape: GemmShape, gpu: Gpu, *, arch: str | None = None, seed: int = 0) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        m, n, k = shape.m, shape.n, shape.k
        self.shape, self.arch = shape, arch
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, generator=generator)
        self.xq, self.sx = quantize.quantize(x)
        # a weight of twice the L2 and more drives itself out
        copies = 1 if n * k >= 2 * gpu.l2_bytes else 1 + -(-2 * gpu.l2_bytes // (n * k))
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16, generator=generator)
        wq, self.sw = quantize.quantize(w)
        self.weights = [wq] + [wq.clone() for _ in range(copies - 1)]
        self.bias = torch.randn(n, device="cuda", dtype=torch.bfloat16, generator=generator)
        self.out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        self.x, self.w16 = x, [w] + [w.clone() for _ in range(copies - 1)]
        acc = torch._int_mm(self.xq, wq.t()) if m > 16 else reference.accumulate(self.xq, wq)
        self.truth = reference.dequantize(acc, self.sx, self.sw, self.bias, torch.bfloat16)
        self._stream = torch.cuda.Stream()

    def call(self, config: TileConfig, copy: int = 0) -> None:
        """Launch the GEMM under `config`, on that copy of the weight."""
        w = self.weights[copy]
        gemm.scaled_mm(self.xq, w, self.sx, self.sw, self.bias, config=config, out=self.out, arch=self.arch)

    def bf16(self, copy: int) -> None:
        """One bf16 product of the same shape by torch's library, on that copy of the weight."""
        torch.mm(self.x, self.w16[copy].t(), out=self.out)

    def times(self, configs: Iterable[TileConfig], rounds: int, sample_us: int, *, bf16: bool = False) -> list[Times]:
        """Microseconds of a launch under each of `configs`, and of `bf16` last, if that is asked for.

        Each was launched before (`why_not`), and is timed as a graph of launches over all copies of the weight: a
        launch from Python takes longer than a small GEMM, and would hide it.
        """
        calls: list[Callable[[int], None]] = [partial(self.call, config) for config in configs]
        graphs = [self._graph(call) for call in [*calls, *([self.bf16] if bf16 else [])]]
        torch.cuda.synchronize()
        return interleave([graph.replay for graph in graphs], rounds, sample_us, launches=len(self.weights))

    def _graph(self, call: Callable[[int], None]) -> torch.cuda.CUDAGraph:
        call(0)  # a library may set itself up
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # not torch.cuda.graph: it collects garbage, for longer than all else takes
        with torch.cuda.stream(self._stream):
            graph.capture_begin()
            for copy in range(len(self.weights)):
                call(copy)
            graph.capture_end()
        return graph

    def why_not(self, config: TileConfig) -> str | None:
        """None if `config` runs here, bit-equal to the truth; else the reason, opening with its class.

        Raises ContextLost after a fault that ends this process's use of the card, such as an illegal address.
        """
        self.out.fill_(torch.nan)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", gemm.Fallback)
                self.call(config)
            torch.cuda.synchronize()
        except ConfigError as error:
            return f"resources: {error}"
        except Exception as error:  # the compiler's own errors have no common root
            try:
                torch.cuda.synchronize()
            except Exception:
                raise ContextLost(f"{config}: {error}") from None
            return f"compile: {config}: {type(error).__name__}: {error}"
        return None if torch.equal(self.out, self.truth) else f"wrong: {config} is not bit-equal to the reference"


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
