"""Compare the lookup's configuration with the full tuner's winner, at shapes that nobody has tuned for.

    python tools/measure_lookup.py --gpu h200 --exclude 4 --out lookup-h200.json
    python tools/measure_lookup.py --gpu h100 --without-own --out lookup-h100.json
    python tools/measure_lookup.py --gpu rtx3090 --out lookup-sm86.json        # sm_86 code on the present GPU
    python tools/measure_lookup.py --gpu h200 --dry-run                        # on a CPU; the times are invented

The shapes are drawn by a seed. M is log-uniform from 1 to 40000. N and K are never both multiples of 512. Every eighth
shape has a SwiGLU epilogue. Every twentieth has a K or an N that the Gluon kernels cannot copy, as some models have.

A chunk of shapes is tuned, then each of its shapes is timed: the looked-up configuration, the tuner's winner and the
plain default, interleaved. The ratio is the winner's time divided by the looked-up configuration's. The tuner knows no
SwiGLU; there its winner for the GEMM runs with that epilogue too.

The document is written after each shape. The same command continues it, also after a kill. --time-limit ends the run
before a chunk that would take longer. Code of an older architecture is ranked for the GPU that runs it, as the tuner
does; --figures-of-gpu ranks for the GPU that is named. The last line of the output is one JSON object. Exit status 1 if
a target is missed: 0.9 in the geometric mean, and 0.8 for each shape.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from int8kit import cost_model, files, gpus
from int8kit.database import borrow, store
from int8kit.database.database import Choice, Database
from int8kit.errors import InputError, Int8kitError
from int8kit.gpus import Gpu
from int8kit.kernels import present_toolchain
from int8kit.ranking import are_within
from int8kit.spec import GemmShape, Operation, TileConfig, architecture_default, config_from, default_config, supports
from int8kit.tune import session, space

FORMAT = "int8kit.measured-lookup/1"
MEAN, LEAST = 0.9, 0.8
FLOPS_MAX = 2e13  # about 15 ms on an H200
ROUNDS, SAMPLE_US = 7, 20000
CHUNK = 20

Times = dict[TileConfig, float]
"""Microseconds by configuration."""


class Question(NamedTuple):
    """A shape to look up, and its epilogue."""

    shape: GemmShape
    operation: Operation

    def __str__(self) -> str:
        return f"{self.shape} {self.operation}" if self.operation is Operation.SWIGLU else str(self.shape)


def drawn(seed: int, count: int) -> list[Question]:
    """`count` distinct shapes in an order that does not depend on `count`."""
    numbers = random.Random(seed)
    found: list[Question] = []
    while len(found) < count:
        index = len(found)
        operation = Operation.SWIGLU if index % 8 == 3 else Operation.GEMM
        step = numbers.choice((16, 32, 64, 64, 128, 256))
        m = round(math.exp(numbers.uniform(0, math.log(40000))))
        n, k = (
            step * round(math.exp(numbers.uniform(math.log(256), math.log(most))) / step) for most in (32768, 20480)
        )
        if index % 20 == 7:
            n, k = (n + 4, k) if index % 40 == 7 else (n, k + 12)
        one = Question(GemmShape(m, n, max(k, step)), operation) if n else None
        if one and one.shape.flops <= FLOPS_MAX and (n % 512 or k % 512) and one not in found:
            found.append(one)
    return found


def lookup_database(target: session.Target, args: argparse.Namespace) -> Database:
    """The database that answers, with the figures of the GPU that is ranked for."""
    toolchain, gpu = present_toolchain()[0], target.gpu
    if args.database:
        loaded = store.load(args.database)
        own = loaded.gpu.alias == gpu.alias
        base = replace(loaded, gpu=gpu) if own else Database(gpu, lender=loaded)
    elif args.without_own:
        base = Database(gpu)
        base = replace(base, lender=borrow.lender_of(base, toolchain, store._readable))
    else:
        base = store.merged_view(gpu, toolchain)[0]
    if args.figures_of_gpu:
        return base
    return replace(base, gpu=replace(target.machine, alias=gpu.alias, shared_memory=gpu.shared_memory))


def looked_up(base: Database, question: Question, exclude: float) -> tuple[Choice, float]:
    """The choice for a shape, and the seconds that a plan and a call take.

    exclude: entries of shapes within this factor are left out.
    """
    toolchain, shape = present_toolchain()[0], question.shape

    def far(one: Database) -> Database:
        entries = tuple(e for e in one.entries if not are_within(e.shape, shape, exclude))
        return replace(one, entries=entries, lender=far(one.lender) if one.lender else None)

    known = far(base) if exclude else base
    choice = known.resolve(shape, toolchain, question.operation)
    start = time.perf_counter()
    config = known.plan(shape.n, shape.k, toolchain).choose(shape, question.operation)
    seconds = time.perf_counter() - start
    assert config == choice.config
    return choice, seconds


def measured(target: session.Target, question: Question, configs: Sequence[TileConfig]) -> Times:
    """Interleaved times of `configs` on the present GPU. Raises InputError if one does not run or is not exact."""
    import torch

    from int8kit.kernels import gemm
    from int8kit.tune import measure

    class SwiGluBench(measure.ShapeBench):
        """As `ShapeBench`, with the SwiGLU epilogue. The plain kernel's result is the truth."""

        def launch(self, config: TileConfig, copy: int = 0) -> None:
            o = self.operands
            arguments = (o.xq, o.weights[copy], o.sx, o.sw, o.bias)
            gemm.scaled_mm_swiglu(*arguments, config=config, out=self.out, arch=self.code_arch)

    assert target.timed_on is not None
    swiglu = question.operation is Operation.SWIGLU
    of = SwiGluBench if swiglu else measure.ShapeBench
    bench = of(question.shape, target.timed_on, code_arch=target.code_arch)
    if swiglu:
        bench.out = torch.empty(question.shape.m, question.shape.n // 2, device="cuda", dtype=torch.bfloat16)
        bench.launch(default_config(question.shape))
        bench.truth = bench.out.clone()
    for config in configs:
        if reason := bench.launch_and_check(config):
            raise InputError(f"{question}: {reason}")
    times = bench.times(configs, ROUNDS, SAMPLE_US)
    return {config: one.p50 for config, one in zip(configs, times, strict=True)}


def invented(target: session.Target, question: Question, configs: Sequence[TileConfig]) -> Times:
    """Replacement of `measured` for the dry run: the model's estimates with noise."""
    times = {}
    for config in configs:
        needs = cost_model.assumed_needs(config, target.gpu.arch)
        us = cost_model.estimate(question.shape, config, needs, target.machine, question.operation)
        times[config] = us * random.Random(f"{question} {config}").uniform(0.95, 1.05)
    return times


def invented_winners(target: session.Target, questions: Sequence[Question]) -> dict[GemmShape, TileConfig]:
    """Replacement of the tuner for the dry run: the best of its seeds by invented times."""
    found = {}
    for question in questions:
        shape, gpu = question.shape, target.gpu
        able = [c for c in space.candidates(shape, gpu) if supports(c.kernel, shape, question.operation)]
        times = invented(target, question, [*able, architecture_default(shape, gpu.arch, gpu.shared_memory)])
        found[shape] = min(times, key=times.__getitem__)
    return found


class Run:
    """The state of a run: its arguments, the target, the database, and the rows so far."""

    def __init__(self, args: argparse.Namespace, target: session.Target, pool: Any) -> None:
        """pool: worker processes; None for a dry run."""
        self.args, self.target, self.pool = args, target, pool
        self.base = lookup_database(target, args)
        self.head = {
            "format": FORMAT, "gpu": target.gpu.alias, "timed_on": target.timed_on and target.timed_on.name,
            "invented": args.dry_run, "seed": args.seed, "database": args.database and args.database.name,
            "without_own": args.without_own, "exclude": args.exclude, "figures_of_gpu": args.figures_of_gpu,
            "triton": present_toolchain()[0].triton,
        }  # fmt: skip
        self.rows: list[dict[str, Any]] = self._earlier()
        self.failed: dict[str, str] = {}

    def _earlier(self) -> list[dict[str, Any]]:
        """The rows of an earlier run with the same arguments. Raises InputError for a document of another run."""
        if not self.args.out or not self.args.out.exists():
            return []
        document = files.read_json(self.args.out, FORMAT, remedy="name another file")
        rows: list[dict[str, Any]] = document.pop("shapes")
        if document != self.head:
            name = next(n for n in self.head if document.get(n) != self.head[n])
            raise InputError(f"{str(self.args.out)!r} is of another run: {name} = {document.get(name)!r}; name another")
        return rows

    def chunks(self, questions: Sequence[Question]) -> None:
        """Tune and time the questions without a row, a chunk at a time, until the time limit."""
        done = {row["shape"] for row in self.rows}
        todo = [one for one in questions if str(one) not in done]
        start = last = time.monotonic()
        longest = 0.0
        for index in range(0, len(todo), self.args.chunk):
            if last - start + longest > self.args.time_limit:
                note(f"time limit: {len(todo) - index} shapes are left; the same command continues")
                return
            self.chunk(todo[index : index + self.args.chunk])
            longest, last = max(longest, time.monotonic() - last), time.monotonic()

    def chunk(self, questions: Sequence[Question]) -> None:
        """Tune the questions' shapes, then time each."""
        start = time.monotonic()
        choices = {one: looked_up(self.base, one, self.args.exclude) for one in questions}
        winners = self.winners(questions, [choice.config for choice, _ in choices.values()])
        note(f"{len(winners)} shapes tuned in {time.monotonic() - start:.0f} s")
        for one, (choice, seconds) in choices.items():
            if one.shape not in winners:
                continue
            configs = dict.fromkeys((choice.config, winners[one.shape], default_config(one.shape)))
            try:
                times = (measured if self.pool else invented)(self.target, one, list(configs))
            except InputError as error:
                self.failed[str(one)] = str(error)
                continue
            self.rows.append(row(one, choice, winners[one.shape], times, seconds))
            note(f"{one}: {self.rows[-1]['ratio']:.3f}, {choice.level}")
            if self.args.out:
                files.write_text(self.args.out, files.dump_rows({**self.head, "shapes": self.rows}, "shapes"))

    def winners(self, questions: Sequence[Question], needed: Sequence[TileConfig]) -> dict[GemmShape, TileConfig]:
        """The tuner's configuration of each shape. needed: others, compiled in parallel for the timing."""
        if not self.pool:
            return invented_winners(self.target, questions)
        shapes = [one.shape for one in questions]
        self.compile(dict.fromkeys(space.variant_of(c, s) for c, s in zip(needed, shapes, strict=True)))
        (result,) = session.tune(shapes, [self.target], self.pool, note=note)
        self.failed |= {str(shape): reason for shape, reason in result.failed.items()}
        return {entry.shape: entry.config for entry in result.entries}

    def compile(self, kernels: dict[space.KernelVariant, None]) -> None:
        """Compile kernels on all cores, so that a launch finds them in Triton's cache."""
        from int8kit.tune import tasks, workers

        def job() -> Any:
            calls = [(self.target.gpu.arch, kernel, self.target.launch_code) for kernel in kernels]
            yield workers.Batch(tasks.compile_kernel, calls, lambda call, result: None)

        self.pool.drive([job()])


def row(question: Question, choice: Choice, winner: TileConfig, times: Times, seconds: float) -> dict[str, Any]:
    """One row of the document."""
    return {
        "shape": str(question), "level": choice.level, "why": choice.provenance, "lookup_ms": round(seconds * 1e3, 3),
        "lookup": asdict(choice.config), "tuned": asdict(winner), "lookup_us": round(times[choice.config], 2),
        "tuned_us": round(times[winner], 2), "plain_us": round(times[default_config(question.shape)], 2),
        "ratio": round(times[winner] / times[choice.config], 4),
    }  # fmt: skip


def summary(rows: Sequence[dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    """The geometric mean and the least of the ratios, over all shapes and by level."""

    def of(ratios: Sequence[float]) -> dict[str, float]:
        return {"count": len(ratios), "mean": round(statistics.geometric_mean(ratios), 4), "least": min(ratios)}

    ratios = [one["ratio"] for one in rows]
    levels = Counter(one["level"] for one in rows)
    return {
        **of(ratios), "met": statistics.geometric_mean(ratios) >= MEAN and min(ratios) >= LEAST and not failed,
        "plain_mean": round(statistics.geometric_mean([one["tuned_us"] / one["plain_us"] for one in rows]), 4),
        "levels": {level: of([one["ratio"] for one in rows if one["level"] == level]) for level in levels},
        "lookup_ms": {"median": statistics.median(one["lookup_ms"] for one in rows),
                      "most": max(one["lookup_ms"] for one in rows)},
        "failed": failed,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, the slowest first."""
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "shape": lambda r: r["shape"], "level": lambda r: r["level"],
        "looked up": lambda r: str(config_from(r["lookup"])), "us": lambda r: r["lookup_us"],
        "tuned": lambda r: str(config_from(r["tuned"])), "us ": lambda r: r["tuned_us"],
        "plain us": lambda r: r["plain_us"], "ratio": lambda r: r["ratio"],
    }  # fmt: skip
    ordered = sorted(rows, key=lambda r: r["ratio"])
    return tabulate([[show(r) for show in columns.values()] for r in ordered], list(columns))


def target_of(name: str | None, present: list[Gpu], work: Path, dry_run: bool) -> session.Target:
    """The target of the run. Raises InputError if no present GPU runs its code."""
    gpu = gpus.get(name) if name else (present or [gpus.get("rtx3090")])[0]
    (target,) = session.targets_of([gpu], present, work)
    if target.timed_on is None and not dry_run:
        raise InputError(f"no present GPU runs the code of {gpu.alias}; --dry-run invents times")
    return target


def run(args: argparse.Namespace) -> Run:
    """All shapes, as far as the time limit allows."""
    questions = drawn(args.seed, args.count)
    work = (args.out or Path("measure_lookup.json")).with_suffix(".tuning.json")
    if args.dry_run:
        one = Run(args, target_of(args.gpu, [], work, True), None)
        one.chunks(questions)
        return one
    from int8kit.tune import workers

    with workers.Workers() as pool:
        target = target_of(args.gpu, pool.gpus(), work, False)
        session.check_health(pool, note)
        one = Run(args, target, pool)
        one.chunks(questions)
        return one


def note(text: str) -> None:
    print(f"measure_lookup: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="h100, h200, rtx3090, ...; default: the present GPU")
    parser.add_argument("--database", type=Path, help="the file that answers; of another GPU: it is borrowed")
    parser.add_argument("--without-own", action="store_true", help="as if the GPU had no file: a similar one lends")
    parser.add_argument("--exclude", type=float, default=0.0, metavar="FACTOR",
                        help="leave out entries whose M, N and K are all within FACTOR of the shape's")  # fmt: skip
    parser.add_argument("--figures-of-gpu", action="store_true", help="rank for the named GPU, not for the timed one")
    parser.add_argument("--seed", type=int, default=22)
    parser.add_argument("--count", type=int, default=40, help="number of shapes; default 40")
    parser.add_argument("--chunk", type=int, default=CHUNK, help=f"shapes that are tuned together; default {CHUNK}")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--out", type=Path, help="file for the JSON document, written after each shape")
    parser.add_argument("--dry-run", action="store_true", help="invent the times; needs no GPU")
    try:
        done = run(parser.parse_args())
    except Int8kitError as error:
        print(f"measure_lookup: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    if not done.rows:
        print("measure_lookup: no shape was measured", file=sys.stderr)
        sys.exit(1)
    found = summary(done.rows, done.failed)
    print(table(done.rows))
    print(json.dumps({**done.head, **found}))
    sys.exit(0 if found["met"] else 1)


if __name__ == "__main__":
    main()
