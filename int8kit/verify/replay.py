"""A failed example, tried again: the shell command that a report prints, and the function that the command calls.

TRITON_INTERPRET=1 python -c 'from int8kit.verify import replay; replay.again("output", "{...}")'
"""

from __future__ import annotations

import json
import shlex

import torch

from int8kit import gpus
from int8kit.verify import executors, implementations
from int8kit.verify.examples.fixed import SMALL_TILES
from int8kit.verify.examples.strategies import from_json
from int8kit.verify.properties.registry import PROPERTIES
from int8kit.verify.runner import Result, forbid_fallback


def again(name: str, example: str, *, implementation: str = implementations.OURS, arch: str | None = None) -> None:
    """Try property `name` of `implementation` on one example. Raises AssertionError if it fails.

    example: as `strategies.to_json` writes it. arch: "sm86" for the code of that architecture on a newer GPU.
    """
    drawn = from_json(example)
    executor = next(e for e in executors.available(gpus.get("rtx3090")) if e.arch == arch)
    found = implementations.find(implementation, executor, (drawn.config, *SMALL_TILES))
    with forbid_fallback():
        why = PROPERTIES[name].check(found.to_supported_domain(drawn), found)
    if why:
        raise AssertionError(f"{drawn}: {why}")


def command(result: Result, implementation: str = implementations.OURS, arch: str | None = None) -> str:
    """The shell command that shows a failure again."""
    more = "" if implementation == implementations.OURS else f', implementation="{implementation}"'
    more += f', arch="{arch}"' if arch else ""
    name, example = json.dumps(result.name), json.dumps(result.example)  # valid in Python, and without single quotes
    call = f"from int8kit.verify import replay; replay.again({name}, {example}{more})"
    return f"{'' if torch.cuda.is_available() else 'TRITON_INTERPRET=1 '}python -c {shlex.quote(call)}"
