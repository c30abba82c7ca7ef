"""Timing of tile configurations on the present GPU, by the policy `spec.POLICIES[spec.POLICY]`.

Every database has the text of the policy in its header. A change here needs a new policy number there.

Before anything is timed, `timing.health.check_health` multiplies two bf16 matrices: times of a throttled GPU are not
worth storing (a throttled RTX 3090 ran at an eighth of its rate).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cached_property, partial

import torch

from int8kit.errors import ConfigError
from int8kit.gpus import Gpu
from int8kit.kernels import gemm
from int8kit.kernels.quantize import quantize
from int8kit.spec import GemmShape, SwigluShape, TileConfig
from int8kit.timing.captured import capture
from int8kit.timing.interleave import SAMPLE_US, Times, interleave
from int8kit.timing.operands import TimingOperands, poison

SUSTAINED_US, HOT_US = 20000, 100000
"""Lengths of a sample at the sustained clock, with few rows and with many. In the longer one the power limit acts as in
a run of a model. Few rows read little but the weight, and stay below the limit."""

HOT_ROWS = 1024
"""From this number of rows on, a GEMM is timed behind the quantization of its input. In a model it follows one, its
input comes from L2, and its programs start one after the other. On an H100, tiles that were 5 % faster by themselves
were 12 % slower so."""

INT_MM_ROWS, INT_MM_STEP = 17, 8  # torch._int_mm takes no fewer rows, and N and K that are multiples of 8


class ContextLost(Exception):
    """A kernel has broken this process's CUDA context: every later launch fails."""


class ShapeBench:
    """One shape's operands on the present GPU: checks configurations and times them."""

    def __init__(self, shape: GemmShape, gpu: Gpu, *, code_arch: str | None = None, seed: int = 0) -> None:
        """gpu: the present one. code_arch: code of an older architecture, such as "sm86"."""
        self.code_arch, self.operands = code_arch, TimingOperands(shape, gpu, seed=seed)
        o = self.operands
        # torch._int_mm is exact too, and fast where the reference's float64 is slow
        able = shape.m >= INT_MM_ROWS and shape.n % INT_MM_STEP == shape.k % INT_MM_STEP == 0
        sums = torch._int_mm(o.xq, o.weights[0].t()) if able else o.truth("sums")
        self.swiglu = isinstance(shape, SwigluShape)
        self.truth = o.gated(sums) if self.swiglu else o.dequantized(sums)
        self.out = poison(torch.empty_like(self.truth))
        self._stream = torch.cuda.Stream()

    def launch(self, config: TileConfig, copy: int = 0) -> None:
        """Launch the GEMM under `config` with copy `copy` of the weight."""
        o = self.operands
        product = gemm.scaled_mm_swiglu if self.swiglu else gemm.scaled_mm
        product(o.xq, o.weights[copy], o.sx, o.sw, o.bias, config=config, out=self.out, arch=self.code_arch)

    def launch_bf16(self, copy: int) -> None:
        """Launch torch's bf16 product of the same shape with copy `copy` of the bf16 weight."""
        torch.mm(self.operands.x, self.operands.weights16[copy].t(), out=self._out16)

    @cached_property
    def _out16(self) -> torch.Tensor:
        return self.operands.output()

    def quantize(self, copy: int) -> None:
        """Quantize the rows of x, as the kernel ahead of the GEMM does it in a model."""
        quantize(self.operands.x, (self.operands.xq, self.operands.sx))

    def _launch_behind_quantization(self, config: TileConfig, copy: int) -> None:
        self.quantize(copy)
        self.launch(config, copy)

    def times(
        self, configs: Iterable[TileConfig], rounds: int, *, sustained: bool = False, bf16: bool = False
    ) -> list[Times]:
        """Microseconds per launch under each of `configs`; with `bf16`, the times of `launch_bf16` follow as the last.

        Each configuration must have passed `launch_and_check`. A sample replays a CUDA graph of launches over all
        copies of the weight, since a launch from Python takes longer than a small GEMM and would hide it. sustained:
        the GEMM is timed as in a running model, see HOT_ROWS and HOT_US.
        """
        hot = sustained and self.operands.shape.m >= HOT_ROWS
        launch = self._launch_behind_quantization if hot else self.launch
        calls: list[Callable[[int], None]] = [partial(launch, config) for config in configs]
        calls += [self.quantize] if hot else []
        calls += [self.launch_bf16] if bf16 else []
        graphs = [self._graph(call) for call in calls]
        torch.cuda.synchronize()
        sample_us = HOT_US if hot else SUSTAINED_US if sustained else SAMPLE_US
        times = interleave([graph.replay for graph in graphs], rounds, sample_us, launches=self.operands.copies)
        if not hot:
            return times
        last = len(times) - 1 - bf16
        own = times[last].p50  # of the quantization
        return [*(Times(t.p20 - own, t.p50 - own, t.p80 - own) for t in times[:last]), *times[last + 1 :]]

    def _graph(self, call: Callable[[int], None]) -> torch.cuda.CUDAGraph:
        call(0)  # a library may initialize itself at its first launch
        graph, _ = capture([partial(call, copy) for copy in range(self.operands.copies)], self._stream)
        return graph

    def launch_and_check(self, config: TileConfig) -> str | None:
        """Launch `config` once: None if its result is bit-equal to the truth, else a reason that begins with its class.

        Raises ContextLost after a fault that ends this process's use of the GPU, such as an illegal address.
        """
        poison(self.out)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", gemm.Fallback)
                self.launch(config)
            torch.cuda.synchronize()
        except ConfigError as error:
            return f"resources: {error}"
        except Exception as error:  # the compiler's own errors have no common base class
            try:
                torch.cuda.synchronize()
            except Exception:
                raise ContextLost(f"{config}: {error}") from None
            return f"compile: {config}: {type(error).__name__}: {error}"
        return None if torch.equal(self.out, self.truth) else f"wrong: {config} is not bit-equal to the reference"
