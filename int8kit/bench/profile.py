"""Where the wall clock of one call goes: GEMM, attention, row kernels, element-wise kernels, copies and host gaps.

    profile(step)  ->  Profile(wall_ms=166.1, ms={"GEMM": 120.9, "attention": 37.4, ..., "host gaps": 0.4}, ...)

The kernels of some repeats are recorded by torch.profiler with CUDA activities only, which disturb the host least. On
a CPU the recorded intervals are torch's operators, and the outermost operator counts.

    parts        union of intervals: where two kernels overlap, the time belongs to the kernel that started first
    host gaps    the rest of the recorded wall clock: before the first kernel, between kernels, and after the last one
    wall_ms      the wall clock of the same call without the profiler, from calls before and after the recorded ones

The profiler slows the host down, so recorded gaps may exceed the real ones. Then the host gaps are the unrecorded wall
clock less the time in which the GPU was busy. `Profile.adds_up` compares the sum of the parts with `wall_ms`. On a
CPU it compares with the recorded wall clock, because recording slows the operators themselves.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.profiler
from torch._C._autograd import DeviceType

from int8kit.errors import CheckFailed, InputError
from int8kit.timing.wall_clock import WARM_UP, synchronize, synchronized_ms

Part = Literal["GEMM", "attention", "row kernels", "element-wise", "copies", "other"]
PARTS: tuple[Part, ...] = ("GEMM", "attention", "row kernels", "element-wise", "copies", "other")
GAPS = "host gaps"
REPEATS = 3
TOLERANCE = 0.02
"""Largest difference of the sum of the parts from the wall clock, relative to the wall clock."""
CLOCK_S = 1.0  # of calls before each timed block on a GPU
MOST_KERNELS = 30
LONGEST_NAME = 240  # characters in a document: a name of a template may have thousands

_ROW_KERNELS = "quantize|quantize_long|rms_norm_quantize|residual_norm_quantize|swiglu_quantize|qk_norm_rope"

PATTERNS: tuple[tuple[str, Part], ...] = (
    # operators of torch, which a CPU records
    (r"^int8kit::(scaled_mm|linear)(_swiglu)?$", "GEMM"),
    (rf"^int8kit::({_ROW_KERNELS})$", "row kernels"),
    (r"^aten::_?(scaled_dot_product|flash|efficient|cudnn)\w*attention", "attention"),
    (r"^aten::(linear|addmm|mm|bmm|baddbmm|matmul|einsum|_int_mm|_scaled_mm|_addmm_activation|mkldnn_linear)$", "GEMM"),
    (r"^bitsandbytes::", "GEMM"),
    (r"^aten::(to|_to_copy|copy_|clone|contiguous|cat|concat|stack|repeat|zero_|empty\w*|zeros)$", "copies"),
    (r"^aten::", "element-wise"),
    # Inductor's kernels name the operators that they fuse, so they come before the patterns of those operators
    (r"^triton_(poi|red|per|for|mix|spl)_", "element-wise"),
    (r"^triton_tem_\w*flex_attention", "attention"),
    (r"^triton_tem_", "GEMM"),
    # int8kit's
    (r"^_gemm_(triton|mma_sync|wgmma)$", "GEMM"),
    (rf"^_({_ROW_KERNELS})$", "row kernels"),
    # attention comes before GEMM: its kernels are instances of CUTLASS too
    (r"(?i)sdpa|flash|fmha|attention|(?<![a-z])attn", "attention"),
    (r"^Mem(cpy|set)\b|^memcpy\d+$|CatArrayBatchedCopy|copy_kernel|copy_device_to_device", "copies"),
    (r"(?i)gemm|gemv|nvjet|cutlass|cublas|xmma|split_?k_?reduce|scaled_mm", "GEMM"),
    (r"kDequantize|kgemm_4bit", "GEMM"),  # bitsandbytes: the dequantization belongs to the linear
    (r"(?i)elementwise|reduce|softmax|layer_?norm|rms_?norm|at::native::|\bcub::|\bthrust::", "element-wise"),
)
"""Part of each kernel by its name, as the profiler spells it. The first match counts."""
_PATTERNS = tuple((re.compile(pattern), part) for pattern, part in PATTERNS)

_NO_KERNEL = re.compile(r"^(Context|Stream|Event) (Sync|Wait Event)|^Torch-Compiled Region")


class Interval(NamedTuple):
    """One recorded kernel or operator. The unit is microseconds on the profiler's clock."""

    name: str
    start: float
    end: float


