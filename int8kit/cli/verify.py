"""The verb `verify`: the kernels proven, and with --mutate the proof itself, by faults that it must catch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit.cli.terminal import Json, note, progress, quiet_libraries, show
from int8kit.errors import CheckFailed, FileError, InputError, UnknownName
from int8kit.spec import TileConfig, legal_configs


def verify(
    gpu: Annotated[str | None, typer.Option(help="The card. Default: --db's, else the one here, else rtx3090.")] = None,
    database: Annotated[Path | None, typer.Option("--db", help="Default: ./tuning_db/<gpu>.json, or shipped.")] = None,
    shapes: Annotated[Path | None, typer.Option(help="Checked beside the database's. Default: Ideogram 4's.")] = None,
    examples: Annotated[
        int | None,
        typer.Option(help="Examples drawn for each property. Default: 150; 60 on a card, which compiles each."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws other examples.")] = 0,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Ten times the examples, over every legal configuration: minutes.")
    ] = False,
    stamp: Annotated[bool, typer.Option(help="Write what passed into the database.")] = True,
    mutate: Annotated[
        bool, typer.Option("--mutate", help="Verify the verifier: faults seeded into copies of the kernels.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="This property alone, such as entries; with --mutate: this fault alone. Repeatable."),
    ] = None,
    subject: Annotated[
        list[str] | None,
        typer.Option(help="Judge this GEMM beside int8kit's: torch._int_mm, ..., or module:function; repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Compare INT8 with bf16, layer by layer: tiny, a folder, or a hub id.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="With --model: torch.save's file of the forwards' arguments. Default: random.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Prove the kernels bit-exact against torch._int_mm, 64-bit integers and the reference.

    Executes on the GPU, or at reduced sizes in Triton's interpreter on a CPU. Exit status 1 if anything differs, with
    the smallest example that does. With --only, one property or several, in seconds: `--only entries` executes and
    stamps the database's configurations alone.

    With --mutate, faults are seeded one by one into copies of the kernels, and the same checks must catch each: exit
    status 1 if one survives that could run here. Those that only a card shows are named. Minutes on a CPU.

    With --subject, other INT8 GEMMs are held to the same properties, in a matrix. A function of your own takes
    (xq, wq) and gives int32 sums, or (xq, wq, sx, sw, bias, out_dtype) and gives the output.

    With --model, a model's linears in INT8 beside the originals, on random or given inputs: the layers that lose most.

    Example: int8kit verify --gpu rtx3090
    """
    if examples is not None and examples < 1:
        raise InputError(f"--examples {examples}: legal is 1 or more")
    if mutate and (database or shapes):
        raise InputError("--mutate with --db or --shapes: faults bring configurations of their own; leave the file out")
    if subject and (mutate or database or shapes):
        raise InputError("--subject with --mutate, --db or --shapes: subjects bring no configurations; leave it out")
    if model and (mutate or subject or database or shapes):
        raise InputError("--model with --mutate, --subject, --db or --shapes: it compares layers; leave it out")
    if inputs and not model:
        raise InputError(f"--inputs {inputs}: of a model's forwards; add --model")
    if only and (subject or model):
        raise InputError("--only with --subject or --model: it names a property of int8kit's kernels; leave it out")
    if exhaustive and (mutate or subject or model):
        raise InputError("--exhaustive with --mutate, --subject or --model: it is of int8kit's kernels; leave it out")
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the verb's process runs nothing else
    if model:
        _compare(model, inputs, seed, as_json, markdown)
    elif mutate:
        _mutate(gpu, only or [], examples, seed, as_json, markdown)
    elif subject:
        _judge(gpu, subject, examples, seed, as_json, markdown)
    else:
        _prove(gpu, database, shapes, only or [], examples, seed, exhaustive, stamp, as_json, markdown)


