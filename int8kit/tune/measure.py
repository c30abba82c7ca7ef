"""Timing on the card in this machine, by one stated policy.

The policy is `spec.POLICIES[spec.POLICY]`, which every database carries in its header: change one, change the other.

Before anything is timed, `check_health` multiplies two bf16 matrices: a card that throttles gives no figures worth
storing (a throttled RTX 3090 has been seen at an eighth of its rate). Zeros are never timed: they draw less power, so
clocks rise and the figure flatters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch

from int8kit import reference
from int8kit.errors import ConfigError
from int8kit.gpus import Gpu
from int8kit.kernels import gemm, quantize
from int8kit.spec import GemmShape, TileConfig
from int8kit.timing.interleave import Times, interleave

HOT_US = 20000  # of finalists: long enough that the card's power limit counts, as it does in a run of a model


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
