"""Every legal configuration of a few shapes, timed: what the tuner's model and its search are worth.

    python tools/exhaustive.py --gpu rtx3090 --shape 4296x4608x12288 --shape 4096x12288x3072 --out exhaustive.json
    python tools/exhaustive.py --gpu rtx3090 --seeds --dry-run       # on a CPU; the times are the model's with noise

For each shape: all configurations in short samples; then the fastest of them, the model's first ones and what
`int8kit tune` chooses for it, with their bands, again in samples that the power limit shapes. Of the latter come the
best one and by how much the others miss it; of the former the rank correlation (Spearman) with the model. The tuner
starts without a database, and sees only the shapes named. A configuration is a list of the values of "config_fields".
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from int8kit import files, gpus
from int8kit.database import store
from int8kit.database.database import Database
from int8kit.errors import InputError, Int8kitError
from int8kit.shapes_file import select
from int8kit.spec import GemmShape, TileConfig, default_config
from int8kit.timing import interleave
from int8kit.timing.interleave import Times
from int8kit.tune import measure, search, session, space, tasks, workers

ROUNDS, HOT_ROUNDS = 3, 9
FIELDS = [field.name for field in fields(TileConfig)]
FIRST = 8  # of the model's order
FASTEST = 12  # of the short samples, timed again
CHUNK, CHUNK_S = 200, 120.0  # configurations in one set of rounds, and how long it may take
SHAPES = ("4296x4608x4608", "4296x12288x4608", "4296x4608x12288", "4096x9728x2432", "4608x3072x15360")

Timer = Callable[[GemmShape, list[TileConfig], int, int], dict[TileConfig, Times]]


def timer(pool: workers.Workers, target: session.Target) -> Timer:
    """Times of those configurations that are exact on the target's card, in interleaved rounds of CHUNK."""
    assert target.card is not None
    card, arch = target.card.alias, target.arch

    def program(shape: GemmShape, configs: list[TileConfig], rounds: int, sample_us: int) -> Any:
        chunks = [tuple(configs[i : i + CHUNK]) for i in range(0, len(configs), CHUNK)]
        calls = [(shape, arch, chunk, rounds, sample_us, False) for chunk in chunks]
        results = yield workers.Batch(tasks.time_configs, calls, card=card, limit_s=CHUNK_S, once=True)
        times = {}
        for call, result in results.items():
            if isinstance(result, workers.Ended):  # leave out those that end their process
                fates = yield workers.Batch(tasks.launch, [(shape, arch, c) for c in call[2]], card=card, once=True)
                ended = {c: str(fate) for (_, _, c), fate in fates.items() if isinstance(fate, workers.Ended)}
                note(f"{shape}: {result}; alone {', '.join(f'{c}: {why}' for c, why in ended.items()) or 'all live'}")
                left = (shape, arch, tuple(c for c in call[2] if c not in ended), rounds, sample_us, False)
                again = yield workers.Batch(tasks.time_configs, [left], card=card, limit_s=CHUNK_S, once=True)
                result = again[left]
            times |= {} if isinstance(result, workers.Ended) else result.times
        return times

    def once(shape: GemmShape, configs: list[TileConfig], rounds: int, sample_us: int) -> Any:
        return pool.drive([program(shape, configs, rounds, sample_us)])[0]

    return once


def invented(found: search.Space) -> Timer:
    """The dry run's stand-in for `timer`."""

    def once(shape: GemmShape, configs: list[TileConfig], rounds: int, sample_us: int) -> dict[TileConfig, Times]:
        times = {}
        for us, config, _ in search.rank(configs, shape, found):
            us *= random.Random(f"{shape} {config}").uniform(0.9, 1.2)
            times[config] = Times(us, us, us)
        return times

    return once


