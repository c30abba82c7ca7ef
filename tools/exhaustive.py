"""Time every legal configuration of a few shapes, to judge the tuner's cost model and its search.

    python tools/exhaustive.py --gpu rtx3090 --shape 4296x4608x12288 --shape 4096x12288x3072 --out exhaustive.json
    python tools/exhaustive.py --gpu rtx3090 --seeds --dry-run       # on a CPU; the times are the model's with noise

Each shape is timed twice. First all configurations in short samples, which give the rank correlation (Spearman) with
the model. Then some of them in samples so long that the GPU's power limit acts. These are the fastest of the first
pass with every L2 swizzle width, the model's first ones, and the choice of `int8kit tune`. This pass gives the best
configuration, and the regret of the others: the share by which they are slower.

The tuner starts without a database, and sees only the named shapes. In the document a configuration is a list of the
values of "config_fields". "card" is the GPU that was timed, and "hot" has the times of the second pass; both keys kept
their names from earlier documents. The last line of the output is one JSON object.
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
from int8kit.timing.interleave import Times
from int8kit.tune import search, session, space, tasks, workers

ROUNDS, SUSTAINED_ROUNDS = 3, 9
FIELDS = [field.name for field in fields(TileConfig)]
FIRST = 8  # configurations by the model's order
FASTEST = 12  # configurations of the first pass that are timed again
CHUNK, CHUNK_S = 200, 120.0  # configurations in one set of rounds, and its limit in seconds
SHAPES = ("4296x4608x4608", "4296x12288x4608", "4296x4608x12288", "4096x9728x2432", "4608x3072x15360")

Timer = Callable[[GemmShape, list[TileConfig], int, bool], dict[TileConfig, Times]]


def timer(pool: workers.Workers, target: session.Target) -> Timer:
    """Function that times the configurations that are exact on the present GPU, CHUNK at a time."""
    assert target.timed_on is not None
    gpu, code_arch = target.timed_on.alias, target.code_arch

    def job(shape: GemmShape, configs: list[TileConfig], rounds: int, sustained: bool) -> Any:
        chunks = [tuple(configs[i : i + CHUNK]) for i in range(0, len(configs), CHUNK)]
        calls = [(shape, code_arch, chunk, rounds, sustained, False) for chunk in chunks]
        results = yield workers.Batch(tasks.time_configs, calls, gpu=gpu, limit_s=CHUNK_S, once=True)
        times = {}
        for call, result in results.items():
            if isinstance(result, workers.ProcessEnded):  # time the chunk again without the guilty configurations
                alone = yield workers.Batch(
                    tasks.try_alone, [(shape, code_arch, c) for c in call[2]], gpu=gpu, once=True
                )
                guilty = {c: str(end) for (_, _, c), end in alone.items() if isinstance(end, workers.ProcessEnded)}
                note(f"{shape}: {result}; alone {', '.join(f'{c}: {why}' for c, why in guilty.items()) or 'none does'}")
                rest = (shape, code_arch, tuple(c for c in call[2] if c not in guilty), rounds, sustained, False)
                again = yield workers.Batch(tasks.time_configs, [rest], gpu=gpu, limit_s=CHUNK_S, once=True)
                result = again[rest]
            times |= {} if isinstance(result, workers.ProcessEnded) else result.times
        return times

    def once(shape: GemmShape, configs: list[TileConfig], rounds: int, sustained: bool) -> Any:
        return pool.drive([job(shape, configs, rounds, sustained)])[0]

    return once


def invented(kernels: search.Compilations) -> Timer:
    """Replacement of `timer` for the dry run: the model's estimates with noise."""

    def once(shape: GemmShape, configs: list[TileConfig], rounds: int, sustained: bool) -> dict[TileConfig, Times]:
        times = {}
        for us, config, _ in search.rank(configs, shape, kernels):
            us *= random.Random(f"{shape} {config}").uniform(0.9, 1.2)
            times[config] = Times(us, us, us)
        return times

    return once


