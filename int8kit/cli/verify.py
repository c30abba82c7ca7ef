"""The verbs `verify`, `verify mutate` and `verify libraries`: the kernels, the verifier itself, and other libraries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int8kit.cli import verify_mutate
from int8kit.cli.help import Group
from int8kit.cli.layout import count
from int8kit.cli.options import Db, interpret_without_gpu, named_gpu
from int8kit.cli.terminal import Force, Json, Output, check_output, note, progress, show
from int8kit.errors import CheckFailed, FileError, InputError, UnknownName
from int8kit.spec import TileConfig, legal_configs

if TYPE_CHECKING:
    from int8kit.database.database import Database
    from int8kit.gpus import Gpu
    from int8kit.verify.executors import Executor
    from int8kit.verify.runner import Result

app = typer.Typer(cls=Group, rich_markup_mode=None)

GpuOption = Annotated[
    str | None, typer.Option("--gpu", help="GPU whose code is verified. Default: the present GPU, else rtx3090.")
]
Seed = Annotated[int, typer.Option(help="Random seed of the generated examples.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
Old = typer.Option(hidden=True)


@app.callback(invoke_without_command=True)
def verify(
    context: typer.Context,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU whose kernels are verified. Default: that of --db, else the present GPU, else rtx3090."),
    ] = None,
    database: Db = None,
    shapes: Annotated[
        Path | None,
        typer.Option(help="Shapes that are verified beside the database's. Default: as for `tune`."),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(help="Generated examples of each property. Default: 150; 60 on a GPU, which compiles each."),
    ] = None,
    seed: Seed = 0,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Ten times the examples, over every configuration: takes minutes.")
    ] = False,
    stamp: Annotated[
        bool, typer.Option(help="Write stamps of the entries that passed into --db, or else into your own database.")
    ] = True,
    only: Annotated[
        list[str] | None, typer.Option(help="Verify this property alone, such as output or entries; repeatable.")
    ] = None,
    markdown: Markdown = False,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
    mutate_: Annotated[bool, typer.Option("--mutate", hidden=True)] = False,
    subject: Annotated[list[str] | None, Old] = None,
    model: Annotated[str | None, Old] = None,
    inputs: Annotated[Path | None, Old] = None,
) -> None:
    """Prove the kernels bit-exact against torch._int_mm, 64-bit integers and the reference.

    Kernels run on the GPU, or at reduced sizes in Triton's interpreter on a CPU. If anything differs, the exit status
    is 1, and the smallest example is printed with a command that repeats it. With --only, one property takes seconds.

    Two commands verify something else: `verify mutate` seeds faults that the properties must catch, and `verify
    libraries` checks the same properties of other INT8 GEMMs.

    Example: int8kit verify --gpu rtx3090
    """
    _refuse_old_spellings(mutate_, subject, model, inputs)
    if context.invoked_subcommand is not None:
        for name in context.params:
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
                option = {"database": "--db", "as_json": "--json"}.get(name, f"--{name}")
                raise InputError(f"{option} before {context.invoked_subcommand}: put options after the command")
        return
    _check_examples(examples)
    check_output(output, force)
    named = named_gpu(gpu)
    if database is not None:
        from int8kit.database import store

        named = store.load(database, gpu).gpu
    _refuse_faults(only or [])
    if shapes is not None:
        from int8kit import shapes_file

        shapes_file.read(shapes)
    interpret_without_gpu()
    _verify(named, database, shapes, only or [], examples, seed, exhaustive, stamp, as_json, markdown, output)


def _refuse_old_spellings(mutate: bool, subject: list[str] | None, model: str | None, inputs: Path | None) -> None:
    """Raise InputError with the present command for an option of earlier versions."""
    if mutate:
        raise InputError("--mutate is a command now: `int8kit verify mutate`")
    if subject:
        raise InputError(f"--subject is a command now: `int8kit verify libraries {' '.join(subject)}`")
    if model or inputs:
        given = f" --inputs {inputs}" if inputs else ""
        raise InputError(
            f"--{'model' if model else 'inputs'} is a verb now: `int8kit compare {model or 'MODEL'}{given}`"
        )


def _check_examples(examples: int | None) -> None:
    if examples is not None and examples < 1:
        raise InputError(f"--examples {examples}: expected 1 or more")


def _refuse_faults(only: list[str]) -> None:
    """Raise InputError for the name of a fault, before torch is imported."""
    from int8kit.verify.mutation.catalogue import CATALOGUE

    for name in only:
        if name in {mutant.name for mutant in CATALOGUE}:
            raise InputError(f"--only {name}: it is a fault, not a property; see `int8kit verify mutate --only {name}`")


def _verify(
    named: Gpu | None, database: Path | None, shapes: Path | None, only: list[str], examples: int | None, seed: int,
    exhaustive: bool, stamp: bool, as_json: bool, markdown: bool,
    output: Path | None,
) -> None:  # fmt: skip
    from int8kit import shapes_file
    from int8kit.cli import tables
    from int8kit.database import store
    from int8kit.kernels import gemm
    from int8kit.verify import executors, property_runs, verify_kernels
    from int8kit.verify.properties import entries as entry_property
    from int8kit.verify.properties.budget import budget

    gpu = named or store.served_gpu(None, database)
    toolchain = gemm.toolchain()
    base, paths = store.merged_view(gpu, toolchain, database)
    wanted = shapes_file.int8_shapes(shapes_file.read(shapes or shapes_file.find()))
    unlisted = tuple(base.choices_without_entry(wanted, toolchain))
    found = executors.available(gpu)
    runs = [
        property_runs.PropertyRun(name, executor)
        for executor in found
        for name in verify_kernels.names(executor, base, unlisted, exhaustive=exhaustive or bool(only))
    ]
    if only:
        known = {run.name for run in runs}
        for name in only:
            if name not in known:
                raise UnknownName("property", name, known)
        runs = [run for run in runs if run.name in only]
    files_used = ", ".join(map(str, paths)) or "no database, so the defaults"
    entries = count(len(base.entries), "entry", "entries")
    others = f", and the choices for {count(len(unlisted), 'shape')} without an entry" if unlisted else ""
    for executor in found:
        reduced = ", at reduced M, N and K" if executor.on == "interpreter" else ""
        note(f"executing on {executor}{reduced}; {entries}{others}; {files_used}")
    more: tuple[TileConfig, ...] = ()
    if exhaustive:
        examples = 10 * budget(found[-1], examples).examples
        more = legal_configs(gpu.arch, gpu.shared_memory)
        note(f"{examples} examples of each property, over {sum(map(found[0].runs, more))} configurations")
    stamps: dict[Any, list[Any]] = {}
    with progress("verifying") as (bar, task):
        findings = property_runs.run_all(
            property_runs.divided(runs),
            property_runs.VerifyKernels(base, examples, seed, more, unlisted),
            processes=property_runs.process_count(found[-1]),
            on_example=lambda: bar.advance(task),
        )
    for _, passed in findings:
        for key, new in passed.items():
            stamps.setdefault(key, []).extend(new)
    results = [result for result, _ in findings]
    failures = [r for r in results if r.failure]
    lines = [tables.verify_table(results, markdown), *_failure_lines(failures, found, gpu.alias, database)]
    show(
        {"gpu": gpu.alias, "databases": paths, "results": [vars(r) for r in results]}, "\n".join(lines), as_json, output
    )
    if failures:
        verb = "differs" if len(failures) == 1 else "differ"
        raise CheckFailed(f"{len(failures)} of {len(results)} properties {verb}: {', '.join(r.name for r in failures)}")
    if stamp and stamps:
        _stamp(base, stamps, database)
    elif stamp and base.entries and entry_property.NAME in {run.name for run in runs}:
        note(f"stamped no entry: no executor here runs the kernels of {entries}; a GPU does")


def _failure_lines(failures: list[Result], found: list[Executor], gpu: str, database: Path | None) -> list[str]:
    """Each failure with its smallest example, and the command that repeats it. The examples are stored, too."""
    from int8kit.verify import replay

    lines = []
    archs = {str(executor): executor.arch for executor in found}
    for r in failures:
        lines.append(f"\n{r.name} differs on {r.on}, smallest example:\n  {r.failure}")
        lines.append(f"to repeat it:\n  {replay.command(r, arch=archs[r.on], gpu=gpu, database=database)}")
        if r.example:
            _store_example(r.name, r.example)
    return lines


def _store_example(name: str, example: str, implementation: str = "int8kit") -> None:
    """Store a failed example, which later runs try first."""
    from int8kit.verify.examples import regressions

    try:
        regressions.add(name, example, implementation)
    except (FileError, OSError) as error:  # the failure is reported all the same
        note(f"example not stored: {error}")


def _stamp(base: Database, stamps: dict[Any, Any], given: Path | None) -> None:
    """Write stamps into the file that was given, or into the user's own database, on top of the shipped one."""
    from int8kit.database import store

    before = {entry.key: entry.verified for entry in base.entries}
    proven = [entry for entry in base.stamped(stamps).entries if entry.verified != before[entry.key]]
    path = given or store.user_path(base.gpu.alias)
    try:
        if given is not None:
            store.stamp(path, stamps, base)
        elif proven:
            store.update(path, base.gpu, proven)
    except FileError as error:  # the proof is valid all the same
        note(f"stamps not written: {error}")
    else:
        entries = count(len(proven), "entry", "entries")
        note(f"stamped {entries} in {path}" if proven else "the stamps of all entries are up to date")