def compiled(pool: workers.Workers, target: session.Target, jobs: list[workers.Job]) -> search.Space:
    """Every job, for the model and, where there is a card, for its launches."""
    found = search.Space(target.machine)
    code = tasks.Code(target.card.arch, target.arch) if target.card else None

    def keep(call: tuple[Any, ...], result: Any) -> None:
        found.add(call[1:3], workers.outcome(result))  # type: ignore[arg-type]

    def program() -> Any:
        yield workers.Batch(tasks.compile_kernel, [(target.gpu.arch, *job, code) for job in jobs], keep)

    pool.drive([program()])
    return found


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; ties get different ranks, which times do not have."""
    ranks = [{i: r for r, i in enumerate(sorted(range(len(v)), key=v.__getitem__))} for v in (a, b)]
    n = len(a)
    return 1 - 6 * sum((ranks[0][i] - ranks[1][i]) ** 2 for i in range(n)) / (n * (n * n - 1)) if n > 1 else 1.0


def values(config: TileConfig) -> list[Any]:
    """A configuration as the document holds it: the values of FIELDS."""
    return [getattr(config, name) for name in FIELDS]


def judge(
    shape: GemmShape, gpu: gpus.Gpu, configs: list[TileConfig], found: search.Space, once: Timer, tuned: Any
) -> dict[str, Any]:
    """One shape's row."""
    order = search.rank([c for c in configs if space.suits(c, shape)], shape, found)
    short = once(shape, [config for _, config, _ in order], ROUNDS, interleave.SAMPLE_US)
    seeds = [c for _, c, _ in order if c in space.candidates(shape, gpu) and c in short][:FIRST]
    fastest = sorted(short, key=lambda c: short[c].p50)[:FASTEST]
    banded = [replace(c, group_m=width) for c in fastest[: FASTEST // 2] for width in space.BANDS]
    again = [*fastest, *banded, *seeds, default_config(shape), *([tuned.config] if tuned else [])]
    hot = once(shape, list(dict.fromkeys(again)), HOT_ROUNDS, measure.HOT_US)
    best = min(hot, key=lambda c: hot[c].p50)
    kept = [(us, config, resources) for us, config, resources in order if config in short]

    def regret(config: TileConfig) -> float:
        return round(hot[config].p50 / hot[best].p50 - 1, 4)

    row = {
        "m": shape.m, "n": shape.n, "k": shape.k, "configurations": len(kept), "wrong": len(order) - len(kept),
        "best": values(best), "best_us": round(hot[best].p50, 2), "default_regret": regret(default_config(shape)),
        "spearman": round(spearman([us for us, *_ in kept], [short[c].p50 for _, c, _ in kept]), 3),
        "first": values(seeds[0]), "first_regret": regret(seeds[0]), "eight_regret": min(map(regret, seeds)),
    }  # fmt: skip
    if tuned:
        evaluations = len(kept) * len(space.BANDS)
        row |= {"tuned": values(tuned.config), "tuned_regret": regret(tuned.config), "tuned_tried": tuned.tried,
                "tuned_share": round(tuned.tried / evaluations, 4)}  # fmt: skip
    row["hot"] = [[values(c), round(t.p20, 2), round(t.p50, 2), round(t.p80, 2)] for c, t in hot.items()]
    row["times"] = [
        [values(c), round(us, 2), round(short[c].p50, 2), r.registers, r.shared_bytes] for us, c, r in kept
    ]  # fmt: skip
    return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The document of all shapes."""
    shapes = select(args.shape or (None if args.shapes else SHAPES), args.shapes, args.limit)
    rows: list[dict[str, Any]] = []
    with workers.Workers() as pool, tempfile.TemporaryDirectory() as folder:
        cards = pool.cards()
        gpu = gpus.get(args.gpu) if args.gpu else (cards or [gpus.get("rtx3090")])[0]
        (target,) = session.plan([gpu], cards, Path(folder) / "t.json")
        if target.card is None and not args.dry_run:
            raise InputError(f"no card here that runs {gpu.alias}'s code; see --dry-run")
        configs = list(space.seeds(gpu) if args.seeds else space.legal(gpu))
        start = time.monotonic()
        jobs = sorted({workers.job(c, s) for s in shapes for c in (*configs, default_config(s)) if space.suits(c, s)})
        found = compiled(pool, target, jobs)
        note(f"{len(jobs)} kernels compiled in {time.monotonic() - start:.0f} s, {len(found.failed)} failed")
        entries = {}
        if not args.no_tune and not args.dry_run:
            store.gather = lambda gpu, toolchain: (Database(gpu), ())  # type: ignore[assignment]  # what is known would be known
            start = time.monotonic()
            (outcome,) = session.run(shapes, [target], pool, note=note)
            entries = {entry.shape: entry for entry in outcome.entries}
            note(f"tuned {len(shapes)} shapes in {time.monotonic() - start:.0f} s, kernels being compiled")
        once = invented(found) if args.dry_run else timer(pool, target)
        for shape in shapes:
            start = time.monotonic()
            rows.append(judge(shape, gpu, [*configs, default_config(shape)], found, once, entries.get(shape)))
            note(f"{shape}: {rows[-1]['best']} in {time.monotonic() - start:.0f} s")
            document = {"format": "int8kit.exhaustive/2", "gpu": gpu.alias, "source": target.source.value,
                        "card": target.card and target.card.name, "triton": tasks.toolchain().split()[-1],
                        "invented": args.dry_run, "config_fields": FIELDS, "shapes": rows}  # fmt: skip
            if args.out:
                files.write_text(args.out, files.dump_rows(document, "shapes"))
    return document


def note(text: str) -> None:
    print(f"exhaustive: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="default: the card that is here")
    parser.add_argument("--shape", action="append", metavar="MxNxK", help="repeatable")
    parser.add_argument("--shapes", type=Path, help="a shapes file")
    parser.add_argument("--limit", type=int, help="so many of the file's shapes")
    parser.add_argument("--seeds", action="store_true", help="only what every run of the tuner compiles")
    parser.add_argument("--no-tune", action="store_true", help="leave out what `int8kit tune` chooses")
    parser.add_argument("--out", type=Path, help="the JSON document, kept after each shape")
    parser.add_argument("--dry-run", action="store_true")
    try:
        document = run(parser.parse_args())
    except Int8kitError as error:
        print(f"exhaustive: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    names = ("m", "n", "k", "configurations", "best", "best_us", "spearman", "default_regret", "first_regret",
             "eight_regret", "tuned", "tuned_regret", "tuned_share")  # fmt: skip
    print(tabulate([[row.get(name) for name in names] for row in document["shapes"]], names))
    print(json.dumps({**document, "shapes": [{k: v for k, v in row.items() if k not in ("times", "hot")}
                                             for row in document["shapes"]]}))  # fmt: skip


if __name__ == "__main__":
    main()
