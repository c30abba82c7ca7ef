"""Format of a tuning database file, as pydantic models. One JSON file per GPU, one entry per line.

    {"format": "int8kit.tuning/2", "numerics": 1, "policies": {"1": "GEMM with epilogue and bias, ..."},
     "gpu": {"alias": "rtx3090", "name": "NVIDIA GeForce RTX 3090", "arch": 86, "sms": 82, "shared_memory": 101376,
             "memory_gib": 24, "l2_bytes": 6291456},
     "entries": [
       {"operation": "gemm", "m": 4296, "n": 12288, "k": 4608, "id": "5d41402abc4b", "source": "proxy",
        "config": {"block_m": 128, ...}, "triton": "3.6.0", "kernel": "f00d...", "time_us": 712.4,
        "measured_on": "NVIDIA H200", "policy": 1, ..., "verified": [{"executor": "native", "of": "5d41402abc4b"}]}]}

An entry is identified by its operation, (m, n, k) and the generation of Triton that compiled it. The header identifies
the GPU and the numerics. Unknown fields are refused, so a file contains no host name, user, path or address.

`docs/tuning_db.schema.json` is the JSON Schema of `Document`; `int8kit db schema` prints it. `upgrade` converts files
of earlier formats.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from packaging.version import InvalidVersion, Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from int8kit.spec import NUMERICS_VERSION, GemmShape, Operation, Source, SwigluShape, TileConfig, digest
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


def _printable(text: str) -> str:
    if not text.isprintable():  # a terminal obeys escape characters
        raise ValueError("expected printable characters in one line")
    return text


Text = Annotated[str, AfterValidator(_printable)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(_Row):
    """Resources that the compiled kernel needs, read from its cubin."""

    registers: int = Field(ge=0)  # per thread
    spill_bytes: int = Field(ge=0)  # local memory per thread
    shared_bytes: int = Field(ge=0)  # per block


class Stamp(_Row):
    """A passed verification of one configuration of one kernel, compiled by one Triton version, run on one device.

    A stamp of another configuration, kernel, Triton or numerics version proves nothing; see `Entry.proofs`.
    """

    # native: the device's own code; cross_arch: another architecture's code; interpreter: not compiled, reduced size
    executor: Literal["native", "cross_arch", "interpreter"]
    device: Text
    arch: int | None = None  # architecture of the compiled code: 86 for sm_86; None in the interpreter
    of: Text  # `Entry.identity` when the verification ran
    kernel: Text
    triton: TritonVersion
    numerics: int = Field(ge=1)

    @property
    def key(self) -> tuple[str, str, int, str]:
        """Identity of a stamp: a newer stamp replaces an older one with the same key."""
        return self.executor, self.device, self.arch or 0, self.triton


class GpuState(_Row):
    """State of the GPU while it ran an entry's kernel, from NVML. Unavailable values are absent."""

    sm_mhz: int | None = Field(default=None, ge=0)
    memory_mhz: int | None = Field(default=None, ge=0)
    power_w: int | None = Field(default=None, ge=0)
    temperature_c: int | None = Field(default=None, ge=-50, le=150)
    throttle: tuple[Text, ...] | None = None  # reasons for a reduced clock, such as "power cap"


class RunnerUp(_Row):
    """A finalist that did not win, timed in the same rounds as the winner."""

    config: TileConfig
    kernel: Text
    resources: Resources
    model_us: Microseconds | None = None
    time_us: Microseconds
    p20_us: Microseconds | None = None
    p80_us: Microseconds | None = None