def _prove(
    gpu: str | None, database: Path | None, shapes: Path | None, only: list[str], examples: int | None, seed: int,
    exhaustive: bool, stamp: bool, as_json: bool, markdown: bool,
) -> None:  # fmt: skip
    from int8kit import files, gpus, trace
    from int8kit.cli import tables
    from int8kit.database import store
    from int8kit.kernels import gemm
    from int8kit.verify import executors, property_runs, replay, runner
    from int8kit.verify.properties import checks

    if database is not None and gpu is None:
        card = store.load(database).gpu
    else:
        card = gpus.get(gpu) if gpu else gpus.present() or gpus.get("rtx3090")
    toolchain = gemm.toolchain()
    base, paths = store.gather(card, toolchain, database)
    wanted = trace.int8_shapes(trace.read(shapes or files.shipped("shapes") / "ideogram4.json"))
    unlisted = tuple(base.unlisted(wanted, toolchain))
    found = executors.available(card)
    jobs = [
        property_runs.PropertyRun(name, executor)
        for executor in found
        for name in checks.names(executor, base, unlisted)
    ]
    if only:
        _check_names(only, {job.name for job in jobs})
        jobs = [job for job in jobs if job.name in only]
    named = ", ".join(map(str, paths)) or "no database, so the defaults"
    for executor in found:
        reduced = ", at reduced M, N and K" if executor.on == "interpreter" else ""
        note(
            f"executing on {executor}{reduced}; {len({e.shape for e in base.entries}) + len(unlisted)} shapes; {named}"
        )
    more: tuple[TileConfig, ...] = ()
    if exhaustive:
        examples = 10 * checks.budget(found[-1], examples).examples
        more = legal_configs(card.arch, card.shared_memory)
        runnable = sum(checks.runs_on(config, found[0]) for config in more)
        note(f"{examples} examples of each property, over {runnable} configurations")
    results: list[runner.Result] = []
    stamps: dict[Any, list[Any]] = {}
    with progress("verifying") as (bar, task):
        outcomes = property_runs.run_all(
            jobs,
            property_runs.VerifyKernels(base, examples, seed, more, unlisted),
            processes=property_runs.process_count(found[-1]),
            on_example=lambda: bar.advance(task),
        )
        for result, passed in outcomes:
            results.append(result)
            for key, new in passed.items():
                stamps.setdefault(key, []).extend(new)
    failures = [r for r in results if r.failure]
    lines = [tables.verify_table(results, markdown)]
    archs = {str(executor): executor.arch for executor in found}
    for r in failures:
        lines.append(f"\n{r.name} differs on {r.on}, smallest example:\n  {r.failure}")
        if r.example:
            lines.append(f"again by\n  {replay.command(r, arch=archs[r.on])}")
            _keep(r.name, r.example)
    show({"gpu": card.alias, "databases": paths, "results": [vars(r) for r in results]}, "\n".join(lines), as_json)
    if failures:
        raise CheckFailed(f"{len(failures)} of {len(results)} properties differ: {', '.join(r.name for r in failures)}")
    for path in paths if stamp and stamps else ():
        _stamp(path, stamps, base)


def _check_names(only: list[str], known: set[str]) -> None:
    """Raise InputError for the first of `only` that is no property of the kernels here."""
    from int8kit.verify.mutation.catalogue import CATALOGUE

    for name in only:
        if name in {mutant.name for mutant in CATALOGUE} - known:
            raise InputError(f"--only {name}: names a fault of --mutate; add --mutate")
        if name not in known:
            raise UnknownName("property", name, known)


def _keep(name: str, example: str, subject: str = "int8kit") -> None:
    """Later runs begin with it."""
    from int8kit.verify.examples import regressions

    try:
        regressions.add(name, example, subject)
    except (FileError, OSError) as error:  # the failure is reported, whether or not it can be kept
        note(f"example not kept: {error}")