class Division(NamedTuple):
    """Intervals divided among the parts, in microseconds."""

    parts: dict[Part, float]
    busy: float  # their union, and the sum of `parts`
    between: float  # time from the first start to the last end in which nothing ran


@dataclass(frozen=True)
class KernelTime:
    """Time of one kernel in one call. Overlaps are not removed."""

    name: str
    part: Part
    count: float  # of launches in one call; a fraction if the repeats differ
    ms: float


@dataclass(frozen=True)
class Profile:
    """The parts of one call in milliseconds. The order of `ms` is that of PARTS, and host gaps are last."""

    device: str
    repeats: int
    wall_ms: float  # without the profiler, median
    profiled_ms: float  # under the profiler, mean
    ms: Mapping[str, float]
    between_ms: float  # recorded gaps between kernels, without the times before the first and after the last one
    kernels: tuple[KernelTime, ...]  # the slowest first, at most MOST_KERNELS
    unknown: tuple[str, ...]  # names of the kernels in "other", the slowest first

    @property
    def busy_ms(self) -> float:
        """Time in which at least one kernel ran."""
        return sum(ms for part, ms in self.ms.items() if part != GAPS)

    @property
    def sum_over_wall(self) -> float:
        """Sum of the parts over the wall clock: without the profiler, or on a CPU under it."""
        return sum(self.ms.values()) / (self.wall_ms if self.device == "cuda" else self.profiled_ms)

    @property
    def adds_up(self) -> bool:
        """Whether the sum of the parts is the wall clock within TOLERANCE."""
        return abs(self.sum_over_wall - 1) <= TOLERANCE

    def document(self) -> dict[str, Any]:
        """The figures as JSON, for the details of a result document."""
        return {
            "device": self.device,
            "repeats": self.repeats,
            "wall_ms": round(self.wall_ms, 4),
            "profiled_ms": round(self.profiled_ms, 4),
            "slowdown": round(self.profiled_ms / self.wall_ms, 4),
            "busy_ms": round(self.busy_ms, 4),
            "between_ms": round(self.between_ms, 4),
            "sum_over_wall": round(self.sum_over_wall, 4),
            "adds_up": self.adds_up,
            "ms": {part: round(ms, 4) for part, ms in self.ms.items()},
            "kernels": [
                {"name": k.name[:LONGEST_NAME], "part": k.part, "count": round(k.count, 2), "ms": round(k.ms, 4)}
                for k in self.kernels
            ],
            "unknown": [name[:LONGEST_NAME] for name in self.unknown],
        }


def profile(
    call: Callable[[], Any], *, repeats: int = REPEATS, device: str | None = None, warm_up: int = WARM_UP
) -> Profile:
    """Profile of one `call`, from its start until the GPU is idle.

    repeats: recorded calls; as many run before and after them without the profiler. device: "cuda" or "cpu"; default:
    "cuda" where there is one. warm_up: calls before all others.

    Raises InputError for a bad number of repeats or an unknown device, and CheckFailed if nothing was recorded.
    """
    if repeats < 1:
        raise InputError(f"{repeats} repeats: expected 1 or more")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise InputError(f"device {device!r}: expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device: expected one; the device cpu profiles operators")
    for _ in range(warm_up):
        call()
    _reach_the_clock(call, device)
    wall = [synchronized_ms(call) for _ in range(repeats)]
    intervals, profiled_ms = _record(call, repeats, device)
    _reach_the_clock(call, device)
    wall += [synchronized_ms(call) for _ in range(repeats)]
    if not intervals:
        raise CheckFailed(f"the profiler recorded nothing on {device}: close other profilers, and try again")
    return summarize(
        intervals, repeats=repeats, profiled_ms=profiled_ms, wall_ms=statistics.median(wall), device=device
    )


