"""`int8kit bench gemm`: every contestant on every shape, in interleaved rounds -> one JSON document.

    {"format": "int8kit.bench/1", "complete": true,
     "conditions": {"gpu": "NVIDIA H200", "int8_tops": 1979, "torch": "2.11.0", "rounds": 21, "card_before": {}, ...},
     "contestants": [{"name": "int8kit", "kind": "gemm", "arithmetic": "int8", "ours": true, ...}],
     "shapes": [{"m": 4352, "n": 4608, "k": 4608, "elements": 20054016, "card": {"sm_mhz": 1545, "power_w": 698, ...},
                 "rows": [{"name": "int8kit", "kind": "gemm", "timed_by": "graph", "p20_us": ..., "p50_us": ...,
                           "p80_us": ..., "tops": ..., "peak_share": ..., "differs": 0, "prepare_s": ..., "note": ""}],
                 "absent": [{"name": "vllm", "kind": "gemm", "reason": "..."}]}],
     "summary": [{"of": "int8kit", "over": "bf16", "kind": "gemm", "shapes": 48, "geomean": 1.9, "min": ..., ...}]}

tops counts the product's operations only, in `linear` too; peak_share is of the card's dense int8 rate, for every
arithmetic; differs counts elements that are not the reference's bits; a ratio is the other's median over int8kit's, so
above 1 int8kit is faster; where p20 to p80 overlap, it is a tie. Compiling and tuning count in prepare_s alone.
"""

from __future__ import annotations

import contextlib
import gc
import json
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

from int8kit import __version__, files
from int8kit.bench.contestants import Contestant
from int8kit.errors import CheckFailed, InputError
from int8kit.gpus import Gpu, present
from int8kit.kernels import gemm
from int8kit.spec import GemmShape
from int8kit.timing import interleave
from int8kit.timing.captured import Timed, one_line
from int8kit.timing.gpu_state import Sensors
from int8kit.timing.health import check_health
from int8kit.timing.operands import Operands, differing

FORMAT = "int8kit.bench/1"
POLICY = (
    "operands quantized from normal data; weights rotated past twice the L2; contestants interleaved round by round in "
    "an order shuffled anew each time; CUDA events; medians with p20 and p80"
)
ROUNDS = 21
GRAPH_US = 1000  # a graph is about so long or longer, unless it has so many launches:
MOST_IN_GRAPH = 16

Timer = Callable[[Sequence[Callable[[], Any]], int], list[interleave.Times]]


@dataclass(frozen=True)
class Setting:
    """How to measure. timer and device are for tests, which have no card.

    sample_us: how long a contestant runs in each round. In a few milliseconds a card keeps a clock that its power limit
    takes away in some 20: the two can rank kernels differently.
    """

    rounds: int = ROUNDS
    graph: bool = True
    device: str = "cuda"
    copies: int | None = None  # of each weight; default: past twice the L2
    sample_us: int = interleave.SAMPLE_US
    timer: Timer | None = None

    def time(self, calls: Sequence[Callable[[], Any]]) -> list[interleave.Times]:
        """The quantiles of each call over the rounds."""
        return (self.timer or partial(interleave.interleave, sample_us=self.sample_us))(calls, self.rounds)


@dataclass
class Outcome:
    """What has been measured so far, and what ended the run before its end."""

    conditions: dict[str, Any]
    contestants: Sequence[Contestant]
    wanted: int  # shapes
    shapes: list[dict[str, Any]] = field(default_factory=list)
    error: KeyboardInterrupt | CheckFailed | None = None

    def document(self) -> dict[str, Any]:
        """The JSON document; complete says whether every shape is in it."""
        listed = [{k: v for k, v in vars(c).items() if k != "prepare"} for c in self.contestants]
        return {
            "format": FORMAT,
            "complete": len(self.shapes) == self.wanted,
            "conditions": self.conditions,
            "contestants": listed,
            "shapes": self.shapes,
            "summary": summary(self.shapes, self.contestants),
        }

    def conclude(self) -> None:
        """Raise what ended the run, or CheckFailed if int8kit differs from the reference or did not run."""
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


