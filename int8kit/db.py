"""The tuning database: one JSON file a card, one entry a line.

    {"format": "int8kit.tuning/1", "numerics": 1, "policies": {"1": "GEMM with epilogue and bias, ..."},
     "gpu": {"alias": "rtx3090", "name": "NVIDIA GeForce RTX 3090", "arch": 86, "sms": 82, "shared_memory": 101376},
     "entries": [
       {"m": 4296, "n": 12288, "k": 4608, "source": "proxy", "config": {"block_m": 128, ...}, "triton": "3.6.0",
        "kernel": "f00d...", "time_us": 712.4, "measured_on": "NVIDIA H200", "policy": 1, ...}]}

An entry is identified by (m, n, k) and the generation of Triton that compiled it (`generation`); the header identifies
card and numerics.
`Database.resolve` climbs down a ladder and says on which rung it stood:

    exact      the same (m, n, k)
    nearest-m  the same (n, k); the nearest m by waves over the card and by log distance
    nearest    another weight's shape, likewise
    default    `spec.default_config`: nothing is within a factor of `spec.NEAR` in m, n and k

Within a rung an entry of the running Triton's generation and of the present kernel source is preferred; another
serves with a remark, since any legal configuration gives the same bits. A numerics version or a card that differs
refuses the whole file. A merge keeps the stronger source, then the newer entry. No host name, user, path or address is
stored: fields that the schema does not know are refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import filelock
import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from int8kit import files, gpus
from int8kit.gpus import Gpu
from int8kit.spec import (
    NUMERICS_VERSION,
    POLICIES,
    FileError,
    GemmShape,
    Kernel,
    Plan,
    Source,
    TileConfig,
    default_config,
    is_near,
    why_illegal,
)

FORMAT = "int8kit.tuning/1"
RUNGS = ("exact", "nearest-m", "nearest", "default")
_REMEDY = "make one with `int8kit tune`, or name another with --db"


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Resources(_Row):
    """What the compiled kernel takes, read from the cubin."""

    registers: int  # a thread
    spill_bytes: int  # local memory a thread
    shared_bytes: int  # a block


class Stamp(_Row):
    """A verification that passed: what executed the entry's configuration."""

    on: Literal[
        "native", "foreign", "interpreter"
    ]  # the device's own code; the entry's card's code there; reduced size
    device: str
    kernel: str
    triton: str


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
    model_us: float | None = None  # the offline model's estimate, microseconds
    time_us: float | None = None  # median, microseconds, GEMM with epilogue and no quantization
    p20_us: float | None = None
    p80_us: float | None = None
    default_us: float | None = None  # default_config in the same rounds
    bf16_us: float | None = None  # torch's bf16 matmul in the same rounds
    measured_on: str | None = None  # the card that was timed
    policy: int | None = None  # how: see the header
    verified: tuple[Stamp, ...] | None = None

    @property
    def shape(self) -> GemmShape:
        """(m, n, k) as a GemmShape."""
        return GemmShape(self.m, self.n, self.k)

    @property
    def key(self) -> tuple[int, int, int, str]:
        """What identifies the entry in its file; sorts entries of one weight together."""
        return self.n, self.k, self.m, generation(self.triton)


class _Card(_Row):
    alias: str
    name: str
    arch: int = Field(ge=80, le=999)
    sms: int = Field(ge=1)
    shared_memory: int = Field(ge=1)


@dataclass(frozen=True)
class Toolchain:
    """What compiles kernels in this process. Entries of another serve with a remark, and after those of this one."""

    triton: str = ""  # version; "" compares with nothing
    kernels: Mapping[Kernel, str] = field(default_factory=dict)  # hash of each kernel's source; likewise if absent

    def ages(self, entry: Entry) -> tuple[bool, bool]:
        """Whether `entry` was tuned with another generation of Triton, and with another source of its kernel."""
        mine = self.kernels.get(entry.config.kernel, entry.kernel)
        return bool(self.triton) and generation(entry.triton) != generation(self.triton), entry.kernel != mine


@dataclass(frozen=True)
class Choice:
    """A configuration and where it came from."""

    shape: GemmShape
    config: TileConfig
    rung: str
    why: str
    verified: bool = False  # the entry's configuration was proven exact with the present kernel


_GENERATIONS = ((3, 6), (3, 8))


def generation(version: str) -> str:
    """3.7.1 -> 3.6: the first Triton that compiles these kernels to the code that `version` does.

    3.8 is a border: from there on a prefetch pass doubles the registers of some int8 tiles on sm_80 to sm_89.
    """
    release = tuple(int(part) for part in version.split(".")[:2])
    first = max((g for g in _GENERATIONS if g <= release), default=_GENERATIONS[0])
    return ".".join(map(str, first))


