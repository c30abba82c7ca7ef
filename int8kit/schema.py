"""The rows of a tuning database as pydantic models: what a file may hold, and nothing else.

`docs/tuning_db.schema.json` is the JSON Schema of `Document`; `int8kit db schema` prints it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from int8kit.spec import GemmShape, Source, TileConfig

FORMAT = "int8kit.tuning/1"
Microseconds = Annotated[float, Field(gt=0)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(_Row):
    """What the compiled kernel takes, read from the cubin."""

    registers: int = Field(ge=0)  # a thread
    spill_bytes: int = Field(ge=0)  # local memory a thread
    shared_bytes: int = Field(ge=0)  # a block


class Stamp(_Row):
    """A verification that passed: what executed which configuration."""

    # the device's own code; the entry's card's code there; reduced size
    on: Literal["native", "foreign", "interpreter"]
    device: str
    of: str  # `Entry.subject` then: an entry that was changed since is not proven by it
    kernel: str
    triton: str


class CardState(_Row):
    """The card while it ran an entry's kernel, as NVML tells; what cannot be had is absent."""

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: int | None = None
    temperature_c: int | None = None
    throttle: tuple[str, ...] | None = None  # what holds the clock back: "power cap" and so on


class RunnerUp(_Row):
    """A finalist that did not win, in the same rounds as the winner."""

    config: TileConfig
    kernel: str
    resources: Resources
    model_us: Microseconds | None = None
    time_us: Microseconds
    p20_us: Microseconds | None = None
    p80_us: Microseconds | None = None


class Entry(_Row):
    """The chosen configuration of one shape, and why."""

    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    source: Source
    config: TileConfig
    triton: str = Field(pattern=r"^\d+\.\d+")
    kernel: str
    resources: Resources
    tried: int = Field(ge=0)  # configurations ranked or timed for this shape
    model_us: Microseconds | None = None  # the offline model's estimate, microseconds
    time_us: Microseconds | None = None  # median, microseconds, GEMM with epilogue and no quantization
    p20_us: Microseconds | None = None
    p80_us: Microseconds | None = None
    default_us: Microseconds | None = None  # default_config in the same rounds
    bf16_us: Microseconds | None = None  # torch's bf16 matmul in the same rounds
    measured_on: str | None = None  # the card that was timed
    timed_with: str | None = None  # the Triton whose code was timed, if not `triton`'s: `db carry`
    card_state: CardState | None = None
    policy: int | None = None  # how: see the header
    runners_up: tuple[RunnerUp, ...] | None = None  # fastest first
    verified: tuple[Stamp, ...] | None = None

    @property
    def shape(self) -> GemmShape:
        """(m, n, k) as a GemmShape."""
        return GemmShape(self.m, self.n, self.k)

    @property
    def subject(self) -> str:
        """What a verification of the entry is of: shape and configuration."""
        return f"{self.shape}, {self.config}"

    @property
    def key(self) -> tuple[int, int, int, str]:
        """What identifies the entry in its file; sorts entries of one weight together."""
        return self.n, self.k, self.m, generation(self.triton)


class Card(_Row):
    """The card that a file is of."""

    alias: str
    name: str
    arch: int = Field(ge=80, le=999)
    sms: int = Field(ge=1)
    shared_memory: int = Field(ge=1)


class Document(_Row):
    """A whole file."""

    format: Literal["int8kit.tuning/1"]
    numerics: int  # the arithmetic that the entries' kernels compute: `spec.NUMERICS_VERSION`
    policies: dict[str, str]  # how times were taken, by the number that an entry names
    gpu: Card
    entries: tuple[Entry, ...]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a database file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Document.model_json_schema()}


_GENERATIONS = ((3, 6), (3, 8))


def generation(version: str) -> str:
    """3.7.1 -> 3.6: the first Triton that compiles these kernels to the code that `version` does.

    3.8 is a border: from there on a prefetch pass doubles the registers of some int8 tiles on sm_80 to sm_89.
    """
    release = tuple(int(part) for part in version.split(".")[:2])
    first = max((g for g in _GENERATIONS if g <= release), default=_GENERATIONS[0])
    return ".".join(map(str, first))