def session(
    shapes: Sequence[GemmShape],
    contestants: Sequence[Contestant],
    setting: Setting = Setting(),
    *,
    output: Path | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """All that lies between reading a call and printing: the card and its health, the run, the file after each shape.

    note: takes lines for people. Raises InputError without a CUDA device, FileError for `output`, and CheckFailed if
    the card is not healthy; what ends the run later is in the outcome.
    """
    if setting.rounds < 1:
        raise InputError(f"{setting.rounds} rounds: legal is 1 or more")
    if not 100 <= setting.sample_us <= 10_000_000:
        raise InputError(f"samples of {setting.sample_us / 1000:g} ms: legal is 0.1 to 10000")
    if output is not None:
        files.check_target(output, ours=lambda p: files.is_ours(p, FORMAT), force=force)
    card = present()
    if card is None:
        raise InputError("no CUDA device here, and bench times kernels on one; `int8kit tune --gpu` works without")
    health = check_health(card)
    note(f"{card.name}: {health:.0f} bf16 TFLOP/s, healthy; {len(shapes)} shapes, {len(contestants)} contestants")
    with contextlib.redirect_stdout(sys.stderr):  # other projects' code prints; stdout is for the result
        return run(shapes, contestants, card, setting, health=health, on_shape=keeper(output, note))


def keeper(output: Path | None, note: Callable[[str], None]) -> Callable[[Outcome], None]:
    """What to do after each shape: say how it went, and write what there is, so that a lost run keeps it."""

    def keep(outcome: Outcome) -> None:
        last = outcome.shapes[-1]
        own = {c.name for c in outcome.contestants if c.ours}
        said = [f"{r['name']} {r['kind']} {r['p50_us']:.1f} us" for r in last["rows"] if r["name"] in own]
        where = f"{last['m']}x{last['n']}x{last['k']}"
        note(f"[{len(outcome.shapes)}/{outcome.wanted}] {where}: {', '.join(said)}; {len(last['absent'])} absent")
        if output is not None:
            files.write_text(output, json.dumps(outcome.document()) + "\n")

    return keep


def run(
    shapes: Sequence[GemmShape],
    contestants: Sequence[Contestant],
    card: Gpu,
    setting: Setting = Setting(),
    *,
    health: float | None = None,
    on_shape: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Measure every shape; `on_shape` is called after each. An interrupt or a card in error ends it with what is done.

    health: what `measure.check_health` gave, TFLOP/s, for the record.
    """
    sensors = Sensors() if setting.device == "cuda" else None
    conditions = _conditions(card, setting, sensors, health)
    outcome = Outcome(conditions, contestants, len(shapes))
    try:
        for shape in shapes:
            with torch.no_grad():  # throughout: compiled code is bound to the mode that it was compiled in
                outcome.shapes.append(measure_shape(shape, contestants, card, setting, sensors))
            conditions["card_after"] = sensors.read() if sensors else None
            on_shape(outcome)
    except (KeyboardInterrupt, CheckFailed) as error:
        outcome.error = error
    return outcome


def measure_shape(
    shape: GemmShape, contestants: Sequence[Contestant], card: Gpu, setting: Setting, sensors: Sensors | None = None
) -> dict[str, Any]:
    """One entry of the document's "shapes". Raises CheckFailed if the card is in error or the operands do not fit."""
    try:
        operands = Operands(shape, card, device=setting.device, copies=setting.copies)
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
            rows.append({"name": c.name, "kind": c.kind, "timed_by": call.by, "differs": differs, "prepare_s": took,
                         "note": call.note})  # fmt: skip
            calls.append((c, call))
        times = setting.time([call for _, call in calls]) if calls else []
        state = interleave.under_load(calls[0][1], times[0].p50) if sensors and calls else None
        for row, (c, call), t in zip(rows, calls, times, strict=True):
            p20, p50, p80 = (us / call.launches for us in (t.p20, t.p50, t.p80))
            tops = shape.ops / p50 / 1e6
            row.update(p20_us=round(p20, 3), p50_us=round(p50, 3), p80_us=round(p80, 3), tops=round(tops, 1),
                       peak_share=round(tops / card.int8_tops, 4),
                       differs=max(row["differs"], differing(call.result, operands.truth(c.result))))  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise CheckFailed(f"{shape} does not fit {card.name}: {one_line(error)}; leave the shape out") from error
    except RuntimeError as error:  # after a kernel has faulted, every call of this process does
        raise CheckFailed(f"{shape} on {card.name}: {one_line(error)}; leave the last contestant out") from error
    return {**asdict(shape), "elements": shape.m * shape.n, "card": state, "rows": rows, "absent": absent}


def _enter(contestant: Contestant, operands: Operands, setting: Setting) -> tuple[Timed, int] | str:
    """The call to time and how many elements of its result differ, or why there is none."""
    try:
        entrant = contestant.prepare(operands)
        if isinstance(entrant, str):
            return entrant
        at_peak = operands.shape.ops / operands.card.int8_tops / 1e6
        least = min(max(math.ceil(GRAPH_US / at_peak), 1), MOST_IN_GRAPH)
        call = Timed(entrant, graph=setting.graph and setting.device == "cuda", least=least)
        return call, differing(call.result, operands.truth(contestant.result))
    except Exception as error:  # whatever another project's code raises is its reason, and ends nobody else's turn
        reason = one_line(error)
    finally:
        gc.collect()
    try:
        _synchronize(setting)
    except RuntimeError as lost:
        raise CheckFailed(
            f"{contestant.name} ({contestant.kind}) on {operands.shape} left the card in error ({reason}); "
            "run again without it, with --only"
        ) from lost
    return reason


def _synchronize(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _conditions(card: Gpu, setting: Setting, sensors: Sensors | None, health: float | None) -> dict[str, Any]:
    import triton

    return {
        "gpu": card.name,
        "int8_tops": card.int8_tops,
        "device": setting.device,
        "driver": sensors.driver if sensors else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "int8kit": __version__,
        "kernels": gemm.toolchain().kernels,
        "policy": POLICY,
        "timed_by": "CUDA graphs where a contestant can be captured, else launches from the host, as each row says",
        "rounds": setting.rounds,
        "sample_us": setting.sample_us,
        "health_tflops": None if health is None else round(health, 1),
        "card_before": sensors.read() if sensors else None,
        "card_after": None,
    }


def summary(shapes: Iterable[dict[str, Any]], contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """How much faster each of int8kit's contestants is than each other of its kind, over the shapes both ran."""
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
    ratios = [(b["p50_us"] / a["p50_us"], where) for a, b, where in pairs]
    faster = sum(a["p80_us"] < b["p20_us"] for a, b, _ in pairs)
    slower = sum(a["p20_us"] > b["p80_us"] for a, b, _ in pairs)
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
