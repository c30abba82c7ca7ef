"""The rows of a tuning database as pydantic models: what a file may hold, and nothing else.

`docs/tuning_db.schema.json` is the JSON Schema of `Document`; `int8kit db schema` prints it. Files of the earlier
format are converted by `upgrade`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from int8kit.spec import NUMERICS_VERSION, GemmShape, Operation, Source, TileConfig, digest
from int8kit.toolchain import Toolchain, generation

FORMAT = "int8kit.tuning/2"
Microseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _version(text: str) -> str:
    try:
        Version(text)
    except InvalidVersion:
        raise ValueError("expected a version such as 3.7.1") from None
    return text


TritonVersion = Annotated[str, AfterValidator(_version)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(_Row):
    """What the compiled kernel takes, read from the cubin."""

    registers: int = Field(ge=0)  # a thread
    spill_bytes: int = Field(ge=0)  # local memory a thread
    shared_bytes: int = Field(ge=0)  # a block


class Stamp(_Row):
    """A verification that passed: this configuration, of this kernel, compiled by this Triton, on this device.

    A stamp of another configuration, kernel, Triton or numerics version proves nothing: see `Entry.proofs`.
    """

    # native: the device's own code; cross_arch: another architecture's code; interpreter: not compiled, reduced size
    executor: Literal["native", "cross_arch", "interpreter"]
    device: str
    arch: int | None = None  # whose code was compiled: 86 for sm_86; None in the interpreter
    of: str  # `Entry.identity` then
    kernel: str
    triton: TritonVersion
    numerics: int = Field(ge=1)

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What a newer stamp of the same kind replaces."""
        return self.executor, self.device, self.arch or 0, self.triton


class GpuState(_Row):
    """The GPU while it ran an entry's kernel, as NVML tells; what cannot be had is absent."""

    sm_mhz: int | None = Field(default=None, ge=0)
    memory_mhz: int | None = Field(default=None, ge=0)
    power_w: int | None = Field(default=None, ge=0)
    temperature_c: int | None = Field(default=None, ge=-50, le=150)
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

    operation: Operation = Operation.GEMM
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    id: str | None = None  # `identity` when the row was written; another one tells that the row was edited
    source: Source
    config: TileConfig
    triton: TritonVersion
    kernel: str
    resources: Resources
    tried: int = Field(ge=0)  # configurations ranked or timed for this shape
    model_us: Microseconds | None = None  # the cost model's estimate, microseconds
    time_us: Microseconds | None = None  # median, microseconds, GEMM with epilogue and no quantization
    p20_us: Microseconds | None = None
    p80_us: Microseconds | None = None
    default_us: Microseconds | None = None  # default_config in the same rounds
    bf16_us: Microseconds | None = None  # torch's bf16 matmul in the same rounds
    measured_on: str | None = None  # the GPU that was timed
    timed_with: TritonVersion | None = None  # the Triton whose code was timed, if not `triton`'s: `db migrate`
    gpu_state: GpuState | None = None
    policy: int | None = None  # how: see the header
    runners_up: tuple[RunnerUp, ...] | None = None  # fastest first
    verified: tuple[Stamp, ...] | None = None

    @property
    def shape(self) -> GemmShape:
        """(m, n, k) as a GemmShape."""
        return GemmShape(self.m, self.n, self.k)

    @property
    def identity(self) -> str:
        """What a verification is of: 12 hexadecimal digits of operation, shape and configuration."""
        return identity(self.operation, self.shape, self.config)

    def named(self) -> Entry:
        """The entry with its `identity` as its id, as a file holds it."""
        return self.model_copy(update={"id": self.identity})

    @property
    def key(self) -> tuple[str, int, int, int, str]:
        """What identifies the entry in its file; sorts entries of one weight together."""
        return self.operation.value, self.n, self.k, self.m, generation(self.triton)

    def is_other_triton(self, toolchain: Toolchain) -> bool:
        """Whether another generation of Triton was tuned."""
        return toolchain.is_other_triton(self.triton)

    def is_stale(self, toolchain: Toolchain) -> bool:
        """Whether the entry's kernel has changed since it was tuned."""
        return toolchain.is_stale(self.config.kernel, self.kernel)

    def proofs(self, toolchain: Toolchain, arch: int) -> list[Stamp]:
        """Stamps that prove the entry as it is, under `toolchain`, as code of `arch` (86 for sm_86).

        The interpreter compiles nothing, and the compiler makes other code for another architecture.
        """
        return [s for s in self.stamps(toolchain) if s.arch == arch]

    def stamps(self, toolchain: Toolchain) -> list[Stamp]:
        """Stamps of the entry as it is, under `toolchain`, whatever was executed."""
        kernel, own = self.config.kernel, self.identity
        return [
            s
            for s in self.verified or ()
            if s.of == own and toolchain.proves(kernel, kernel_hash=s.kernel, triton=s.triton, numerics=s.numerics)
        ]


def identity(operation: Operation, shape: GemmShape, config: TileConfig) -> str:
    """12 hexadecimal digits of an operation, a shape and a configuration."""
    return digest([operation.value, shape.m, shape.n, shape.k, config.id])


class GpuIdentity(_Row):
    """The GPU that a file is of. Two GPUs of one name differ in the numbers."""

    alias: str = Field(pattern="^[a-z0-9][a-z0-9_-]*$")
    name: str
    arch: int = Field(ge=80, le=999)
    sms: int = Field(ge=1)
    shared_memory: int = Field(ge=1)  # bytes that one block may use
    memory_gib: int | None = Field(default=None, ge=1)
    l2_bytes: int | None = Field(default=None, ge=1)


class Document(_Row):
    """A whole file."""

    format: Literal["int8kit.tuning/2"]
    numerics: int  # the arithmetic that the entries' kernels compute: `spec.NUMERICS_VERSION`
    policies: dict[str, str]  # how times were taken, by the number that an entry names
    gpu: GpuIdentity
    entries: tuple[Entry, ...]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a database file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Document.model_json_schema()}


def stamp(executor: str, *, device: str, arch: int | None, entry: Entry, kernel: str, triton: str) -> Stamp:
    """A stamp of `entry`, as it is, under the present numerics."""
    return Stamp.model_validate(
        {"executor": executor, "device": device, "arch": arch, "of": entry.identity, "kernel": kernel,
         "triton": triton, "numerics": NUMERICS_VERSION}
    )  # fmt: skip