def _reach_the_clock(call: Callable[[], Any], device: str) -> None:
    """Run calls until the GPU's clock is that of a long run. Behind a pause it is higher, and the parts do not compare.

    An H200 fell from 153 to 158 ms for a step within its first second.
    """
    end = time.perf_counter() + CLOCK_S
    while device == "cuda" and time.perf_counter() < end:
        call()
        synchronize()


def _record(call: Callable[[], Any], repeats: int, device: str) -> tuple[list[Interval], float]:
    """The intervals of `repeats` calls, and the milliseconds of one call while they were recorded."""
    activity = {"cuda": torch.profiler.ProfilerActivity.CUDA, "cpu": torch.profiler.ProfilerActivity.CPU}[device]
    # one call goes unrecorded, because the profiler sets itself up at the first kernel that it sees
    plan = torch.profiler.schedule(wait=0, warmup=1, active=1)
    with torch.profiler.profile(activities=[activity], schedule=plan, acc_events=True) as profiler:
        call()
        synchronize()
        _reach_the_clock(call, device)
        profiler.step()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
            synchronize()
        profiled_ms = 1e3 * (time.perf_counter() - start) / repeats
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    intervals = [
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == wanted and not event.is_user_annotation and not _NO_KERNEL.match(event.name)
    ]
    return intervals if device == "cuda" else outermost(intervals), profiled_ms


def summarize(
    intervals: Sequence[Interval], *, repeats: int, profiled_ms: float, wall_ms: float, device: str
) -> Profile:
    """The profile of one call from the intervals of `repeats` calls.

    profiled_ms: one call while they were recorded. wall_ms: one call without the profiler.
    """
    divided = divide(intervals)
    per_call = 1e3 * repeats  # microseconds of all calls -> milliseconds of one
    busy_ms = divided.busy / per_call
    whole_ms = min(profiled_ms, wall_ms) if device == "cuda" else profiled_ms
    gaps = max(whole_ms - busy_ms, 0.0)
    kernels = _kernel_times(intervals, repeats)
    return Profile(
        device=device,
        repeats=repeats,
        wall_ms=wall_ms,
        profiled_ms=profiled_ms,
        ms={**{part: us / per_call for part, us in divided.parts.items()}, GAPS: gaps},
        between_ms=divided.between / per_call,
        kernels=tuple(kernels[:MOST_KERNELS]),
        unknown=tuple(kernel.name for kernel in kernels if kernel.part == "other"),
    )


def divide(intervals: Iterable[Interval]) -> Division:
    """Divide the union of `intervals` among the parts. An overlap belongs to the interval that started first.

    Of two intervals with the same start, the longer one counts as the first.
    """
    parts: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    between, reached = 0.0, None
    for name, start, end in sorted(intervals, key=_by_start):
        if reached is None:
            reached = start
        between += max(start - reached, 0.0)
        parts[part_of(name)] += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return Division(parts, sum(parts.values()), between)


def outermost(intervals: Iterable[Interval]) -> list[Interval]:
    """The intervals that lie in no other one: an operator calls others, and its time is theirs too."""
    found: list[Interval] = []
    for interval in sorted(intervals, key=_by_start):
        if not found or interval.end > found[-1].end:
            found.append(interval)
    return found


def _by_start(interval: Interval) -> tuple[float, float]:
    return interval.start, -interval.end


def part_of(name: str) -> Part:
    """Part of the kernel or operator of this name; "other" if no pattern matches."""
    return next((part for pattern, part in _PATTERNS if pattern.search(name)), "other")


def _kernel_times(intervals: Iterable[Interval], repeats: int) -> list[KernelTime]:
    """Every kernel, the slowest first."""
    us: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for name, start, end in intervals:
        us[name] = us.get(name, 0.0) + end - start
        counts[name] += 1
    slowest = sorted(us.items(), key=lambda item: -item[1])
    return [KernelTime(name, part_of(name), counts[name] / repeats, total / 1e3 / repeats) for name, total in slowest]
