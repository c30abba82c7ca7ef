"""Times of an exhaustive run, for tests: every legal configuration of a few shapes on a card."""

import json
import re
from pathlib import Path

from int8kit.schema import Resources
from int8kit.spec import GemmShape, Kernel, TileConfig

RESULTS = Path(__file__).parent.parent / "docs" / "results"
_CONFIG = re.compile(r"(?:(\w+) )?(\d+)x(\d+)x(\d+) w(\d+) s(\d+) g(\d+)(?: k(\d+))?")


KERNELS = {None: Kernel.TRITON, "ampere": Kernel.MMA_SYNC, "hopper": Kernel.WGMMA}  # as these files name them


def config_of(text):
    """The inverse of str(TileConfig)."""
    kernel, *numbers, stream_k = _CONFIG.fullmatch(text).groups()
    return TileConfig(*map(int, numbers), KERNELS[kernel], int(stream_k or 0))


def exhaustive(name):
    """{shape: {configuration: (microseconds, Resources)}}."""
    document = json.loads((RESULTS / name).read_text())
    return {
        GemmShape(row["m"], row["n"], row["k"]): {
            config_of(text): (us, Resources(registers=registers, spill_bytes=0, shared_bytes=shared))
            for text, _, us, registers, shared in row["times"]
        }
        for row in document["shapes"]
    }