app.command(name="mutate", short_help="Seed faults that the properties must catch.")(verify_mutate.mutate)


@app.command(short_help="Check the properties of other INT8 GEMMs.")
def libraries(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="torch._int_mm, vllm, comfy-kitchen, torchao, sdnq, bitsandbytes, or your function, module:function.",
            show_default=False,
        ),
    ] = None,
    gpu: GpuOption = None,
    examples: Annotated[int | None, typer.Option(help="Generated examples of each property. Default: 40.")] = None,
    seed: Seed = 0,
    markdown: Markdown = False,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Check the properties of other INT8 GEMMs beside int8kit's, in one table.

    Your own function takes (xq, wq) and returns int32 accumulators, or takes (xq, wq, sx, sw, bias, out_dtype) and
    returns the output. The exit status is 1 if a property does not hold.

    Example: int8kit verify libraries torch._int_mm --examples 5
    """
    from int8kit import gpus, peers

    _check_examples(examples)
    if not names:
        raise InputError(f"no library; name one or more of {', '.join(peers.PEERS)}, or your function, module:function")
    peers.check_names(names)
    check_output(output, force)
    named = named_gpu(gpu)
    interpret_without_gpu()
    import sys

    from int8kit.cli import tables
    from int8kit.database.database import Database
    from int8kit.verify import compare_implementations, executors, replay

    sys.path.insert(0, os.getcwd())  # as `python -m` does: a user's module is there
    target = named or gpus.resolve(None)
    executor = executors.available(target)[-1]
    configs = compare_implementations.tiles(executor, Database(target))
    with progress("verifying") as (bar, task):
        columns = compare_implementations.run(
            names, executor, configs, examples=examples, random_seed=seed, on_example=lambda: bar.advance(task)
        )
    lines = [tables.implementations_table(columns, markdown)]
    broken = [(column.implementation, r) for column in columns for r in column.results if r.failure]
    for name, r in broken:
        lines.append(f"\n{name} breaks {r.name!r}, smallest example:\n  {r.failure}")
        if r.example:
            lines.append(f"to repeat it:\n  {replay.command(r, name)}")
            _store_example(r.name, r.example, name)
    document = {
        "on": str(executor),
        "implementations": {c.implementation: [vars(r) for r in c.results] for c in columns},
    }
    show(document, "\n".join(lines), as_json, output)
    if broken:
        count = "1 property does" if len(broken) == 1 else f"{len(broken)} properties do"
        raise CheckFailed(f"{count} not hold: {', '.join(f'{name} ({r.name})' for name, r in broken)}")
