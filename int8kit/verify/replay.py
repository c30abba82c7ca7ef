"""A failure, shown again: the shell command that a report prints, and the function that the command calls.

    TRITON_INTERPRET=1 python -c 'from int8kit.verify import replay; replay.again("output", "{...}")'
    int8kit verify --gpu rtx3090 --only "row scale"            of a property that has no examples

The command exits with status 1 and prints the difference as long as the failure lasts.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from int8kit import gpus
from int8kit.errors import InputError
from int8kit.kernels import gemm
from int8kit.verify import executors, implementations
from int8kit.verify.examples.encoding import from_json
from int8kit.verify.examples.fixed import SMALL_TILES
from int8kit.verify.examples.strategies import Draw
from int8kit.verify.executors import Executor
from int8kit.verify.properties.registry import PROPERTIES
from int8kit.verify.runner import Result, forbid_fallback


def again(name: str, example: str, *, implementation: str = implementations.OURS, arch: str | None = None) -> None:
    """Try property `name` of `implementation` on one example. Raises AssertionError if it fails.

    example: as `encoding.to_json` writes it. arch: "sm86" for the code of that architecture on a newer GPU.
    """
    one = from_json(example)
    tiles = (one.config, *SMALL_TILES) if isinstance(one, Draw) else SMALL_TILES
    found = implementations.find(implementation, _executor(arch), tiles)
    if isinstance(one, Draw):
        one = found.to_supported_domain(one)
    with forbid_fallback():
        why = PROPERTIES[name].check(one, found)
    if why:
        raise AssertionError(f"{one}: {why}")


def _executor(arch: str | None) -> Executor:
    """The executor of this machine that runs `arch`'s code, or its own code. Raises InputError if it has none."""
    targets = [gpu for gpu in gpus.GPUS.values() if arch in (None, f"sm{gpu.arch}")]
    for target in targets:
        for executor in executors.available(target):
            if executor.arch == arch:
                return executor
    raise InputError(f"{arch} code does not run here: expected the machine that printed the command")


def command(
    result: Result,
    implementation: str = implementations.OURS,
    arch: str | None = None,
    *,
    gpu: str = "rtx3090",
    database: Path | None = None,
) -> str:
    """The shell command that shows a failure again.

    gpu, database: what `int8kit verify` was given. The command needs them for a property without examples.
    """
    if result.example is None:
        file = f" --db {shlex.quote(str(database))}" if database else ""
        return f'int8kit verify --gpu {gpu}{file} --only "{result.name}"'
    more = "" if implementation == implementations.OURS else f', implementation="{implementation}"'
    more += f', arch="{arch}"' if arch else ""
    name, example = json.dumps(result.name), json.dumps(result.example)  # valid in Python, and without single quotes
    call = f"from int8kit.verify import replay; replay.again({name}, {example}{more})"
    return f"{'TRITON_INTERPRET=1 ' if gemm.interpreted() else ''}python -c {shlex.quote(call)}"
