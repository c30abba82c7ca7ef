"""The verb `tune`: the shapes of a model -> a tuning database."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from int8kit.cli.options import Limit, Shape, Shapes, Sizes, need, parse_size
from int8kit.cli.terminal import RESULT_FORMAT, STDOUT, Force, Json, note, stages
from int8kit.errors import CheckFailed, InputError


def tune(
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu", metavar="GPU", help="The target GPU, such as rtx3090. Repeatable. Default: every present kind."
        ),
    ] = None,
    gpu_spec: Annotated[Path | None, typer.Option(help="A JSON file that describes another GPU.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a dask cluster that compiles and times, such as tcp://host:8786.")
    ] = None,
    shapes: Shapes = None,
    size: Sizes = None,
    shape: Shape = None,
    limit: Limit = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The database, or `-` for stdout. Default: your own, in the user data folder."
        ),
    ] = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Find the fastest tile configuration of each shape and write it into a tuning database.

    With the target GPU in this machine it measures. With a newer NVIDIA GPU it times the target's code on that one and
    marks the entries `proxy`. Without a GPU it compiles for the target, ranks with the cost model and marks the entries
    `modelled`. A weaker entry never replaces a stronger one.

    By default the entries go to your own database in the user data folder, which every verb reads on top of the shipped
    one. If tune is interrupted or killed, the same command continues from there.

    Example: int8kit tune --gpu rtx3090 --shape 16x4608x4600
    """
    from int8kit import files, gpus
    from int8kit.cli.layout import count
    from int8kit.database import store

    if gpu and gpu_spec:
        raise InputError(f"--gpu {', '.join(gpu)} and --gpu-spec {gpu_spec}: expected one of them")
    if scheduler is not None and not _is_address(scheduler):
        raise InputError(f"scheduler {scheduler!r}: expected the address of a dask scheduler, such as tcp://host:8786")
    named = [gpus.read_spec(gpu_spec)] if gpu_spec else list(dict.fromkeys(map(gpus.get, gpu or ())))
    wanted, where = _wanted(shapes, size, shape, limit)
    if output is not None and len(named) > 1:
        raise InputError(f"--output {output} and {len(named)} GPUs: each has another file; leave out --output")
    for one in named:  # a damaged or foreign database is refused before the work, not after it
        path = output or store.user_path(one.alias)
        if path != STDOUT:
            files.check_target(path, ours=store.is_ours, force=force)
            if path.exists() and store.is_ours(path):
                store.load(path, one.alias)
    need("tune", "torch", "triton", "distributed")
    if not named and scheduler is None and gpus.present() is None:
        raise InputError(f"no GPU here to tune for; name one with --gpu: {', '.join(sorted(gpus.GPUS))}")
    note(f"tuning {count(len(wanted), 'shape')}{where}")
    if output != STDOUT:
        _tune(named, wanted, scheduler, output, as_json, force)
        return
    with tempfile.TemporaryDirectory(prefix="int8kit-") as folder:
        path = Path(folder) / "database.json"
        try:
            _tune(named, wanted, scheduler, path, None, force)
        finally:
            if path.exists():
                print(path.read_text(encoding="utf-8"), end="")


def _is_address(text: str) -> bool:
    """True for the address of a dask scheduler, such as tcp://host:8786."""
    found = re.fullmatch(r"(?:tcp|tls|ucx|ws|wss)://[^/\s]+:(\d{1,5})", text, re.ASCII)
    return found is not None and 0 < int(found[1]) < 1 << 16


def _wanted(
    shapes: Path | None, size: list[str] | None, shape: list[str] | None, limit: int | None
) -> tuple[list[Any], str]:
    """The shapes to tune for, and a note on their file. Raises InputError for options that contradict each other."""
    from int8kit import shapes_file

    if shape and (shapes or size):
        other = f"--shapes {shapes}" if shapes else f"--size {', '.join(size or ())}"
        raise InputError(f"--shape {shape[0]} and {other}: expected one of them; --shape replaces the file")
    path = shapes or shapes_file.find()
    wanted = shapes_file.select(shape, path, limit, [parse_size(text) for text in size or ()], epilogues=True)
    return wanted, "" if shape else f" of {path}"


