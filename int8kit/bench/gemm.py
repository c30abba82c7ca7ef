"""`int8kit bench gemm`: times every contestant on every shape in interleaved rounds and writes one JSON document.

    {"format": "int8kit.result/1", "benchmark": "gemm", ..., "complete": true,
     "rows": [{"name": "int8kit", "unit": "us", "p20": ..., "p50": ..., "p80": ..., "rounds": 21, "kind": "gemm",
               "shape": 0, "m": 4352, "n": 4608, "k": 4608, "timed_by": "graph", "tops": ..., "peak_share": ...,
               "differs": 0, "prepare_s": ..., "note": ""}],
     "details": {"gpu": "NVIDIA H200", "int8_tops": 1979, "sample_us": 4000, "health_tflops": 720.1, ...,
       "contestants": [{"name": "int8kit", "kind": "gemm", "arithmetic": "int8", "ours": true, ...}],
       "shapes": [{"m": 4352, "n": 4608, "k": 4608, "elements": 20054016,
                   "gpu_state": {"sm_mhz": 1545, "power_w": 698, ...},
                   "absent": [{"name": "vllm", "kind": "gemm", "reason": "..."}]}],
       "summary": [{"of": "int8kit", "over": "bf16", "kind": "gemm", "shapes": 48, "geomean": 1.9, "min": ..., ...}]}}

`bench.results` has the fields that are left out above. Meaning of the others:

    shape           number of the row's shape in "shapes"
    gpu             GPU whose rates and L2 the benchmark assumes

    tops            operations of the matrix product per second in 10^12; the work of quantization is not counted
    peak_share      tops over the GPU's dense int8 rate, for every arithmetic
    differs         number of elements that are not bit-equal to the reference
    prepare_s       seconds until the first result; compiling and self-tuning count here and nowhere else
    gpu_state       state of the GPU under load
    geomean ...     ratios: the other's median time over int8kit's, so above 1 int8kit is faster
    ties            shapes in which the ranges p20 to p80 of the two overlap
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from int8kit import files
from int8kit.bench import results
from int8kit.bench.contestants import Contestant
from int8kit.errors import CheckFailed, InputError
from int8kit.gpus import Gpu, present
from int8kit.kernels import gemm
from int8kit.spec import GemmShape
from int8kit.timing import interleave
from int8kit.timing.captured import RepeatableCall, one_line
from int8kit.timing.gpu_state import Sensors
from int8kit.timing.health import check_health
from int8kit.timing.operands import TimingOperands, differing

ROUNDS = 21
GRAPH_US = 1000  # a graph takes about this long or longer, unless that needs more launches than:
LAUNCHES_MAX = 16

Timer = Callable[[Sequence[Callable[[], Any]], int], list[interleave.Times]]


@dataclass(frozen=True)
class Setting:
    """How to measure.

    sample_us: how long a contestant runs in each round. In a few milliseconds a GPU keeps a clock that its power limit
    lowers after about 20. So the length can change the ranking of kernels.

    timer, device and copies: for tests without a GPU.
    """

    rounds: int = ROUNDS
    graph: bool = True
    device: str = "cuda"
    copies: int | None = None  # of each weight; default: `timing.operands.weight_copies`
    sample_us: int = interleave.SAMPLE_US
    timer: Timer | None = None

    def time(self, calls: Sequence[Callable[[], Any]]) -> list[interleave.Times]:
        """The quantiles of each call over the rounds."""
        return (self.timer or partial(interleave.interleave, sample_us=self.sample_us))(calls, self.rounds)


@dataclass
class BenchResult:
    """The measured shapes so far, and the error that ended the run early, if any."""

    header: dict[str, Any]  # `results.header`
    conditions: dict[str, Any]  # the first of the document's details
    contestants: Sequence[Contestant]
    wanted: int  # number of shapes
    shapes: list[dict[str, Any]] = field(default_factory=list)  # each with its rows
    state_after: dict[str, Any] | None = None  # of the GPU, after the last shape
    error: KeyboardInterrupt | CheckFailed | None = None

    def document(self) -> dict[str, Any]:
        """The JSON document. "complete" says whether every shape is in it."""
        listed = [{k: v for k, v in vars(c).items() if k != "prepare"} for c in self.contestants]
        rows = [
            {**row, "shape": number, **{size: shape[size] for size in ("m", "n", "k")}}
            for number, shape in enumerate(self.shapes)
            for row in shape["rows"]
        ]
        details = {
            **self.conditions,
            "contestants": listed,
            "shapes": [{key: value for key, value in shape.items() if key != "rows"} for shape in self.shapes],
            "summary": summary(self.shapes, self.contestants),
        }
        complete = len(self.shapes) == self.wanted
        return results.document(self.header, rows, details=details, complete=complete, after=self.state_after)

    def conclude(self) -> None:
        """Raise the error that ended the run, or CheckFailed if int8kit differs from the reference or did not run."""
        if self.error is not None:
            raise self.error
        own = {(c.name, c.kind) for c in self.contestants if c.ours}
        for shape in self.shapes:
            where = f"{shape['m']}x{shape['n']}x{shape['k']}"
            for row in shape["rows"]:
                if (row["name"], row["kind"]) in own and row["differs"]:
                    raise CheckFailed(
                        f"{row['name']} ({row['kind']}) differs from the reference in {row['differs']} of "
                        f"{shape['elements']} elements of {where}; see `int8kit verify`"
                    )
            for row in shape["absent"]:
                if (row["name"], row["kind"]) in own:
                    raise CheckFailed(f"{row['name']} ({row['kind']}) did not run on {where}: {row['reason']}")


def benchmark(
    shapes: Sequence[GemmShape],
    contestants: Sequence[Contestant],
    setting: Setting = Setting(),
    *,
    output: Path | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Check the settings and the GPU's health, measure every shape, and write `output` after each.

    note: receives progress lines. Raises InputError without a CUDA device, FileError for `output`, and CheckFailed if
    the GPU is not healthy. A later error is in the result.
    """
    if setting.rounds < 1:
        raise InputError(f"{setting.rounds} rounds: expected 1 or more")
    if not 100 <= setting.sample_us <= 10_000_000:
        raise InputError(f"samples of {setting.sample_us / 1000:g} ms: expected 0.1 to 10000 ms")
    if output is not None:
        files.check_target(output, ours=results.is_replaceable, force=force)
    gpu = present()
    if gpu is None:
        raise InputError("no CUDA device here: bench times kernels on one; `int8kit tune --gpu NAME` works without")
    health = check_health(gpu)
    note(f"{gpu.name}: {health:.0f} bf16 TFLOP/s, healthy; {len(shapes)} shapes, {len(contestants)} contestants")
    with contextlib.redirect_stdout(sys.stderr):  # other projects' code prints; stdout is for the result
        return measure_shapes(shapes, contestants, gpu, setting, health=health, on_shape=keeper(output, note))


