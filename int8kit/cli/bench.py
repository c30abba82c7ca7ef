"""The verb `bench`: int8kit's kernels and others, timed in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from int8kit.cli.help import Group
from int8kit.cli.options import Db, Limit, Shape, Shapes, interpret_without_gpu, need, parse_size
from int8kit.cli.terminal import RESULT_FORMAT, STDOUT, Force, Json, Output, check_output, note, progress, show, stages
from int8kit.errors import InputError

app = typer.Typer(
    cls=Group, rich_markup_mode=None, help="Time int8kit's kernels beside those of other libraries, in one run."
)


@app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise InputError("bench: no command; expected gemm, fused or model; see `int8kit bench --help`")


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
    codes = [f"sm{code}" for code in gpus.ARCHS]
    if arch not in (None, *codes):  # whether the present GPU runs it, contestants.ours says
        raise InputError(f"architecture {arch!r}: expected one of {', '.join(codes)}")
    alias = gpus.get(gpu).alias if gpu is not None else None
    if database is not None:
        store.load(database, alias)
    to_file = output if output != STDOUT else None
    if to_file is not None:
        files.check_target(to_file, ours=lambda p: files.is_ours(p, RESULT_FORMAT, "int8kit.bench/1"), force=force)
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


@app.command("fused")
def bench_fused(
    m: Annotated[
        list[int] | None, typer.Option("--m", help="Number of rows. Repeatable. Default: 4352, 2504 and 6144.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Time only this row kernel. Repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Number of samples of each variant.")] = 15,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run tiny sizes on any machine. Their times mean nothing.")
    ] = False,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Time the fused row kernels under each of their tiles, beside a copy of as many bytes and eager torch.

    It needs a CUDA device, except with --dry-run. The sizes are Ideogram 4's.

    Example: int8kit bench fused --dry-run --only swiglu_quantize
    """
    if rounds < 1:
        raise InputError(f"{rounds} rounds: expected 1 or more")
    for rows in m or ():
        if rows < 1:
            raise InputError(f"M = {rows}: expected at least 1 row")
    check_output(output, force, "int8kit.bench-fused/1")
    need("bench fused", "torch", "triton") if not dry_run else interpret_without_gpu()
    from int8kit.bench import fused
    from int8kit.cli import tables

    with progress("timing") as (bar, task):
        document = fused.measure(
            m or fused.ROWS, only=only or (), rounds=rounds, dry_run=dry_run, on_record=lambda _: bar.advance(task)
        )
    show(document, tables.bench_fused_table(document), as_json, output)


@app.command("model")
def bench_model(
    model: Annotated[
        str, typer.Argument(help="Name of a model: ideogram4, or tiny, which runs on a CPU.")
    ] = "ideogram4",
    size: Annotated[str, typer.Option(metavar="WxH", help="Image size in pixels.")] = "1024x1024",
    text_tokens: Annotated[
        list[int] | None, typer.Option(help="Number of text tokens of a prompt. Repeatable, for a batch. Default: 200.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Linears, as in `run`. Repeatable. Default: int8, bf16 and unfused."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time the variants but int8 through torch.compile.")
    ] = False,
    each_repair: Annotated[bool, typer.Option("--repairs", help="Also time int8 without each of its repairs.")] = False,
    profiled: Annotated[
        bool, typer.Option("--profile", help="Also divide each wall clock: GEMM, attention, row kernels, copies, gaps.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Number of steps of each contestant.")] = 7,
    gpu: Annotated[str | None, typer.Option(help="GPU whose database is used. Default: the present one.")] = None,
    database: Db = None,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Time a denoising step of a whole model with random weights: stock diffusers and int8kit's variants.

    It interleaves them round by round. A full-size model needs a CUDA device.

    Example: int8kit bench model tiny --size 64x64 --text-tokens 4 --rounds 1 --profile
    """
    height, width = parse_size(size)
    from int8kit import gpus
    from int8kit.database import store

    alias = gpus.get(gpu).alias if gpu is not None else None
    if database is not None:
        store.load(database, alias)
    check_output(output, force, "int8kit.bench-model/1")
    interpret_without_gpu()
    from int8kit.bench import model as bench
    from int8kit.cli import tables

    default = bench.ModelSetting()
    setting = bench.ModelSetting(
        model=model,
        height=height,
        width=width,
        text_tokens=tuple(text_tokens or default.text_tokens),
        rounds=rounds,
        variants=tuple(variant or default.variants),
        compiled=compiled,
        each_repair=each_repair,
        profiled=profiled,
        gpu=gpu,
        database=database,
    )
    setting.check()
    with progress("timing") as (bar, task):

        def on_line(line: str) -> None:
            bar.advance(task)
            note(line)

        document = bench.measure(setting, note=on_line)
    show(document, tables.bench_model_table(document), as_json, output)