def _tune(
    named: list[Any], wanted: list[Any], scheduler: str | None, output: Path | None, as_json: bool | None, force: bool
) -> None:
    """Tune and print the result. as_json: None prints nothing."""
    from int8kit import gpus, interrupt
    from int8kit.cli.layout import count
    from int8kit.tune import session, workers

    here = [gpu] if scheduler is None and (gpu := gpus.present()) else []
    session.check_journals(session.targets_of(named or here, here, output))  # before the workers, which take seconds

    with workers.Workers(scheduler) as pool:
        with stages() as stage:
            step = stage("starting workers", 1)
            present = pool.gpus()
            step()
        listed = named or list(dict.fromkeys(present))
        if not listed:
            raise InputError(f"no worker of {scheduler} has a GPU to tune for; name one with --gpu")
        if output and len(listed) > 1:
            raise InputError(f"--output {output} and {len(listed)} GPUs: each has another file; leave out --output")
        targets = session.targets_of(listed, present, output)
        for target in targets:
            note(_how(target.source, target.gpu.alias))
        if any(target.timed_on for target in targets):
            session.check_health(pool, note)
        kept = "finished work is kept; run the same command again to continue from here"
        with interrupt.keeping(kept if as_json is not None else ""), stages() as stage:
            outcomes = session.tune(wanted, targets, pool, force=force, progress=stage, note=note)
    if as_json:
        document = {"format": RESULT_FORMAT, "targets": [_document(outcome) for outcome in outcomes]}
        print(json.dumps(document, indent=1, default=str))
    elif as_json is not None:
        print("\n\n".join(_table(outcome) for outcome in outcomes))
    if failed := [f"{shape}: {reason}" for outcome in outcomes for shape, reason in outcome.failed.items()]:
        raise CheckFailed(f"{count(len(failed), 'shape')} without an entry; the others are written; first {failed[0]}")


def _document(outcome: Any) -> dict[str, Any]:
    """The result for one GPU."""
    rows = [e.model_dump(mode="json", exclude_none=True) for e in outcome.entries]
    return {
        "database": str(outcome.target.path), "gpu": outcome.target.gpu.alias, "source": outcome.target.source,
        "rejected": outcome.rejected, "failed": {str(shape): why for shape, why in outcome.failed.items()},
        "kept": outcome.not_replaced, "resumed": outcome.resumed, "kernels": outcome.variant_counts, "entries": rows,
    }  # fmt: skip


def _table(outcome: Any) -> str:
    from int8kit.cli import layout, tables

    written = layout.count(len(outcome.entries) - outcome.not_replaced, "entry", "entries")
    lines = [tables.tuning_table(outcome.entries), "", f"wrote {written} to {outcome.target.path}"]
    if outcome.not_replaced:
        lines.append(
            f"kept {layout.count(outcome.not_replaced, 'stronger entry', 'stronger entries')}, measured or proxy"
        )
    before, after = outcome.variant_counts
    serve = "serves" if after == 1 else "serve"
    lines.append(f"{layout.count(after, 'kernel')} {serve} {layout.count(len(outcome.entries), 'entry', 'entries')}")
    if before > after:
        lines[-1] += f"; {before} before shapes within 1 % shared one"
    if outcome.rejected:
        rejected = ", ".join(f"{number} {kind}" for kind, number in sorted(outcome.rejected.items()))
        lines.append(layout.wrapped(f"rejected configurations by reason: {rejected}"))
    return "\n".join(lines)


def _how(source: str, alias: str) -> str:
    return {
        "measured": f"{alias} is present: measuring",
        "proxy": f"no {alias} here: timing its code on a newer GPU; entries are marked proxy",
        "modelled": f"no {alias} here: compiling for it and ranking with the cost model; entries are marked modelled",
    }[source]
