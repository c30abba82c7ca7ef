"""One example that failed, again: what a report prints as a command, and what that command calls.

TRITON_INTERPRET=1 python -c 'from int8kit.verify import replay; replay.again("output", "{...}")'
"""

from __future__ import annotations

import json
import shlex

import torch

from int8kit import gpus
from int8kit.verify import executors, implementations
from int8kit.verify.examples.strategies import from_json
from int8kit.verify.properties import checks, general
from int8kit.verify.runner import Result, strict


def again(name: str, example: str, *, subject: str = "int8kit", arch: str | None = None) -> None:
    """Try property `name` of `subject` on one example. Raises AssertionError with the difference, if there is one.

    example: as `strategies.to_json` writes it. arch: "sm86" for that card's code on a newer one.
    """
    drawn = from_json(example)
    executor = next(e for e in executors.available(gpus.get("rtx3090")) if e.arch == arch)
    with strict():
        if subject == "int8kit" and name in checks.CHECKS:
            why = checks.CHECKS[name](drawn, executor)
        else:
            judged = implementations.find(subject, executor, (drawn.config, *checks.SMALL_TILES))
            why = general.ALL[name](judged.fit(drawn), judged)
    if why:
        raise AssertionError(f"{drawn}: {why}")


def command(result: Result, subject: str = "int8kit", arch: str | None = None) -> str:
    """A line for a shell that shows a failure again."""
    more = "" if subject == "int8kit" else f', subject="{subject}"'
    more += f', arch="{arch}"' if arch else ""
    name, example = json.dumps(result.name), json.dumps(result.example)  # literals of Python too, and no single quotes
    call = f"from int8kit.verify import replay; replay.again({name}, {example}{more})"
    return f"{'' if torch.cuda.is_available() else 'TRITON_INTERPRET=1 '}python -c {shlex.quote(call)}"