def keeper(output: Path | None, note: Callable[[str], None]) -> Callable[[BenchResult], None]:
    """The function to call after each shape: reports its times, and writes the document so far."""

    def keep(result: BenchResult) -> None:
        last = result.shapes[-1]
        own = {c.name for c in result.contestants if c.ours}
        times = [f"{r['name']} {r['kind']} {r['p50']:.1f} us" for r in last["rows"] if r["name"] in own]
        where = f"{last['m']}x{last['n']}x{last['k']}"
        note(f"[{len(result.shapes)}/{result.wanted}] {where}: {', '.join(times)}; {len(last['absent'])} absent")
        if output is not None:
            results.write(output, result.document())

    return keep


def measure_shapes(
    shapes: Sequence[GemmShape],
    contestants: Sequence[Contestant],
    gpu: Gpu,
    setting: Setting = Setting(),
    *,
    health: float | None = None,
    on_shape: Callable[[BenchResult], None] = lambda _: None,
) -> BenchResult:
    """Measure every shape and call `on_shape` after each. An interrupt or a GPU in error ends it; the result says so.

    health: rate that `check_health` measured, in TFLOP/s, for the document.
    """
    sensors = Sensors() if setting.device == "cuda" else None
    policy = results.Policy(timing=interleave.shared_policy(), seeds=(0,))  # the seed of TimingOperands
    header = results.header("gemm", policy, device=setting.device)
    result = BenchResult(header, _conditions(gpu, setting, health), contestants, len(shapes))
    try:
        for shape in shapes:
            with torch.no_grad():  # for all contestants: compiled code is bound to the mode in which it was compiled
                result.shapes.append(measure_shape(shape, contestants, gpu, setting, sensors))
            result.state_after = sensors.read() if sensors else None
            on_shape(result)
    except (KeyboardInterrupt, CheckFailed) as error:
        result.error = error
    return result