def _compare(model: str, inputs: Path | None, seed: int, as_json: bool, markdown: bool) -> None:
    from dataclasses import asdict

    quiet_libraries()
    from int8kit import models
    from int8kit.cli import tables
    from int8kit.runtime import layer_errors

    side = 256 if model == models.TINY else 1024
    case = models.Case(side, side, text_tokens=32 if model == models.TINY else 200)
    with progress("comparing") as (bar, task):

        def on_layer(total: int) -> None:
            bar.update(task, total=total)
            bar.advance(task)

        branches = layer_errors.compare(model, case, seed=seed, inputs=inputs, on_layer=on_layer)
    document = {"model": model, "inputs": "given" if inputs else "random", "branches": [asdict(b) for b in branches]}
    show(document, tables.layers_table(branches, markdown), as_json)


def _judge(gpu: str | None, names: list[str], examples: int | None, seed: int, as_json: bool, markdown: bool) -> None:
    import sys

    from int8kit import gpus
    from int8kit.cli import tables
    from int8kit.database.database import Database
    from int8kit.verify import compare_implementations, executors, replay

    sys.path.insert(0, os.getcwd())  # as `python -m` has it: where a user's module is
    card = gpus.get(gpu) if gpu else gpus.present() or gpus.get("rtx3090")
    executor = executors.available(card)[-1]
    configs = compare_implementations.tiles(executor, Database(card))
    with progress("judging") as (bar, task):
        columns = compare_implementations.run(
            names, executor, configs, examples=examples, random_seed=seed, on_example=lambda: bar.advance(task)
        )
    lines = [tables.subjects_table(columns, markdown)]
    broken = [(column.subject, r) for column in columns for r in column.results if r.failure]
    for name, r in broken:
        lines.append(f"\n{name} breaks {r.name!r}, smallest example:\n  {r.failure}")
        if r.example:
            lines.append(f"again by\n  {replay.command(r, name)}")
            _keep(r.name, r.example, name)
    document = {"on": str(executor), "subjects": {c.subject: [vars(r) for r in c.results] for c in columns}}
    show(document, "\n".join(lines), as_json)
    if broken:
        found = ", ".join(f"{name} ({r.name})" for name, r in broken)
        raise CheckFailed(f"{len(broken)} properties do not hold: {found}")


def _stamp(path: Path, stamps: dict[Any, Any], proven: Any) -> None:
    from int8kit import files
    from int8kit.database import store

    if path.parent == files.shipped("tuning_db") and path.parent != Path("tuning_db").resolve():
        note(f"{path} came with the package: not stamped; copy it to ./tuning_db to keep stamps")
        return
    try:
        changed = store.stamp(path, stamps, proven)
    except FileError as error:  # the proof holds, whether or not it can be written down
        note(f"stamps not written: {error}")
    else:
        note(f"{'stamped' if changed else 'stamps are up to date in'} {path}")


def _mutate(gpu: str | None, only: list[str], examples: int | None, seed: int, as_json: bool, markdown: bool) -> None:
    from int8kit import gpus
    from int8kit.cli import tables
    from int8kit.verify.mutation import campaign

    mutants = campaign.find(only)
    card = gpus.get(gpu) if gpu else gpus.present() or gpus.get("rtx3090")
    verdicts: list[campaign.Verdict] = []

    def tell() -> None:
        score = campaign.score(verdicts)
        document = {"gpu": card.alias, **score, "mutants": [vars(v) for v in verdicts]}
        show(document, tables.mutation_table(verdicts, score, markdown), as_json)

    try:
        with progress("judging") as (bar, task):
            verdicts = campaign.run(
                mutants, card, examples=examples, seed=seed, on_verdict=verdicts.append,
                on_step=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
    except KeyboardInterrupt:
        note(f"{len(verdicts)} of {len(mutants)} faults judged before this was interrupted")
        if verdicts:
            tell()
        raise
    tell()
    survivors = [v.name for v in verdicts if v.ending == "survived"]
    if survivors:
        ran = campaign.score(verdicts)["ran"]
        raise CheckFailed(f"{len(survivors)} of {ran} faults survived: {', '.join(survivors)}")