@dataclass(frozen=True)
class Database:
    """The entries of one card, sorted by key."""

    gpu: Gpu
    entries: tuple[Entry, ...] = ()

    def merged(self, new: Iterable[Entry]) -> Database:
        """With `new` entries: a weaker source never replaces a stronger one of the same kernel, else the new one stays.

        An entry of another kernel source is out of date and always gives way. A verification stays with its
        configuration.
        """
        entries = {entry.key: entry for entry in self.entries}
        for entry in new:
            old = entries.get(entry.key)
            stale = old is not None and old.config.kernel is entry.config.kernel and old.kernel != entry.kernel
            if old is None or stale:
                entries[entry.key] = entry
            elif entry.source.strength >= old.source.strength:
                same = old.config == entry.config and entry.verified is None
                entries[entry.key] = entry.model_copy(update={"verified": old.verified}) if same else entry
        return Database(self.gpu, tuple(sorted(entries.values(), key=lambda e: e.key)))

    def holds(self, entry: Entry) -> bool:
        """True if `entry` is in it, its verification aside."""
        return any(e.model_copy(update={"verified": entry.verified}) == entry for e in self.entries)

    def stamped(self, stamps: dict[tuple[int, int, int, str], Sequence[Stamp]]) -> Database:
        """With verification stamps, by entry key. Stamps of another kernel source are void and dropped.

        What a card has executed at full size, the interpreter adds nothing to.
        """
        entries = []
        for entry in self.entries:
            new = stamps.get(entry.key, ())
            kernels = {stamp.kernel for stamp in new}
            old = [s for s in entry.verified or () if not kernels or s.kernel in kernels]
            kept = sorted({(s.on, s.device): s for s in (*old, *new)}.values(), key=lambda s: (s.on, s.device))
            if any(s.on != "interpreter" for s in kept):
                kept = [s for s in kept if s.on != "interpreter"]
            entries.append(entry.model_copy(update={"verified": tuple(kept)}))
        return Database(self.gpu, tuple(entries))

    def resolve(self, shape: GemmShape, toolchain: Toolchain = Toolchain()) -> Choice:
        """The configuration for `shape` and the rung it was found on."""
        legal = [e for e in self.entries if self._why_illegal(e.config) is None]
        near = [e for e in legal if all(map(is_near, (e.m, e.n, e.k), (shape.m, shape.n, shape.k)))]
        same_weight = [e for e in near if (e.n, e.k) == (shape.n, shape.k)]
        for rung, found in (
            ("exact", [e for e in same_weight if e.m == shape.m]),
            ("nearest-m", same_weight),
            ("nearest", near),
        ):
            if found:
                entry = min(
                    found,
                    key=lambda e: (_distance(e, shape, self.gpu.sms), *toolchain.ages(e), -e.source.strength, e.key),
                )
                present = toolchain.kernels.get(entry.config.kernel, entry.kernel)
                proven = any(s.kernel == present for s in entry.verified or ())
                return Choice(shape, entry.config, rung, _why(entry, toolchain), proven)
        config = default_config(shape)
        return Choice(shape, config, "default", f"no entry of {self.gpu.alias} is near")

    def covering(self, shapes: Iterable[GemmShape]) -> Database:
        """With an entry for each of `shapes` that has none: what `resolve` gives it, to be checked, never written."""
        known = {e.shape for e in self.entries}
        nothing = Resources(registers=0, spill_bytes=0, shared_bytes=0)
        made = [
            Entry(m=s.m, n=s.n, k=s.k, source=Source.MODELLED, config=self.resolve(s).config, triton="0.0", kernel="",
                  resources=nothing, tried=0)
            for s in sorted(set(shapes) - known)
        ]  # fmt: skip
        return Database(self.gpu, self.entries + tuple(made))

    def plan(self, n: int, k: int, ms: Iterable[int], toolchain: Toolchain = Toolchain()) -> Plan:
        """The plan of a weight [n, k]: the choice for each m of `ms`, and every m that the database knows of it."""
        known = {e.m for e in self.entries if (e.n, e.k) == (n, k)}
        rungs = [(m, self.resolve(GemmShape(m, n, k), toolchain).config) for m in {*known, *ms}]
        return Plan(tuple(sorted(rungs)))

    def _why_illegal(self, config: TileConfig) -> str | None:
        return why_illegal(config, arch=self.gpu.arch, shared_memory=self.gpu.shared_memory)

    def dumps(self) -> str:
        """The file's text: one entry a line, sorted by key."""
        gpu = self.gpu
        card = _Card(alias=gpu.alias, name=gpu.name, arch=gpu.arch, sms=gpu.sms, shared_memory=gpu.shared_memory)
        rows = [entry.model_dump(mode="json", exclude_none=True) for entry in self.entries]
        document = {
            "format": FORMAT,
            "numerics": NUMERICS_VERSION,
            "policies": POLICIES,
            "gpu": card.model_dump(),
            "entries": rows,
        }
        return files.dump_rows(document, "entries")