def measure_shape(
    shape: GemmShape, contestants: Sequence[Contestant], gpu: Gpu, setting: Setting, sensors: Sensors | None = None
) -> dict[str, Any]:
    """One entry of the document's "shapes", with its rows.

    Raises CheckFailed if the GPU is in error or the operands do not fit.
    """
    try:
        operands = TimingOperands(shape, gpu, device=setting.device, copies=setting.copies)
        rows: list[dict[str, Any]] = []
        absent, calls = [], []
        for c in contestants:
            started = time.perf_counter()
            entered = _enter(c, operands, setting)
            if isinstance(entered, str):
                absent.append({"name": c.name, "kind": c.kind, "reason": entered})
                continue
            call, differs = entered
            took = round(time.perf_counter() - started, 2)
            rows.append({"kind": c.kind, "timed_by": call.by, "differs": differs, "prepare_s": took, "note": call.note})
            calls.append((c, call))
        times = setting.time([call for _, call in calls]) if calls else []
        state = interleave.under_load(calls[0][1], times[0].p50) if sensors and calls else None
        for i, (row, (c, call), t) in enumerate(zip(rows, calls, times, strict=True)):
            one = interleave.Times(*(us / call.launches for us in (t.p20, t.p50, t.p80)))
            tops = shape.flops / one.p50 / 1e6
            row.update(tops=round(tops, 1), peak_share=round(tops / gpu.int8_tops, 4),
                       differs=max(row["differs"], differing(call.result, operands.truth(c.result))))  # fmt: skip
            rows[i] = results.row(c.name, "us", one, setting.rounds, **row)
    except torch.OutOfMemoryError as error:
        raise CheckFailed(f"{shape} does not fit {gpu.name}: {one_line(error)}; leave the shape out") from error
    except RuntimeError as error:  # after a kernel has faulted, every later call of this process fails
        raise CheckFailed(f"{shape} on {gpu.name}: {one_line(error)}; leave the last contestant out") from error
    return {**asdict(shape), "elements": shape.m * shape.n, "gpu_state": state, "rows": rows, "absent": absent}


def _enter(contestant: Contestant, operands: TimingOperands, setting: Setting) -> tuple[RepeatableCall, int] | str:
    """The call to time and the number of differing elements of its result, or why the contestant cannot take part."""
    try:
        prepared = contestant.prepare(operands)
        if isinstance(prepared, str):
            return prepared
        at_peak = operands.shape.flops / operands.gpu.int8_tops / 1e6
        least = min(max(math.ceil(GRAPH_US / at_peak), 1), LAUNCHES_MAX)
        call = RepeatableCall(prepared, graph=setting.graph and setting.device == "cuda", least=least)
        return call, differing(call.result, operands.truth(contestant.result))
    except Exception as error:  # an error of another project's code is the reason why that contestant is absent
        reason = one_line(error)
    finally:
        gc.collect()
    try:
        _synchronize(setting)
    except RuntimeError as lost:
        raise CheckFailed(
            f"{contestant.name} ({contestant.kind}) on {operands.shape} left the GPU in error ({reason}); "
            "run again without it, with --only"
        ) from lost
    return reason


def _synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _conditions(gpu: Gpu, setting: Setting, health: float | None) -> dict[str, Any]:
    return {
        "gpu": gpu.name,
        "int8_tops": gpu.int8_tops,
        "kernels": dict(gemm.toolchain().kernel_hashes),
        "timed_by": "CUDA graphs where a contestant can be captured, else launches from the host, as each row says",
        "rounds": setting.rounds,
        "sample_us": setting.sample_us,
        "health_tflops": None if health is None else round(health, 1),
    }


def summary(shapes: Iterable[dict[str, Any]], contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Speed of each int8kit contestant relative to each other one of its kind, over the shapes that both ran."""
    shapes = list(shapes)
    rows = []
    for own in (c for c in contestants if c.ours):
        for other in contestants:
            if other.kind != own.kind or other.ours:
                continue
            pairs = [
                (a, b, f"{s['m']}x{s['n']}x{s['k']}")
                for s in shapes
                for a in s["rows"]
                for b in s["rows"]
                if (a["name"], a["kind"]) == (own.name, own.kind) and (b["name"], b["kind"]) == (other.name, other.kind)
            ]
            if pairs:
                rows.append({"of": own.name, "over": other.name, "kind": own.kind, **_compare(pairs)})
    return rows


def _compare(pairs: Sequence[tuple[dict[str, Any], dict[str, Any], str]]) -> dict[str, Any]:
    ratios = [(b["p50"] / a["p50"], where) for a, b, where in pairs]
    faster = sum(a["p80"] < b["p20"] for a, b, _ in pairs)
    slower = sum(a["p20"] > b["p80"] for a, b, _ in pairs)
    (low, low_at), (high, high_at) = min(ratios), max(ratios)
    return {
        "shapes": len(pairs),
        "geomean": round(statistics.geometric_mean(ratio for ratio, _ in ratios), 4),
        "min": round(low, 4),
        "min_at": low_at,
        "max": round(high, 4),
        "max_at": high_at,
        "faster": faster,
        "ties": len(pairs) - faster - slower,
        "slower": slower,
        "timed_differently": sum(a["timed_by"] != b["timed_by"] for a, b, _ in pairs),
        "most_differs": max(b["differs"] for _, b, _ in pairs),
    }