class Entry(_Row):
    """The chosen configuration of one shape, with the evidence for it."""

    operation: Operation = Operation.GEMM
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    id: Text | None = None  # `identity` when the row was written; a difference means that the row was edited
    source: Source
    config: TileConfig
    triton: TritonVersion
    kernel: Text
    resources: Resources
    tried: int = Field(ge=0)  # configurations ranked or timed for this shape
    model_us: Microseconds | None = None  # the cost model's estimate, microseconds
    time_us: Microseconds | None = None  # median, microseconds, of the GEMM with epilogue, without quantization
    p20_us: Microseconds | None = None
    p80_us: Microseconds | None = None
    default_us: Microseconds | None = None  # default_config in the same rounds
    bf16_us: Microseconds | None = None  # torch's bf16 matmul in the same rounds
    measured_on: Text | None = None  # the GPU that was timed
    timed_with: TritonVersion | None = None  # Triton whose code was timed, if not `triton`: after `db migrate`
    gpu_state: GpuState | None = None
    policy: int | None = None  # how times were taken: a key of the header's policies
    runners_up: tuple[RunnerUp, ...] | None = None  # fastest first
    verified: tuple[Stamp, ...] | None = None

    @property
    def shape(self) -> GemmShape:
        """(m, n, k) as a GemmShape."""
        return GemmShape(self.m, self.n, self.k)

    @property
    def tuned(self) -> GemmShape:
        """The shape with its epilogue, as the tuner has it: a SwigluShape for that operation."""
        kind = SwigluShape if self.operation is Operation.SWIGLU else GemmShape
        return kind(self.m, self.n, self.k)

    @property
    def identity(self) -> str:
        """Subject of a verification: 12 hexadecimal digits of operation, shape and configuration."""
        return identity(self.operation, self.shape, self.config)

    def with_id(self) -> Entry:
        """This entry with its `identity` as its id, as it is written to a file."""
        return self.model_copy(update={"id": self.identity})

    @property
    def key(self) -> tuple[str, int, int, int, str]:
        """Identity of the entry in its file. Its order keeps entries of one weight together."""
        return self.operation.value, self.n, self.k, self.m, generation(self.triton)

    def is_other_triton(self, toolchain: Toolchain) -> bool:
        """True if the entry was tuned with another Triton generation."""
        return toolchain.is_other_triton(self.triton)

    def is_stale(self, toolchain: Toolchain) -> bool:
        """True if the entry's kernel has changed since it was tuned."""
        return toolchain.is_stale(self.config.kernel, self.kernel)

    def proofs(self, toolchain: Toolchain, arch: int) -> list[Stamp]:
        """Stamps that prove the present entry under `toolchain` as code of `arch` (86 for sm_86).

        Stamps of the interpreter, which compiles nothing, and of code for another architecture prove nothing here.
        """
        return [s for s in self.stamps(toolchain) if s.arch == arch]

    def stamps(self, toolchain: Toolchain) -> list[Stamp]:
        """Stamps of the present entry under `toolchain`, from any executor."""
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
    """The GPU that a file is for. Two GPUs that share a name differ in the numbers."""

    alias: str = Field(pattern="^[a-z0-9][a-z0-9_-]*$")
    name: Text
    arch: int = Field(ge=80, le=999)
    sms: int = Field(ge=1)
    shared_memory: int = Field(ge=1)  # bytes, at most, per block
    memory_gib: int | None = Field(default=None, ge=1)
    l2_bytes: int | None = Field(default=None, ge=1)


class Document(_Row):
    """A complete file."""

    format: Literal["int8kit.tuning/2"]
    numerics: int  # `spec.NUMERICS_VERSION` of the entries' kernels
    policies: dict[Text, Text]  # how times were taken, by the number in `Entry.policy`
    gpu: GpuIdentity
    entries: tuple[Entry, ...]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a database file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Document.model_json_schema()}


def stamp(executor: str, *, device: str, arch: int | None, entry: Entry, kernel: str, triton: str) -> Stamp:
    """A stamp of the present `entry` under the present numerics."""
    return Stamp.model_validate(
        {
            "executor": executor,
            "device": device,
            "arch": arch,
            "of": entry.identity,
            "kernel": kernel,
            "triton": triton,
            "numerics": NUMERICS_VERSION,
        }
    )
