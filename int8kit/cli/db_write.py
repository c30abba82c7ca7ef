"""The commands of `db` that write database files: merge, migrate and upgrade."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from int8kit.cli.options import need
from int8kit.cli.terminal import STDOUT, Force, Json, note, progress, show
from int8kit.errors import FileError, InputError


def merge(
    sources: Annotated[list[Path], typer.Argument(help="Database files of one GPU.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to create or to merge into; `-`: stdout.")
    ] = None,
    user: Annotated[
        bool, typer.Option("--user", help="Merge into your own database, which is read on top of the shipped one.")
    ] = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Merge databases of one GPU: the stronger source stays, then the newer entry. Stamps stay with their tile.

    Example: int8kit db merge out/rtx3090.json -o out/merged.json
    """
    from int8kit import files
    from int8kit.cli.layout import count
    from int8kit.database import store
    from int8kit.database.database import Database

    if output is None and not user:
        raise InputError("merge: no target; expected -o FILE or --user")
    if output is not None and user:
        raise InputError(f"merge: two targets, --output {output} and --user; expected one of them")
    bases = [store.load(path) for path in sources]  # all are read before anything is written
    gpu = bases[0].gpu
    for path, base in zip(sources, bases, strict=True):
        if base.gpu.alias != gpu.alias:
            raise FileError(
                f"{str(path)!r} is for the GPU {base.gpu.alias!r}, {str(sources[0])!r} for {gpu.alias!r}; "
                "merge files of one GPU"
            )
    entries = [entry for base in bases for entry in base.entries]
    if output == STDOUT:
        print(Database(gpu).merged(entries).dumps(), end="")
        return
    target = output or store.user_path(gpu.alias)
    files.check_target(target, ours=store.is_ours, force=force)
    merged = store.update(target, gpu, entries, force=force)
    note(f"merged {', '.join(map(str, sources))}")
    number = len(merged.entries)
    show({"database": str(target), "entries": number}, f"{target}: {count(number, 'entry', 'entries')}", as_json)


def migrate(
    path: Annotated[Path, typer.Argument(help="A database file.")],
    as_json: Json = False,
) -> None:
    """Copy entries of another Triton generation to the installed one, where its kernels use no more resources.

    A tile's time depends on the compiler's code. The time is kept, with the Triton that was timed, if the kernel spills
    no more here and as many blocks of it fit a multiprocessor. The copy is not proven: verify it. Copies of entries
    that have been tuned again are replaced.

    Example: int8kit db migrate out/rtx3090.json
    """
    from int8kit import files
    from int8kit.cli.layout import count
    from int8kit.database import store

    base = store.load(path)
    files.check_target(path, ours=store.is_ours, force=False)
    need("db migrate", "torch", "triton", "distributed")
    import triton

    from int8kit.tune import migrate as migration

    with progress("compiling kernels"):
        new, left = migration.migrate(base)
    if new:
        store.update(path, base.gpu, new)
    reasons = {str(shape): reason for shape, reason in left.items()}
    lines = [f"{shape}: {reason}" for shape, reason in reasons.items()]
    number = count(len(new), "entry", "entries")
    lines.append(f"{path}: {number} migrated to Triton {triton.__version__}, {len(left)} not")
    document = {"database": str(path), "triton": triton.__version__, "migrated": len(new), "left": reasons}
    show(document, "\n".join(lines), as_json)


def upgrade(
    paths: Annotated[list[Path], typer.Argument(help="Database files of an earlier format.")],
    as_json: Json = False,
) -> None:
    """Rewrite databases of an earlier format in the present one.

    Stamps of format /1 are dropped: they covered a kernel's device code and not its launcher. All files are read before
    the first is written.

    Example: int8kit db upgrade out/rtx3090.json
    """
    from int8kit import files
    from int8kit.cli.layout import count
    from int8kit.database import store
    from int8kit.database import upgrade as upgrades

    found = []
    for path in dict.fromkeys(paths):
        document = store.read(path)
        found.append((path, store.load(path), document))
        files.check_target(path, ours=store.is_ours, force=False)
    rows, lines = [], []
    for path, base, document in found:
        old = document["format"] == upgrades.OLD_FORMAT
        dropped = upgrades.dropped_stamps(document) if old else 0
        if old:
            with store.lock_of(path):
                files.write_text(path, base.dumps())
        rows.append({"database": str(path), "from": document["format"], "entries": len(base.entries),
                     "stamps_dropped": dropped})  # fmt: skip
        upgraded = f"{count(len(base.entries), 'entry', 'entries')} upgraded, {count(dropped, 'stamp')} dropped"
        lines.append(f"{path}: {upgraded if old else 'has the present format already'}")
    show({"databases": rows}, "\n".join(lines), as_json)