def compiled(
    pool: workers.Workers, target: session.Target, wanted_kernels: list[space.KernelVariant]
) -> search.Compilations:
    """Compile each kernel for the model, and for launches if a present GPU runs it."""
    kernels = search.Compilations(target.machine)

    def keep(call: tuple[Any, ...], result: Any) -> None:
        kernels.add(call[1], workers.compilation(result))

    def program() -> Any:
        calls = [(target.gpu.arch, kernel, target.launch_code) for kernel in wanted_kernels]
        yield workers.Batch(tasks.compile_kernel, calls, keep)

    pool.drive([program()])
    return kernels


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation (Spearman 1904). Equal values get different ranks; times are hardly ever equal."""
    ranks = [{i: r for r, i in enumerate(sorted(range(len(v)), key=v.__getitem__))} for v in (a, b)]
    n = len(a)
    return 1 - 6 * sum((ranks[0][i] - ranks[1][i]) ** 2 for i in range(n)) / (n * (n * n - 1)) if n > 1 else 1.0


def values(config: TileConfig) -> list[Any]:
    """A configuration as in the document: the values of FIELDS."""
    return [getattr(config, name) for name in FIELDS]


def judge(
    shape: GemmShape, gpu: gpus.Gpu, configs: list[TileConfig], kernels: search.Compilations, once: Timer, tuned: Any
) -> dict[str, Any]:
    """One row of the document: a shape. tuned: the entry that the tuner chose, or None."""
    order = search.rank([c for c in configs if space.suits(c, shape)], shape, kernels)
    short = once(shape, [config for _, config, _ in order], ROUNDS, False)
    seeds = [c for _, c, _ in order if c in space.candidates(shape, gpu) and c in short][:FIRST]
    fastest = sorted(short, key=lambda c: short[c].p50)[:FASTEST]
    swizzled = [replace(c, group_m=width) for c in fastest[: FASTEST // 2] for width in space.SWIZZLE_WIDTHS]
    again = [*fastest, *swizzled, *seeds, default_config(shape), *([tuned.config] if tuned else [])]
    sustained = once(shape, list(dict.fromkeys(again)), SUSTAINED_ROUNDS, True)
    best = min(sustained, key=lambda c: sustained[c].p50)
    kept = [(us, config, resources) for us, config, resources in order if config in short]

    def regret(config: TileConfig) -> float:
        return round(sustained[config].p50 / sustained[best].p50 - 1, 4)

    row = {
        "m": shape.m, "n": shape.n, "k": shape.k, "configurations": len(kept), "wrong": len(order) - len(kept),
        "best": values(best), "best_us": round(sustained[best].p50, 2), "default_regret": regret(default_config(shape)),
        "spearman": round(spearman([us for us, *_ in kept], [short[c].p50 for _, c, _ in kept]), 3),
        "first": values(seeds[0]), "first_regret": regret(seeds[0]), "eight_regret": min(map(regret, seeds)),
    }  # fmt: skip
    if tuned:
        evaluations = len(kept) * len(space.SWIZZLE_WIDTHS)
        row |= {"tuned": values(tuned.config), "tuned_regret": regret(tuned.config), "tuned_tried": tuned.tried,
                "tuned_share": round(tuned.tried / evaluations, 4)}  # fmt: skip
    row["hot"] = [[values(c), round(t.p20, 2), round(t.p50, 2), round(t.p80, 2)] for c, t in sustained.items()]
    row["times"] = [
        [values(c), round(us, 2), round(short[c].p50, 2), r.registers, r.shared_bytes] for us, c, r in kept
    ]  # fmt: skip
    return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The document of all shapes."""
    shapes = select(args.shape or (None if args.shapes else SHAPES), args.shapes, args.limit)
    rows: list[dict[str, Any]] = []
    with workers.Workers() as pool, tempfile.TemporaryDirectory() as folder:
        present = pool.gpus()
        gpu = gpus.get(args.gpu) if args.gpu else (present or [gpus.get("rtx3090")])[0]
        (target,) = session.targets_of([gpu], present, Path(folder) / "t.json")
        if target.timed_on is None and not args.dry_run:
            raise InputError(f"no present GPU runs the code of {gpu.alias}; --dry-run invents times")
        configs = list(space.seeds(gpu) if args.seeds else space.legal(gpu))
        start = time.monotonic()
        suiting = ((c, s) for s in shapes for c in (*configs, default_config(s)) if space.suits(c, s))
        needed = sorted({space.variant_of(config, shape) for config, shape in suiting})
        kernels = compiled(pool, target, needed)
        note(f"{len(needed)} kernels compiled in {time.monotonic() - start:.0f} s, {len(kernels.failed)} failed")
        entries = {}
        if not args.no_tune and not args.dry_run:
            # a stored entry of a shape would give the tuner its result
            store.merged_view = lambda gpu, toolchain: (Database(gpu), ())  # type: ignore[assignment]
            start = time.monotonic()
            (result,) = session.tune(shapes, [target], pool, note=note)
            entries = {entry.shape: entry for entry in result.entries}
            note(f"tuned {len(shapes)} shapes in {time.monotonic() - start:.0f} s, with all kernels compiled before")
        once = invented(kernels) if args.dry_run else timer(pool, target)
        for shape in shapes:
            start = time.monotonic()
            rows.append(judge(shape, gpu, [*configs, default_config(shape)], kernels, once, entries.get(shape)))
            note(f"{shape}: {rows[-1]['best']} in {time.monotonic() - start:.0f} s")
            document = {"format": "int8kit.exhaustive/2", "gpu": gpu.alias, "source": target.source.value,
                        "card": target.timed_on and target.timed_on.name, "triton": tasks.versions().split()[-1],
                        "invented": args.dry_run, "config_fields": FIELDS, "shapes": rows}  # fmt: skip
            if args.out:
                files.write_text(args.out, files.dump_rows(document, "shapes"))
    return document


def note(text: str) -> None:
    print(f"exhaustive: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="default: the present GPU")
    parser.add_argument("--shape", action="append", metavar="MxNxK", help="repeatable")
    parser.add_argument("--shapes", type=Path, help="a shapes file")
    parser.add_argument("--limit", type=int, help="number of the file's shapes")
    parser.add_argument(
        "--seeds", action="store_true", help="only the configurations that every run of the tuner compiles"
    )
    parser.add_argument("--no-tune", action="store_true", help="leave out the choice of `int8kit tune`")
    parser.add_argument("--out", type=Path, help="file for the JSON document, written after each shape")
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
