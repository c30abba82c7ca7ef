"""The verb `db`: inspect, check and explain tuning databases. `db_write` has the commands that change files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit.cli import db_write
from int8kit.cli.help import Group
from int8kit.cli.options import Db, noted_toolchain, serving
from int8kit.cli.terminal import STDOUT, Force, Json, Output, check_output, show
from int8kit.errors import CheckFailed, FileError, InputError, UnknownName

app = typer.Typer(cls=Group, rich_markup_mode=None, help="Inspect, check, merge and explain tuning databases.")
Gpu = Annotated[str | None, typer.Option("--gpu", help="The GPU. Default: the present one, else rtx3090.")]


@app.callback(invoke_without_command=True)
def _db(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise InputError(
            "db: no command; expected show, check, merge, explain, migrate, upgrade or schema; see `int8kit db --help`"
        )


@app.command("show")
def show_(
    gpu: Gpu = None,
    database: Db = None,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="MxNxK", help="Only entries of this shape. Repeatable."),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only entries of this kernel: triton, mma_sync or wgmma. Repeatable."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only entries of this source: measured, proxy or modelled. Repeatable."),
    ] = None,
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Only entries that nothing proves under the installed Triton.")
    ] = False,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """List the entries that serve a GPU: tile, source, time, and whether the present kernels are proven.

    Example: int8kit db show --gpu rtx3090 --kernel mma_sync
    """
    from int8kit import shapes_file
    from int8kit.cli import layout, tables
    from int8kit.spec import Kernel, Source

    wanted = {shapes_file.parse_shape(text) for text in shape or ()}
    kernels = _named("kernel", kernel, [k.value for k in Kernel])
    sources = _named("source", source, [s.value for s in Source])
    check_output(output, force)
    base, paths, toolchain = serving(gpu, database)
    tests: list[tuple[bool, Callable[[Any], bool]]] = [
        (bool(wanted), lambda e: e.shape in wanted),
        (bool(kernels), lambda e: e.config.kernel.value in kernels),
        (bool(sources), lambda e: e.source.value in sources),
        (unproven, lambda e: not e.proofs(toolchain, base.gpu.arch)),
    ]
    entries = tuple(e for e in base.entries if all(test(e) for given, test in tests if given))
    shown = replace(base, entries=entries)
    number = layout.count(len(entries), "entry", "entries")
    if any(given for given, _ in tests):
        number += f" of {len(base.entries)}"
    table = f"{tables.database_table(shown, toolchain)}\n\n" if entries else ""
    document = {**json.loads(shown.dumps()), "files": list(map(str, paths))}
    document.pop("format")  # the file's own; this is a view of several files
    where = f"{number} for {base.gpu.name}, from {', '.join(map(str, paths))}"
    if not paths:
        where = f"no database for {base.gpu.alias}; make one with `int8kit tune --gpu {base.gpu.alias}`"
    show(document, f"{table}{where}", as_json, output)


def _named(kind: str, given: list[str] | None, known: list[str]) -> set[str]:
    """The given names in small letters. Raises UnknownName."""
    names = {name.lower().replace("-", "_") for name in given or ()}
    for name in sorted(names - set(known)):
        raise UnknownName(kind, name, known)
    return names


@app.command()
def check(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Database files. Default: the shipped ones and your own.")
    ] = None,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Report every problem of a database, one line each. Exit status 1 if there is one; 2 if there is no such file.

    It reports damage, entries without a proof under the installed Triton, and entries of a changed kernel. It also
    reports times that contradict each other or the data sheet, copied stamps, and headers with another GPU's figures.

    Example: int8kit db check out/rtx3090.json
    """
    from int8kit.cli.layout import count
    from int8kit.database import problems, store, upgrade

    check_output(output, force)
    found: dict[str, list[str]] = {}
    loaded = []
    for path in dict.fromkeys(paths or store.known()):
        try:
            old = store.read(path)["format"] == upgrade.OLD_FORMAT
            loaded.append((path, old, store.load(path)))
            found[str(path)] = []
        except FileError as error:
            if not path.is_file():  # a mistake of the call; a damaged file is a problem
                raise
            found[str(path)] = [str(error)]
    toolchain: Any = noted_toolchain() if loaded else None
    for path, old, base in loaded:
        if old:
            found[str(path)].append(f"format {upgrade.OLD_FORMAT}; run `int8kit db upgrade {path}`")
        found[str(path)] += problems.problems(base, toolchain, path)
    lines = [f"{path}: {line}" for path, listed in found.items() for line in listed or ["no problem"]]
    show({"databases": found}, "\n".join(lines) or "no database", as_json, output)
    if number := sum(map(len, found.values())):
        bad = sum(map(bool, found.values()))
        raise CheckFailed(f"{count(number, 'problem')} in {bad} of {count(len(found), 'database')}")


