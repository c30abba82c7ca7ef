"""Every configuration of a few shapes, timed: what the tuner's model and its search are worth.

    python tools/exhaustive.py --gpu rtx3090 --shape 4296x4608x12288 --shape 4096x12288x3072 --out exhaustive.json
    python tools/exhaustive.py --dry-run             # on a CPU; the times are the model's with noise

For each shape: the rank correlation (Spearman) of the model with the measurement, by how much the model's first choice
and the best of its first eight miss the fastest, and what `int8kit tune` chooses, with its time and how many it timed.
Bands of tile rows are left at 8 throughout, but for the tuner's own choice.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from int8kit import files, gpus
from int8kit.bench.gemm import wanted
from int8kit.spec import GemmShape, InputError, Int8kitError, Source, TileConfig
from int8kit.tune import search, workers

ROUNDS = 5
FIRST = 8  # of the model's order
SHAPES = ("4296x4608x4608", "4296x12288x4608", "4296x4608x12288", "4096x9728x2432", "4608x3072x15360")


def warm(jobs: list[tuple[TileConfig, GemmShape, str | None]], processes: int) -> None:
    """Compile for the card that is here, in parallel, into Triton's cache: alone each takes over a second."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(_launch, jobs, chunksize=1)


def _launch(job: tuple[TileConfig, GemmShape, str | None]) -> None:
    from int8kit.tune import measure

    config, shape, arch = job
    card = gpus.present()
    assert card is not None
    measure.Bench(GemmShape(16, 256, shape.k % 1024 + 1024), card, arch=arch).why_not(config)


def measured(shape: GemmShape, gpu: gpus.Gpu, ranked: list[Any], source: Source) -> tuple[dict[TileConfig, float], int]:
    """Microseconds of every configuration that is exact here, and how many are not."""
    from int8kit.tune import measure

    card = gpus.present()
    assert card is not None
    bench = measure.Bench(shape, card, arch=f"sm{gpu.arch}" if source is Source.PROXY else None)
    exact = [config for _, config, _ in ranked if bench.why_not(config) is None]
    times = bench.times(exact, ROUNDS, measure.SAMPLE_US)
    return {config: t.p50 for config, t in zip(exact, times, strict=True)}, len(ranked) - len(exact)


def invented(shape: GemmShape, gpu: gpus.Gpu, ranked: list[Any], source: Source) -> tuple[dict[TileConfig, float], int]:
    """The dry run's stand-in for `measured`."""
    noise = random.Random(str(shape))
    return {config: us * noise.uniform(0.9, 1.2) for us, config, _ in ranked}, 0


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; ties get different ranks, which times do not have."""
    ranks = [{i: r for r, i in enumerate(sorted(range(len(v)), key=v.__getitem__))} for v in (a, b)]
    n = len(a)
    return 1 - 6 * sum((ranks[0][i] - ranks[1][i]) ** 2 for i in range(n)) / (n * (n * n - 1)) if n > 1 else 1.0


def judge(
    shape: GemmShape, ranked: list[Any], times: dict[TileConfig, float], wrong: int, entry: Any
) -> dict[str, Any]:
    """One shape's row."""
    order = [(us, config) for us, config, _ in ranked if config in times]
    best = min(times, key=times.__getitem__)
    row = {
        "m": shape.m, "n": shape.n, "k": shape.k, "configurations": len(times), "wrong": wrong, "best": str(best),
        "best_us": round(times[best], 2),
        "spearman": round(spearman([u for u, _ in order], [times[c] for _, c in order]), 3),
        "first": str(order[0][1]), "first_regret": round(times[order[0][1]] / times[best] - 1, 4),
        "eight_regret": round(min(times[c] for _, c in order[:FIRST]) / times[best] - 1, 4),
        "best_rank": [c for _, c in order].index(best) + 1,
    }  # fmt: skip
    if entry is not None:
        row |= {"tuned": str(entry.config), "tuned_us": entry.time_us, "tuned_tried": entry.tried}
    return row | {"times": [{"config": str(c), "model_us": round(u, 2), "us": round(times[c], 2)} for u, c in order]}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The document of all shapes."""
    gpu = gpus.get(args.gpu) if args.gpu else gpus.present() or gpus.get("rtx3090")
    shapes = wanted(args.shape or (None if args.shapes else SHAPES), args.shapes, args.limit)
    source = search.how(gpu)
    if source is Source.MODELLED and not args.dry_run:
        raise InputError(f"no card here that runs {gpu.alias}'s code; see --dry-run")
    with workers.Workers() as pool:
        found = search.compile_space(shapes, gpu, pool)
    arch = f"sm{gpu.arch}" if source is Source.PROXY else None
    if not args.dry_run:
        warm([(c, s, arch) for s in shapes[:1] for _, c, _ in search.rank(s, gpu, found)], args.processes)
    rows = []
    for shape in shapes:
        ranked = search.rank(shape, gpu, found)
        times, wrong = (invented if args.dry_run else measured)(shape, gpu, ranked, source)
        entry = None if args.dry_run or args.no_tune else search.choose(shape, gpu, found, source)
        rows.append(judge(shape, ranked, times, wrong, entry))
        print(
            f"exhaustive: {shape}: {rows[-1]['best']}, model's rank {rows[-1]['best_rank']}",
            file=sys.stderr,
            flush=True,
        )
        document = {"format": "int8kit.exhaustive/1", "gpu": gpu.alias, "source": source.value, "rounds": ROUNDS,
                    "invented": args.dry_run, "shapes": rows}  # fmt: skip
        if args.out:
            files.write_text(args.out, files.dump_rows(document, "shapes"))
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="default: the card that is here")
    parser.add_argument("--shape", action="append", metavar="MxNxK", help="repeatable")
    parser.add_argument("--shapes", type=Path, help="a shapes file")
    parser.add_argument("--limit", type=int, help="so many of the file's shapes")
    parser.add_argument("--processes", type=int, default=16, help="that compile for the card here")
    parser.add_argument("--no-tune", action="store_true", help="leave out what `int8kit tune` chooses")
    parser.add_argument("--out", type=Path, help="the JSON document, kept after each shape")
    parser.add_argument("--dry-run", action="store_true")
    try:
        document = run(parser.parse_args())
    except Int8kitError as error:
        print(f"exhaustive: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    names = ("m", "n", "k", "configurations", "best", "best_rank", "spearman", "first_regret", "eight_regret")
    print(tabulate([[row[name] for name in names] for row in document["shapes"]], names))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
