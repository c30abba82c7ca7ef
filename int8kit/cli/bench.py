"""The verb `bench`: int8kit's kernels and others, timed in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from int8kit.cli.help import Group
from int8kit.cli.options import Db, Limit, Shape, Shapes, need
from int8kit.cli.terminal import STDOUT, Force, Json, note, stages
from int8kit.errors import InputError

app = typer.Typer(
    cls=Group, rich_markup_mode=None, help="Time int8kit's kernels beside those of other libraries, in one run."
)


@app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise InputError("bench: no command; expected gemm; see `int8kit bench --help`")


@app.command("gemm")
def bench_gemm(
    shapes: Shapes = None,
    shape: Shape = None,
    limit: Limit = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU whose database is used. For an older GPU, its code is run on this one.")
    ] = None,
    database: Db = None,
    arch: Annotated[
        str | None, typer.Option(help="Also time the code of this architecture, such as sm86, on this GPU.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Time only int8kit and this contestant. Repeatable.")
    ] = None,
    inductor: Annotated[
        bool, typer.Option(help="Also time torch.compile with max-autotune. It compiles for minutes a shape.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Number of samples of each contestant.")] = 21,
    sample_ms: Annotated[
        float, typer.Option(help="Length of a sample in ms. From 20 on, the power limit lowers the clock.")
    ] = 4.0,
    graph: Annotated[
        bool, typer.Option(help="Replay CUDA graphs, which hide the host's time from small shapes.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The JSON document, written after each shape; `-`: to stdout."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", hidden=True)] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Time int8kit's GEMM, alone and with quantization, beside bf16, fp8 and torch._int_mm. Needs a CUDA device.

    It times in interleaved rounds and prints p20, p50, p80 and the share of the peak. It compares every result with the
    reference: exit status 1 if int8kit differs. The last line on stdout is one JSON object. tools/bench_peers.py adds
    other libraries' kernels.

    Example: int8kit bench gemm --limit 8 --output out/bench.json
    """
    from int8kit import files, gpus, shapes_file
    from int8kit.cli import tables
    from int8kit.database import store

    if output is not None and out is not None:
        raise InputError(f"--output {output} and --out {out} are the same option; give one of them")
    output = output if output is not None else out
    if shape and shapes:
        raise InputError(f"--shape {shape[0]} and --shapes {shapes}: expected one of them")
    todo = shapes_file.select(shape, shapes, limit)
    if rounds < 1:
        raise InputError(f"{rounds} rounds: expected 1 or more")
    if not 0.1 <= sample_ms <= 10_000:
        raise InputError(f"samples of {sample_ms:g} ms: expected 0.1 to 10000")
    alias = gpus.get(gpu).alias if gpu is not None else None
    if database is not None:
        store.load(database, alias)
    to_file = output if output != STDOUT else None
    if to_file is not None:
        files.check_target(to_file, ours=lambda p: files.is_ours(p, "int8kit.bench/1"), force=force)
    need("bench gemm", "torch", "triton")
    from int8kit.bench import contestants, gemm

    listed = contestants.ours(gpus.present() or gpus.get("h200"), gpu=alias, path=database, arch=arch)
    listed = contestants.only(listed + contestants.standard(inductor), only or ())
    setting = gemm.Setting(rounds, graph, sample_us=round(sample_ms * 1000))
    with stages() as stage:
        step = stage("timing", len(todo))

        def on_shape(text: str) -> None:
            note(text)
            if text.startswith("["):  # a shape is done
                step()

        outcome = gemm.benchmark(todo, listed, setting, output=to_file, force=force, note=on_shape)
    document = outcome.document()
    print(tables.bench_tables(document), file=sys.stderr if as_json or output == STDOUT else sys.stdout)
    print(json.dumps(document))
    outcome.conclude()
