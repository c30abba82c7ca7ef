"""The command line: one function a verb, each parses, calls and prints; what they do is in the stages' modules.

Results go to stdout, as a table or with --json as one JSON document; progress and notes go to stderr. Exit status:
0 done, 1 the check failed, 2 the call is off (one line says how), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit import __version__
from int8kit.cli import compare, db, verify
from int8kit.cli.terminal import Force, Json, note, progress, quiet_libraries, show, stages
from int8kit.errors import CheckFailed, InputError, Int8kitError

app = typer.Typer(
    add_completion=False, no_args_is_help=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="INT8 linears of diffusion transformers on integer tensor cores: trace, tune, verify, run.",
)  # fmt: skip
bench = typer.Typer(rich_markup_mode=None, help="Time int8kit beside other kernels, in one run.")
app.add_typer(bench, name="bench")
app.add_typer(db.app, name="db")
app.add_typer(verify.app, name="verify")
app.command()(compare.compare)
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended
_EXTRAS = {
    "dask": "tune", "distributed": "tune", "diffusers": "run", "transformers": "run", "PIL": "run",
    "bitsandbytes": "nf4", "hypothesis": "verify",
}  # fmt: skip

SIZES = ("768x768", "1024x1024", "1536x1536", "2048x2048")  # of the shapes files that are committed
STOCK_SLOTS = 2048

Size = Annotated[list[str] | None, typer.Option("--size", metavar="WxH", help="Image size in pixels; repeatable.")]


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs a verb, turns every error of ours into one line, and exits."""
    usage_error: Any = typer.BadParameter.__base__  # typer exports no name for the root of its usage errors
    try:
        status = app(args=argv, prog_name="int8kit", standalone_mode=False) or 0
        if status == INTERRUPTED:  # newer typers turn a KeyboardInterrupt into this, without a word
            raise KeyboardInterrupt
        sys.exit(status)
    except Int8kitError as error:
        _fail(str(error), error.exit_status)
    except usage_error as error:
        _fail(f"{error.format_message()} See `int8kit --help`.", 2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRAS:
            raise
        _fail(f"no module {error.name!r}; install it with `pip install 'int8kit[{_EXTRAS[str(error.name)]}]'`", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; what was finished is kept", INTERRUPTED)


def _fail(message: str, status: int) -> None:
    print(f"int8kit: {' '.join(message.split())}", file=sys.stderr)
    if status == INTERRUPTED:  # nothing is left to write, and joining a pool of ended workers can block for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise InputError("no verb; legal are trace-shapes, tune, verify, run, bench and db; see `int8kit --help`")


def _size(text: str) -> tuple[int, int]:
    """WxH in pixels -> (height, width)."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal()):
        raise InputError(f"size {text!r}: legal is WIDTHxHEIGHT in pixels, multiples of 16, such as 1024x1024")
    return int(height), int(width)


@app.command("trace-shapes")
def trace_shapes(
    model: Annotated[str, typer.Argument(help="A model's name, or a local folder in diffusers' layout.")] = "ideogram4",
    size: Size = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 200,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    slots: Annotated[
        list[int] | None,
        typer.Option(help="Text slots of the sequence; 2048 is the stock pipeline's. Default: the tokens. Repeatable."),
    ] = None,
    branch: Annotated[str, typer.Option(help="cond, uncond or both.")] = "both",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: shapes/<model>.json")] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Every GEMM of one forward of a model, without weights or a GPU -> a shapes file.

    Without --size: what the shipped files hold, 768 to 2048 px, with tight text and with the stock 2048 slots.

    Example: int8kit trace-shapes ideogram4 --size 1024x1024 --text-tokens 200
    """
    from int8kit import files, models, trace
    from int8kit.cli import tables

    known = models.get(model)
    if branch not in (*models.BRANCHES, "both"):
        raise InputError(f"branch {branch!r}: legal are cond, uncond and both")
    cases: dict[models.Case, None] = {}
    if not size and not slots:
        slots = [text_tokens, max(text_tokens, STOCK_SLOTS)]
    for height, width in map(_size, size or SIZES):
        for one in models.BRANCHES if branch == "both" else (branch,):
            for padded in slots if slots and one == "cond" else (None,):
                cases[models.Case(height, width, batch, text_tokens, padded, one)] = None
    path = output or Path("shapes") / f"{known.name}.json"
    files.check_target(path, ours=lambda p: files.is_ours(p, trace.FORMAT), force=force)
    with progress("tracing") as (bar, task):
        bar.update(task, total=len(cases))
        document = trace.trace(known, cases, on_case=lambda _: bar.advance(task))
    trace.write(document, path)
    show(document, f"{tables.shapes_table(document)}\n\nwrote {path}", as_json)


@app.command()
def tune(
    gpu: Annotated[
        list[str] | None, typer.Option(help="The card, such as rtx3090; repeatable. Default: every kind that is here.")
    ] = None,
    gpu_spec: Annotated[Path | None, typer.Option(help="A JSON file that describes another card.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Of a dask cluster that compiles and times, tcp://host:8786.")
    ] = None,
    shapes: Annotated[Path | None, typer.Option(help="A shapes file. Default: Ideogram 4's.")] = None,
    size: Size = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: tuning_db/<gpu>.json")] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """The best tile configuration of each shape -> a tuning database.

    On the card itself it measures; on a newer NVIDIA card it measures that card's code and says so; without a GPU it
    compiles for the card and ranks by a model. Interrupted or killed, the same command goes on where it was.

    Example: int8kit tune --gpu rtx3090 --size 1024x1024
    """
    from int8kit import files, gpus
    from int8kit.database import store
    from int8kit.tune import session, workers

    if gpu and gpu_spec:
        raise InputError(f"--gpu {', '.join(gpu)} and --gpu-spec {gpu_spec}: name one card")
    named = [gpus.read_spec(gpu_spec)] if gpu_spec else [gpus.get(alias) for alias in dict.fromkeys(gpu or ())]
    wanted = _wanted(shapes, size)
    for one in named:  # a damaged or foreign database is refused before the work, not after
        path = output or Path("tuning_db") / f"{one.alias}.json"
        files.check_target(path, ours=store.is_ours, force=force)
        if path.exists() and store.is_ours(path):
            store.load(path, one.alias)
    with workers.Workers(scheduler) as pool:
        cards = pool.gpus()
        listed = named or list(dict.fromkeys(cards))
        if not listed:
            raise InputError(f"no card here to tune for; name one with --gpu: {', '.join(sorted(gpus.GPUS))}")
        if output and len(listed) > 1:
            raise InputError(f"--output {output} and {len(listed)} cards: each feeds its own file; leave it out")
        targets = session.targets_of(listed, cards, output)
        for target in targets:
            note(_how(target.source, target.gpu.alias))
        if any(target.timed_on for target in targets):
            session.check_health(pool, note)
        try:
            with stages() as stage:
                outcomes = session.tune(wanted, targets, pool, force=force, stage=stage, note=note)
        except KeyboardInterrupt:
            note("run the same command again to go on from here")
            raise
    documents = [_tuned(outcome) for outcome in outcomes]
    if as_json:
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1, default=str))
    failed = [f"{shape}: {reason}" for outcome in outcomes for shape, reason in outcome.failed.items()]
    if not as_json:
        print("\n\n".join(_tuned_table(outcome) for outcome in outcomes))
    if failed:
        raise CheckFailed(f"{len(failed)} shapes have no entry; the others are written; first {failed[0]}")


def _wanted(shapes: Path | None, size: list[str] | None) -> set[Any]:
    """The shapes to tune for. Raises InputError if there are none of one of the sizes."""
    from int8kit import files, trace

    source = shapes or files.shipped("shapes") / "ideogram4.json"
    document = trace.read(source)
    wanted: set[Any] = set()
    for one in [_size(text) for text in size] if size else [None]:
        found = trace.int8_shapes(document, one)
        if not found:
            where = f"of {one[1]}x{one[0]} px " if one else ""
            raise InputError(f"no shape {where}to tune in {str(source)!r}; trace it with `int8kit trace-shapes`")
        wanted |= set(found)
    return wanted


def _tuned(outcome: Any) -> dict[str, Any]:
    rows = [e.model_dump(mode="json", exclude_none=True) for e in outcome.entries]
    return {
        "database": str(outcome.target.path), "gpu": outcome.target.gpu.alias, "source": outcome.target.source,
        "rejected": outcome.rejected, "failed": {str(shape): why for shape, why in outcome.failed.items()},
        "kept": outcome.kept, "resumed": outcome.resumed, "kernels": outcome.kernels, "entries": rows,
    }  # fmt: skip


def _tuned_table(outcome: Any) -> str:
    from int8kit.cli import tables

    written = len(outcome.entries) - outcome.kept
    stronger = f"; {outcome.kept} kept their measured or proxy entry, which is stronger" if outcome.kept else ""
    before, after = outcome.kernels
    fewer = f"{after} kernels" + (f", {before} before shapes within 1 % shared one" if before > after else "")
    out = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.rejected.items()))
    table = (
        f"{tables.tuning_table(outcome.entries)}\n\nwrote {written} entries to {outcome.target.path}{stronger}\n{fewer}"
    )
    return table + (f"\nout, by class: {out}" if out else "")


def _how(source: str, alias: str) -> str:
    return {
        "measured": f"{alias} is here: measuring",
        "proxy": f"no {alias} here: timing its code on a newer card; entries are marked proxy",
        "modelled": f"no {alias} here: compiling for it and ranking by a model; entries are marked modelled",
    }[source]


@app.command()
def run(
    prompt: Annotated[str, typer.Option(help="What to paint.")] = "a red bicycle against a white brick wall",
    model: Annotated[str, typer.Option(help="tiny, a local folder in diffusers' layout, or a hub id.")] = "tiny",
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Default: 1024x1024; 256x256 for tiny.")] = None,
    preset: Annotated[str, typer.Option(help="quality, default or turbo: 48, 20 or 12 steps.")] = "quality",
    steps: Annotated[int | None, typer.Option(help="Default: the preset's; 4 for tiny.")] = None,
    guidance: Annotated[float | None, typer.Option(help="One guidance scale instead of the preset's schedule.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    gpu: Annotated[str | None, typer.Option(help="Whose database. Default: the card here, else rtx3090.")] = None,
    database: Annotated[Path | None, typer.Option("--db", help="Default: ./tuning_db/<gpu>.json, or shipped.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse configurations that are not proven here.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG.")] = Path("out/image.png"),
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Text to image with the transformers' linears in INT8; configurations come from the database, once.

    The default model, tiny, has random weights: it shows the whole way in seconds, on a CPU too, and paints noise.

    Example: int8kit run --prompt "a red bicycle" --output out/bicycle.png
    """
    quiet_libraries()
    from int8kit import files
    from int8kit.cli import tables
    from int8kit.runtime import generate

    tiny = model == "tiny"
    height, width = _size(size or ("256x256" if tiny else "1024x1024"))
    files.check_target(output, ours=generate.is_ours, force=force)
    request = generate.ImageRequest(
        prompt,
        model=model,
        height=height,
        width=width,
        preset=preset,
        steps=4 if tiny and steps is None else steps,
        guidance=guidance,
        seed=seed,
        gpu=gpu,
        database=database,
        strict=strict,
    )
    outcome = generate.generate(request)
    if unproven := generate.unproven_of(outcome.choices):
        note(f"{len(unproven)} of {len(outcome.choices)} configurations are not proven with the present kernels; see "
             "`int8kit verify`")  # fmt: skip
    generate.save(outcome, output)
    took = {key: value for key, value in vars(outcome).items() if key.endswith(("_s", "_ms", "_gib"))}
    choices = [
        {"m": c.shape.m, "n": c.shape.n, "k": c.shape.k, "layers": count, "config": vars(c.config), "level": c.level,
         "why": c.provenance,
         "verified": c.verified} for c, count in outcome.choices
    ]  # fmt: skip
    document = {"image": str(output), "device": outcome.device, "text_tokens": outcome.tokens, **took,
                "databases": list(map(str, outcome.databases)), "configurations": choices}  # fmt: skip
    show(document, f"{tables.run_tables(outcome)}\n\nwrote {output}", as_json)


@bench.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise InputError("bench: no command; legal is gemm; see `int8kit bench --help`")


@bench.command("gemm")
def bench_gemm(
    shapes: Annotated[Path | None, typer.Option(help="A shapes file. Default: Ideogram 4's.")] = None,
    shape: Annotated[list[str] | None, typer.Option(metavar="MxNxK", help="Instead of a file's; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(help="So many of the file's shapes, spread over them.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Whose database. An older card's: that card's code.")] = None,
    database: Annotated[Path | None, typer.Option("--db", help="Default: ./tuning_db/<gpu>.json, or shipped.")] = None,
    arch: Annotated[str | None, typer.Option(help="sm86: that architecture's code beside the card's own.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only int8kit and this contestant; repeatable.")] = None,
    inductor: Annotated[bool, typer.Option(help="Also torch.compile's max-autotune: minutes a shape.")] = False,
    rounds: Annotated[int, typer.Option(help="Samples of each contestant.")] = 21,
    sample_ms: Annotated[float, typer.Option(help="Length of a sample; from 20 on, power limits count.")] = 4.0,
    graph: Annotated[bool, typer.Option(help="Replay CUDA graphs, which takes the host out of small shapes.")] = True,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="The JSON document, kept after each shape.")
    ] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """int8kit's GEMM, alone and with quantization, beside bf16, fp8 and torch._int_mm; needs a CUDA device.

    Interleaved rounds, p20/p50/p80, share of the peak, and every result held against the reference: exit status 1 if
    int8kit differs. The last line is one JSON object. tools/bench_peers.py adds other projects' kernels.

    Example: int8kit bench gemm --limit 8 --out out/bench.json
    """
    from int8kit import gpus
    from int8kit.bench import contestants, gemm
    from int8kit.cli import tables

    listed = contestants.ours(gpus.present() or gpus.get("h200"), gpu=gpu, path=database, arch=arch)
    listed = contestants.only(listed + contestants.standard(inductor), only or ())
    todo = gemm.wanted(shape, shapes, limit)
    setting = gemm.Setting(rounds, graph, sample_us=round(sample_ms * 1000))
    outcome = gemm.benchmark(todo, listed, setting, output=output, force=force, note=note)
    print(tables.bench_tables(outcome.document()), file=sys.stderr if as_json else sys.stdout)
    print(json.dumps(outcome.document()))
    outcome.conclude()


if __name__ == "__main__":
    main()
