"""The verb `warmup`: the kernels of a model, compiled ahead of time."""

from __future__ import annotations

from typing import Annotated

import typer

from int8kit.cli.options import Db, interpret_without_gpu
from int8kit.cli.terminal import Force, Json, Output, check_output, quiet_libraries, show, stages


def warmup(
    model: Annotated[
        str, typer.Argument(help="ideogram4, tiny, or a local folder in diffusers' layout.")
    ] = "ideogram4",
    gpu: Annotated[str | None, typer.Option(help="GPU whose database is used. Default: the present one.")] = None,
    database: Db = None,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Compile every kernel that `run` can launch for a model, so that its first step waits for none.

    The kernels stay in Triton's cache on the disk. No weights are read. Needs a CUDA device, except for tiny.

    Example: int8kit warmup tiny
    """
    from int8kit import gpus
    from int8kit.database import store

    alias = gpus.get(gpu).alias if gpu is not None else None
    if database is not None:
        store.load(database, alias)
    check_output(output, force)
    interpret_without_gpu()
    quiet_libraries()
    from int8kit.cli.layout import fit
    from int8kit.runtime import warmup as work

    with stages() as stage:
        report = work.warm_up(model, gpu, database, stage)
    rows = [(kernel.name, f"{kernel.seconds:.2f}") for kernel in report.kernels]
    document = {
        "model": report.model,
        "device": report.device,
        "databases": [path.name for path in report.databases],
        "seconds": round(report.seconds, 3),
        "kernels": [{"name": kernel.name, "seconds": round(kernel.seconds, 3)} for kernel in report.kernels],
    }
    table = fit([*rows, ("in all", f"{report.seconds:.2f}")], ("kernel", "seconds"), left="kernel")
    show(document, table, as_json, output)
