"""`int8kit db`: look into tuning databases, check them, put them together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit.cli.terminal import Force, Json, note, show
from int8kit.errors import CheckFailed, FileError, InputError

app = typer.Typer(
    rich_markup_mode=None, help="Tuning databases: what they hold, whether it holds, and why it is chosen."
)

Gpu = Annotated[str | None, typer.Option("--gpu", help="The card. Default: the one that is here, else rtx3090.")]
Db = Annotated[Path | None, typer.Option("--db", help="Default: the one that serves the card, your own on top.")]


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise InputError(
            "db: no command; expected show, check, merge, explain, carry, upgrade or schema; see `int8kit db --help`"
        )


def _gather(gpu: str | None, path: Path | None) -> tuple[Any, tuple[Path, ...], Any]:
    """The database that serves a card, its files, and what compiles here."""
    from int8kit import gpus
    from int8kit.database import store
    from int8kit.kernels import gemm

    toolchain = gemm.toolchain()
    if path is not None and gpu is None:
        return store.load(path), (path,), toolchain
    card = gpus.get(gpu) if gpu else gpus.present() or gpus.get("rtx3090")
    return *store.merged_view(card, toolchain, path), toolchain


@app.command("show")
def show_(gpu: Gpu = None, database: Db = None, as_json: Json = False) -> None:
    """Every entry that serves a card: tile, source, time, and whether it is proven with the present kernels.

    Example: int8kit db show --gpu rtx3090
    """
    from int8kit.cli import tables

    base, paths, toolchain = _gather(gpu, database)
    where = ", ".join(map(str, paths)) or "no file"
    table = f"{tables.database_table(base, toolchain)}\n\n{len(base.entries)} entries of {base.gpu.name}, from {where}"
    show({**json.loads(base.dumps()), "files": list(map(str, paths))}, table, as_json)


@app.command()
def check(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Database files. Default: the shipped and your own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Every problem of a database, a line each. Exit status 1 if there is one.

    Reports damage, entries that nothing proves under the installed Triton, entries of a kernel that has changed, times
    that contradict each other or the data sheet, copied stamps, and a header that disagrees with the GPU's record.

    Example: int8kit db check tuning_db/rtx3090.json
    """
    from int8kit.database import problems, store, upgrade
    from int8kit.kernels import gemm

    toolchain = gemm.toolchain()
    found: dict[str, list[str]] = {}
    for path in paths or store.known():
        try:
            old = store.read(path)["format"] == upgrade.OLD_FORMAT
            base = store.load(path)
        except FileError as error:
            found[str(path)] = [str(error)]
        else:
            found[str(path)] = problems.problems(base, toolchain)
            if old:
                found[str(path)].insert(0, f"format {upgrade.OLD_FORMAT}; run `int8kit db upgrade {path}`")
    lines = [f"{path}: {line}" for path, listed in found.items() for line in listed or ["sound"]]
    show({"databases": found}, "\n".join(lines) or "no database", as_json)
    if count := sum(map(len, found.values())):
        many = f"{count} problem{'s' if count > 1 else ''}"
        raise CheckFailed(f"{many} in {sum(map(bool, found.values()))} of {len(found)} databases")


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Database files of one card.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Made, or merged into.")] = None,
    user: Annotated[bool, typer.Option("--user", help="Into your own database, which lies over the shipped.")] = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Put databases of one card together: the stronger source stays, then the newer entry; stamps go with their tile.

    Example: int8kit db merge tuning_db/rtx3090.json -o out/merged.json
    """
    from int8kit import files
    from int8kit.database import store

    if (output is None) is not user:
        raise InputError("merge: name one target; legal are -o FILE and --user")
    bases = [store.load(path) for path in sources]  # all are read before anything is written
    card = bases[0].gpu
    for path, base in zip(sources, bases, strict=True):
        if base.gpu.alias != card.alias:
            raise FileError(
                f"{str(path)!r} is for the GPU {base.gpu.alias!r}, {str(sources[0])!r} for {card.alias!r}; "
                "merge files of one GPU"
            )
    target = output or store.user_path(card.alias)
    files.check_target(target, ours=store.is_ours, force=force)
    merged = store.update(target, card, [entry for base in bases for entry in base.entries], force=force)
    note(f"merged {', '.join(map(str, sources))}")
    show({"database": str(target), "entries": len(merged.entries)}, f"{target}: {len(merged.entries)} entries", as_json)


@app.command()
def explain(
    m: Annotated[int, typer.Argument(help="Rows of x.")],
    n: Annotated[int, typer.Argument(help="Rows of w.")],
    k: Annotated[int, typer.Argument(help="Columns of both.")],
    gpu: Gpu = None,
    database: Db = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 unless the very shape was tuned.")] = False,
    as_json: Json = False,
) -> None:
    """Which configuration serves a GEMM of M x N x K, found at which level, and why.

    Example: int8kit db explain 4296 12288 4608 --gpu rtx3090
    """
    from int8kit.cli import tables
    from int8kit.spec import GemmShape

    shape = GemmShape(m, n, k)
    base, paths, toolchain = _gather(gpu, database)
    levels = base.levels(shape, toolchain)
    choice, entry = next((choice, entry) for _, choice, entry in levels if choice is not None)
    document = {
        "gpu": base.gpu.alias, "files": list(map(str, paths)), "m": m, "n": n, "k": k, "level": choice.level,
        "config": vars(choice.config), "why": choice.provenance, "proven": choice.verified,
        "levels": {level: one and one.model_dump(mode="json", exclude_none=True) for level, _, one in levels},
    }  # fmt: skip
    proofs = (
        f"proven: {tables.proven_by(entry, toolchain, base.gpu.arch)}" if entry and choice.verified else "not proven"
    )
    title = f"{shape} on {base.gpu.name}: {choice.config}, {proofs} (Triton {toolchain.triton}, the present kernel)"
    show(document, f"{title}\n\n{tables.levels_table(levels)}", as_json)
    if strict and choice.level != "exact":
        raise CheckFailed(
            f"{shape} was not tuned for {base.gpu.alias}, {choice.level} serves; tune it with "
            f"`int8kit tune --gpu {base.gpu.alias} --shapes FILE`"
        )


@app.command()
def carry(
    path: Annotated[Path, typer.Argument(help="A database file.")],
    as_json: Json = False,
) -> None:
    """Entries of another generation of Triton, for the one that is here too, where it compiles them as well.

    A tile's time depends on what the compiler makes of it. Where a kernel spills no more here, and as many blocks of it
    fit a multiprocessor, its time is kept, with the Triton that was timed. The copy is not proven: verify it here.
    Copies of entries that have been tuned anew since are replaced.

    Example: int8kit db carry tuning_db/rtx3090.json
    """
    import triton

    from int8kit.database import store
    from int8kit.toolchain import generation
    from int8kit.tune import migrate, space, workers

    base = store.load(path)
    here = generation(triton.__version__)
    known = {entry.shape: entry for entry in base.entries if generation(entry.triton) == here}
    theirs = [e for e in base.entries if generation(e.triton) != here and migrate.supersedes(e, known.get(e.shape))]
    jobs = {entry.key: space.kernel_of(entry.config, entry.shape) for entry in theirs}
    with workers.Workers() as pool:
        found = pool.compile_all(base.gpu.arch, sorted(set(jobs.values())))
    carried = [(entry, migrate.migrated(entry, found[jobs[entry.key]], base.gpu)) for entry in theirs]
    new = [result for _, result in carried if not isinstance(result, str)]
    left = {str(entry.shape): result for entry, result in carried if isinstance(result, str)}
    if new:
        store.update(path, base.gpu, new)
    lines = [f"{shape}: {reason}" for shape, reason in left.items()]
    lines.append(f"{path}: {len(new)} entries carried to Triton {triton.__version__}, {len(left)} not")
    show({"database": str(path), "triton": triton.__version__, "carried": len(new), "left": left}, "\n".join(lines),
         as_json)  # fmt: skip


@app.command("upgrade")
def upgrade_(
    paths: Annotated[list[Path], typer.Argument(help="Database files of an earlier format.")],
    as_json: Json = False,
) -> None:
    """Rewrite databases of an earlier format in the present one.

    Stamps of format /1 are dropped: they covered a kernel's device code and not its launcher. All files are read before
    the first is written.

    Example: int8kit db upgrade tuning_db/rtx3090.json
    """
    from int8kit import files
    from int8kit.database import store, upgrade

    found = []
    for path in paths:
        document = store.read(path)
        found.append((path, store.load(path), document))
    rows = []
    for path, base, document in found:
        old = document["format"] == upgrade.OLD_FORMAT
        dropped = upgrade.dropped_stamps(document) if old else 0
        if old:
            with store.lock_of(path):
                files.write_text(path, base.dumps())
        rows.append({"database": str(path), "from": document["format"], "entries": len(base.entries),
                     "stamps_dropped": dropped})  # fmt: skip
    lines = []
    for row in rows:
        if row["from"] == upgrade.OLD_FORMAT:
            lines.append(
                f"{row['database']}: {row['entries']} entries upgraded, {row['stamps_dropped']} stamps dropped"
            )
        else:
            lines.append(f"{row['database']}: has the present format already")
    show({"databases": rows}, "\n".join(lines), as_json)


@app.command()
def schema() -> None:
    """The JSON Schema of a database file.

    Example: int8kit db schema
    """
    from int8kit.database.schema import json_schema

    print(json.dumps(json_schema(), indent=1))
