"""What a child process of `mutate` runs: the checks, on the copy of the package that its PYTHONPATH names.

    python -m int8kit.verify.mutation.child '{"executor": {...}, "properties": ["output", ...], "tiles": [{...}], ...}'

    {"package": "/tmp/.../int8kit"}                first, before a kernel is imported: which copy is judged
    {"example": "1x1x33, ..."}                     before each example, so that silence is a hang, and whose is known
    {"property": "output", "examples": 7, "failure": "1x1x33, ...: 1 of 1 differ", "raised": null}
                                                   after each property; the first that fails is the last

One line of JSON each, on a pipe that nothing else writes to. Pickled objects were rejected: they tie both sides to the
same classes, and one side is a broken copy.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import int8kit
from int8kit.spec import GemmShape, config_from, default_config


def main() -> None:
    """Run the request in argv[1] up to the first property that fails."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a kernel or a compiler prints is no message

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out)

    say(package=str(Path(int8kit.__file__).parent))
    from int8kit.verify.executors import Executor
    from int8kit.verify.properties import checks

    request = json.loads(sys.argv[1])
    executor = Executor(**request["executor"])
    tiles = [config_from(row) for row in request["tiles"]] or [
        *checks.SMALL_TILES,
        default_config(GemmShape(1024, 1, 1)),
    ]
    for name in request["properties"]:
        result = checks.prove(
            name, executor, tiles, examples=request["examples"], random_seed=request["seed"],
            on_example=lambda example: say(example=str(example)),
        )  # fmt: skip
        say(property=name, examples=result.examples, failure=result.failure, raised=result.raised)
        if result.failure:
            return


if __name__ == "__main__":
    main()
