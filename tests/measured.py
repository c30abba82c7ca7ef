"""Times of an exhaustive run, for tests: every legal configuration of a few shapes on a GPU."""

import json
from pathlib import Path

from int8kit.database.schema import Resources
from int8kit.spec import GemmShape, config_from

TIMES = Path(__file__).parent / "data" / "times"


def exhaustive(name):
    """{shape: {configuration: (microseconds, Resources)}}."""
    document = json.loads((TIMES / name).read_text())
    fields = document["config_fields"]
    return {
        GemmShape(row["m"], row["n"], row["k"]): {
            config_from(dict(zip(fields, values, strict=True))): (
                us, Resources(registers=registers, spill_bytes=0, shared_bytes=shared)
            )
            for values, _, us, registers, shared in row["times"]
        }
        for row in document["shapes"]
    }  # fmt: skip