def _distance(entry: Entry, shape: GemmShape, sms: int) -> float:
    """How far an entry's shape is: log distances of m, n and k, and of the waves that its tiles make on the card."""

    def waves(of: GemmShape) -> int:
        tiles = math.ceil(of.m / entry.config.block_m) * math.ceil(of.n / entry.config.block_n)
        return math.ceil(tiles / sms)

    pairs = ((entry.m, shape.m), (entry.n, shape.n), (entry.k, shape.k), (waves(entry.shape), waves(shape)))
    return round(sum(abs(math.log(a / b)) for a, b in pairs), 9)


def _why(entry: Entry, toolchain: Toolchain) -> str:
    remarks = [f"{entry.source} for {entry.shape}"]
    other_triton, other_kernel = toolchain.ages(entry)
    if other_triton:
        remarks.append(f"tuned with Triton {entry.triton}, running {toolchain.triton}")
    if other_kernel:
        remarks.append("tuned with another kernel source")
    return "; ".join(remarks)


def is_ours(path: Path) -> bool:
    """True if `path` is a tuning database."""
    return files.is_ours(path, FORMAT)


def load(path: Path, alias: str | None = None) -> Database:
    """The database in `path`. Raises FileError if it is damaged, not ours, of other numerics, or of another card."""
    document = files.read_json(path, FORMAT, remedy=_REMEDY)
    try:
        card = _Card.model_validate(document["gpu"])
        entries = tuple(Entry.model_validate(row) for row in document["entries"])
        numerics = document["numerics"]
        unknown = set(document) - {"format", "numerics", "policies", "gpu", "entries"}
        if unknown:
            raise TypeError(f"unknown field {min(unknown)!r}")
        for entry in entries:
            shape = entry.shape  # raises ShapeError outside the kernels' domain
            reason = why_illegal(entry.config, arch=card.arch, shared_memory=card.shared_memory)
            if reason:
                raise TypeError(f"{shape}: {reason}")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FileError(f"{str(path)!r} is damaged ({error.title}.{place}: {first['msg']}); {_REMEDY}") from None
    except (KeyError, TypeError) as error:
        raise FileError(f"{str(path)!r} is damaged ({files.lacks(error)}); {_REMEDY}") from None
    if numerics != NUMERICS_VERSION:
        raise FileError(f"{str(path)!r} has numerics {numerics}; legal is {NUMERICS_VERSION}; {_REMEDY}")
    if alias is not None and card.alias != alias:
        raise FileError(f"{str(path)!r} is for the card {card.alias!r}; asked was {alias!r}; {_REMEDY}")
    gpu = gpus.GPUS.get(card.alias)
    if gpu is None or (gpu.arch, gpu.sms) != (card.arch, card.sms):
        like = gpu or gpus.GPUS["rtx3090"]
        gpu = replace(like, **card.model_dump())
    return Database(gpu, tuple(sorted(entries, key=lambda e: e.key)))


def find(alias: str, given: Path | None = None) -> Path | None:
    """The database file of a card: `given`, else ./tuning_db/<alias>.json, else the shipped one, else None."""
    if given is not None:
        return given
    for folder in (Path("tuning_db"), files.shipped("tuning_db")):
        path = folder / f"{alias}.json"
        if path.is_file():
            return path
    return None


def update(path: Path, gpu: Gpu, entries: Iterable[Entry], *, force: bool = False) -> Database:
    """Merge `entries` into the file, under a lock and in one step; returns what it now holds.

    A file that is not a tuning database is refused, or with `force` replaced. Raises FileError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        fresh = not path.exists() or (force and not is_ours(path))
        database = (Database(gpu) if fresh else load(path, gpu.alias)).merged(entries)
        files.write_text(path, database.dumps())
    return database


def stamp(path: Path, stamps: dict[tuple[int, int, int, str], Sequence[Stamp]]) -> bool:
    """Write verification stamps into the file; False, with the file untouched, if they change nothing. FileError."""
    with _locked(path):
        before = load(path)
        after = before.stamped(stamps)
        if after != before:
            files.write_text(path, after.dumps())
    return after != before


def _locked(path: Path) -> filelock.BaseFileLock:
    """A lock of the database `path`, kept beside the user's caches: the folder that is reviewed stays clean."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    folder = Path(platformdirs.user_cache_dir("int8kit")) / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the lock folder {str(folder)!r} ({error.strerror}); set XDG_CACHE_HOME") from None
    return filelock.FileLock(folder / f"{name}.lock", timeout=60)
