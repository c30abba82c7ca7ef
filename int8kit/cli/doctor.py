"""The verb `doctor`: what works on this machine, and a remedy for each thing that does not."""

from __future__ import annotations

from typing import Annotated

import typer

from int8kit.cli.terminal import Force, Json, Output, check_output, show
from int8kit.errors import CheckFailed


def doctor(
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="GPU whose database is examined. Default: the present one, else rtx3090."),
    ] = None,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Check this machine: GPU, driver, torch, Triton, packages, databases, disk and memory, with a remedy for each.

    Exit status 0 if every verb can work, 1 if a verb that needs a GPU cannot. The JSON document is for bug reports: it
    holds no host name, user name or folder.

    Example: int8kit doctor
    """
    from int8kit import doctor as examination
    from int8kit import gpus
    from int8kit.cli import tables

    if gpu is not None:
        gpus.get(gpu)
    check_output(output, force)
    findings = examination.examine(gpu)
    show(examination.document(findings), tables.doctor_table(findings), as_json, output)
    if failed := [finding.name for finding in findings if finding.status == "failed"]:
        raise CheckFailed(f"some verbs cannot work here: {', '.join(failed)}")