@app.command()
def explain(
    m: Annotated[str, typer.Argument(help="Rows of x.")],
    n: Annotated[str, typer.Argument(help="Rows of w.")],
    k: Annotated[str, typer.Argument(help="Columns of x and of w.")],
    gpu: Gpu = None,
    database: Db = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 unless this exact shape was tuned.")] = False,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Explain which configuration serves a GEMM of M x N x K, at which level of the lookup, and why.

    Example: int8kit db explain 4296 12288 4608 --gpu rtx3090
    """
    from int8kit.cli import layout, tables
    from int8kit.spec import GemmShape

    shape = GemmShape(*(_extent(name, text) for name, text in (("M", m), ("N", n), ("K", k))))
    check_output(output, force)
    base, paths, toolchain = serving(gpu, database)
    levels = base.levels(shape, toolchain)
    choice, entry = next((choice, entry) for _, choice, entry in levels if choice is not None)
    document = {
        "gpu": base.gpu.alias, "files": list(map(str, paths)), "m": shape.m, "n": shape.n, "k": shape.k,
        "level": choice.level, "config": vars(choice.config), "why": choice.provenance, "proven": choice.is_verified,
        "levels": {level: one and one.model_dump(mode="json", exclude_none=True) for level, _, one in levels},
    }  # fmt: skip
    proofs = "not proven"
    if entry and choice.is_verified:
        proofs = f"proven: {tables.proven_by(entry, toolchain, base.gpu.arch)}"
    title = (
        f"{shape} on {base.gpu.name}: {choice.config}\n{proofs} (Triton {toolchain.triton or 'any'}, present kernel)"
    )
    show(document, f"{layout.wrapped(title)}\n\n{tables.levels_table(levels)}", as_json, output)
    if strict and choice.level != "exact":
        raise CheckFailed(
            f"{shape} was not tuned for {base.gpu.alias}, {choice.level} serves; tune it with "
            f"`int8kit tune --gpu {base.gpu.alias} --shape {shape}`"
        )


def _extent(name: str, text: str) -> int:
    """The number that an argument gives. Python's own conversion accepts 1_000, and digits of every script."""
    if not re.fullmatch(r"[0-9]{1,99}", text):
        raise InputError(f"{name} {text!r}: expected a whole number, such as 4608")
    return int(text)


app.command()(db_write.merge)
app.command()(db_write.migrate)
app.command()(db_write.upgrade)


@app.command()
def schema(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file, or `-` for stdout.", show_default=True)
    ] = STDOUT,
    as_json: Annotated[bool, typer.Option("--json", hidden=True)] = True,
    force: Force = False,
) -> None:
    """Print the JSON Schema of a database file.

    Example: int8kit db schema --output out/tuning_db.schema.json
    """
    from int8kit import files
    from int8kit.database.schema import json_schema

    text = json.dumps(json_schema(), indent=1) + "\n"
    if output == STDOUT:
        print(text, end="")
        return
    files.check_target(output, ours=lambda path: '"$schema"' in path.read_text(encoding="utf-8")[:99], force=force)
    files.write_text(output, text)
    print(f"wrote {output}")
