"""The tuning database: one JSON file a GPU, one entry a line.

    {"format": "int8kit.tuning/2", "numerics": 1, "policies": {"1": "GEMM with epilogue and bias, ..."},
     "gpu": {"alias": "rtx3090", "name": "NVIDIA GeForce RTX 3090", "arch": 86, "sms": 82, "shared_memory": 101376,
             "memory_gib": 24, "l2_bytes": 6291456},
     "entries": [
       {"operation": "gemm", "m": 4296, "n": 12288, "k": 4608, "id": "5d41402abc4b", "source": "proxy",
        "config": {"block_m": 128, ...}, "triton": "3.6.0", "kernel": "f00d...", "time_us": 712.4,
        "measured_on": "NVIDIA H200", "policy": 1, ..., "verified": [{"executor": "native", "of": "5d41402abc4b"}]}]}

An entry is identified by operation, (m, n, k) and the generation of Triton that compiled it. The header identifies GPU
and numerics. `lookup` says which entry serves a shape.

An entry of the running Triton's generation and of the present kernel is preferred; another serves with a remark, since
any legal configuration gives the same bits. A numerics version or a GPU that differs refuses the whole file. A merge
keeps the stronger source, then the newer entry. No host name, user, path or address is stored: fields that the schema
does not know are refused. Files of earlier formats are read (`upgrade`) and written in the present one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock
import platformdirs
from pydantic import ValidationError

from int8kit import files, gpus, lookup, upgrade
from int8kit.gpus import Gpu
from int8kit.lookup import Candidate, Plan
from int8kit.schema import FORMAT, Document, Entry, GpuIdentity, Stamp
from int8kit.spec import (
    NUMERICS_VERSION,
    POLICIES,
    FileError,
    GemmShape,
    InputError,
    Operation,
    Source,
    TileConfig,
    is_near,
    why_illegal,
)
from int8kit.toolchain import Toolchain

FORMATS = (FORMAT, upgrade.OLD_FORMAT)
_REMEDY = "make one with `int8kit tune`, or name another with --db"

Key = tuple[str, int, int, int, str]
"""`Entry.key`: operation, n, k, m, generation of Triton."""


@dataclass(frozen=True)
class Choice:
    """A configuration and where it came from."""

    shape: GemmShape
    config: TileConfig
    level: str
    why: str
    verified: bool = False  # the entry's configuration was proven exact with the present kernel and Triton


def _policies() -> dict[str, str]:
    return {str(number): text for number, text in POLICIES.items()}


@dataclass(frozen=True)
class Database:
    """The entries of one GPU, sorted by key."""

    gpu: Gpu
    entries: tuple[Entry, ...] = ()
    # of the file, where it is from one: a GPU that is in no list has rates of a similar one, which no file may hold
    header: GpuIdentity | None = field(default=None, compare=False)
    policies: dict[str, str] = field(default_factory=_policies, compare=False)

    def merged(self, new: Iterable[Entry]) -> Database:
        """With `new` entries. A weaker source never replaces a stronger one of the same kernel, else the newer stays.

        An entry of a kernel that has changed gives way. A verification stays with its configuration.
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
        return replace(self, entries=tuple(sorted(entries.values(), key=lambda e: e.key)))

    def holds(self, entry: Entry) -> bool:
        """True if `entry` is in it, its verification and its stored id aside."""
        loose = {"verified": None, "id": None}
        return any(e.model_copy(update=loose) == entry.model_copy(update=loose) for e in self.entries)

    def serving(self, toolchain: Toolchain) -> list[Entry]:
        """Entries that can serve: of another generation of Triton only where this one has no entry of the shape."""
        own = {e.key[:4] for e in self.entries if not e.is_other_triton(toolchain)}
        return [e for e in self.entries if e.key[:4] not in own or not e.is_other_triton(toolchain)]

    def stamped(self, stamps: dict[Key, Sequence[Stamp]]) -> Database:
        """With verification stamps, by entry key. Stamps of another configuration, kernel or numerics are dropped.

        Where a GPU has executed an entry at full size, a stamp of the interpreter under the same Triton adds nothing.
        """
        entries = []
        for entry in self.entries:
            new = stamps.get(entry.key, ())
            kinds = {(stamp.kernel, stamp.numerics) for stamp in new}
            old = [s for s in entry.verified or () if not kinds or (s.kernel, s.numerics) in kinds]
            kept = {s.key: s for s in (*old, *new) if s.of == entry.identity}
            full = {s.triton for s in kept.values() if s.executor != "interpreter"}
            final = sorted((s for s in kept.values() if s.executor != "interpreter" or s.triton not in full),
                           key=lambda s: s.key)  # fmt: skip
            entries.append(entry.model_copy(update={"verified": tuple(final) or None}))
        return replace(self, entries=tuple(entries))

    def candidates(self, toolchain: Toolchain, wanted: GemmShape | None = None) -> list[tuple[Candidate, Entry]]:
        """What may serve, the preferred ones first: of this Triton, of the present kernels, of a strong source.

        wanted: only what may serve a weight of this shape's N and K.
        """

        def rank(e: Entry) -> tuple[Any, ...]:
            return e.is_other_triton(toolchain), e.is_stale(toolchain), -e.source.strength, e.key

        usable = [e for e in self.serving(toolchain) if self._why_illegal(e.config) is None]
        if wanted is not None:
            usable = [e for e in usable if is_near(e.n, wanted.n) and is_near(e.k, wanted.k)]
        return [(Candidate(e.shape, e.config, e.operation), e) for e in sorted(usable, key=rank)]

    def resolve(self, shape: GemmShape, toolchain: Toolchain, operation: Operation = Operation.GEMM) -> Choice:
        """The configuration for `shape`, and the level of the lookup that found it."""
        return next(choice for _, choice, _ in self.levels(shape, toolchain, operation) if choice is not None)

    def levels(
        self, shape: GemmShape, toolchain: Toolchain, operation: Operation = Operation.GEMM
    ) -> list[tuple[str, Choice | None, Entry | None]]:
        """Each level of the lookup with what it finds, and the entry behind it; the first that finds one serves."""
        pairs = self.candidates(toolchain, shape)
        request = lookup.Request(shape, [candidate for candidate, _ in pairs], self.gpu.sms, operation)
        found: list[tuple[str, Choice | None, Entry | None]] = []
        for level, match in lookup.matches(request):
            if match is None:
                found.append((level, None, None))
            elif match.candidate is None:
                found.append((level, Choice(shape, match.config, level, f"no entry of {self.gpu.alias} is near"), None))
            else:
                entry = next(e for candidate, e in pairs if candidate == match.candidate)
                proven = bool(entry.proofs(toolchain, self.gpu.arch))
                found.append((level, Choice(shape, match.config, level, provenance(entry, toolchain), proven), entry))
        return found

    def unlisted(self, shapes: Iterable[GemmShape], toolchain: Toolchain) -> list[Choice]:
        """What serves those of `shapes` that have no entry of their own."""
        known = {e.shape for e in self.entries}
        return [self.resolve(shape, toolchain) for shape in sorted(set(shapes) - known)]

    def plan(self, n: int, k: int, toolchain: Toolchain) -> Plan:
        """The plan of a weight [n, k]: it chooses for every m as `resolve` does."""
        found = dict.fromkeys(candidate for candidate, _ in self.candidates(toolchain, GemmShape(1, n, k)))
        return Plan(tuple(found), self.gpu.sms)

    def _why_illegal(self, config: TileConfig) -> str | None:
        return why_illegal(config, arch=self.gpu.arch, shared_memory=self.gpu.shared_memory)

    def dumps(self) -> str:
        """The file's text: one entry a line, sorted by key."""
        rows = []
        for entry in self.entries:
            rows.append(entry.named().model_dump(mode="json", exclude_none=True))
        document = {
            "format": FORMAT,
            "numerics": NUMERICS_VERSION,
            "policies": {**self.policies, **_policies()},
            "gpu": (self.header or identity_of(self.gpu)).model_dump(exclude_none=True),
            "entries": rows,
        }
        return files.dump_rows(document, "entries")


def identity_of(gpu: Gpu) -> GpuIdentity:
    """What a file says of its GPU."""
    return GpuIdentity(**{name: getattr(gpu, name) for name in GpuIdentity.model_fields})


def provenance(entry: Entry, toolchain: Toolchain) -> str:
    """Where an entry is from, and how its toolchain differs from this one."""
    found = [f"{entry.source} for {entry.shape}"]
    if entry.is_other_triton(toolchain):
        found.append(f"tuned with Triton {entry.triton}, running {toolchain.triton}")
    if entry.is_stale(toolchain):
        found.append("tuned with another kernel source")
    return "; ".join(found)


def is_ours(path: Path) -> bool:
    """True if `path` is a tuning database, of an earlier format too."""
    return files.is_ours(path, *FORMATS)


def read(path: Path) -> dict[str, Any]:
    """The file's document as it stands. Raises FileError if it is no tuning database."""
    return files.read_json(path, *FORMATS, remedy=_REMEDY)


def load(path: Path, alias: str | None = None) -> Database:
    """The database in `path`. Raises FileError if it is damaged, not ours, of other numerics, or of another GPU."""
    document = read(path)
    try:
        if document["format"] == upgrade.OLD_FORMAT:
            document = upgrade.upgraded(document)
        # by way of JSON: only there does pydantic's strict mode know enums and tuples by their JSON types
        found = Document.model_validate_json(json.dumps(document), strict=True)
        _check(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FileError(f"{str(path)!r} is damaged ({error.title}.{place}: {first['msg']}); {_REMEDY}") from None
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise FileError(f"{str(path)!r} is damaged ({files.lacks(error)}); {_REMEDY}") from None
    except InputError as error:
        raise FileError(f"{str(path)!r} is damaged ({error}); {_REMEDY}") from None
    header = found.gpu
    if found.numerics != NUMERICS_VERSION:
        raise FileError(f"{str(path)!r} has numerics {found.numerics}; expected {NUMERICS_VERSION}; {_REMEDY}")
    if alias is not None and header.alias != alias:
        raise FileError(f"{str(path)!r} is for the GPU {header.alias!r}, not for {alias!r}; {_REMEDY}")
    gpu = gpus.GPUS.get(header.alias)
    if gpu is None or identity_of(gpu) != header:
        like = gpu or gpus.GPUS["rtx3090"]
        gpu = replace(like, **header.model_dump(exclude_none=True))
    return Database(gpu, tuple(sorted(found.entries, key=lambda e: e.key)), header, found.policies)


def _check(document: Document) -> None:
    """Raise TypeError, or an InputError, for rows that no tuner writes."""
    gpu = document.gpu
    for entry in document.entries:
        shape = entry.shape  # raises ShapeError outside the kernels' domain
        for config in (entry.config, *(one.config for one in entry.runners_up or ())):  # any may become the winner
            reason = why_illegal(config, arch=gpu.arch, shared_memory=gpu.shared_memory)
            if reason:
                raise TypeError(f"{shape}: {reason}")
        if entry.source is not Source.MODELLED and entry.time_us is None:
            raise TypeError(f"{shape}: {entry.source} without time_us")
    twice = [key for key, count in Counter(entry.key for entry in document.entries).items() if count > 1]
    if twice:
        operation, n, k, m, triton = twice[0]
        raise TypeError(f"{operation} {GemmShape(m, n, k)} stands twice for Triton {triton}")


def find(alias: str, given: Path | None = None) -> Path | None:
    """The database file of a card: `given`, else ./tuning_db/<alias>.json, else the shipped one, else None."""
    if given is not None:
        return given
    for folder in (Path("tuning_db"), files.shipped("tuning_db")):
        path = folder / f"{alias}.json"
        if path.is_file():
            return path
    return None


def user_path(alias: str) -> Path:
    """The user's own database of a card, which lies over the shipped one."""
    return Path(platformdirs.user_data_dir("int8kit")) / "tuning_db" / f"{alias}.json"


def known() -> list[Path]:
    """The files that serve some card: ./tuning_db's or the shipped ones, and the user's own."""
    here = Path("tuning_db")
    folder = here if here.is_dir() else files.shipped("tuning_db")
    return [*sorted(folder.glob("*.json")), *sorted(user_path("x").parent.glob("*.json"))]


def gather(gpu: Gpu, toolchain: Toolchain, given: Path | None = None) -> tuple[Database, tuple[Path, ...]]:
    """What serves a GPU and the files that it is from: `given` alone, or what `find` finds with the user's on top.

    On top as in a merge, but an entry of the user's for a kernel that has changed since covers none. Raises FileError.
    """
    base = find(gpu.alias, given)
    own = user_path(gpu.alias) if given is None else None
    paths = tuple(path for path in (base, own) if path is not None and (path == given or path.is_file()))
    database = Database(gpu)
    for path in paths:
        loaded = load(path, gpu.alias)
        known = {entry.key for entry in database.entries}
        fresh = [e for e in loaded.entries if e.key not in known or not e.is_stale(toolchain)]
        policies = {**database.policies, **loaded.policies}
        database = replace(database.merged(fresh), gpu=loaded.gpu, header=loaded.header, policies=policies)
    return database, paths


def update(path: Path, gpu: Gpu, entries: Iterable[Entry], *, force: bool = False) -> Database:
    """Merge `entries` into the file, under a lock and in one step; returns what it now holds.

    A file that is not a tuning database is refused, or with `force` replaced. Raises FileError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_of(path):
        fresh = not path.exists() or (force and not is_ours(path))
        database = (Database(gpu) if fresh else load(path, gpu.alias)).merged(entries)
        database = replace(database, entries=tuple(entry.named() for entry in database.entries))
        files.write_text(path, database.dumps())
    return database


def stamp(path: Path, stamps: dict[Key, Sequence[Stamp]], proven: Database | None = None) -> bool:
    """Write verification stamps into the file; False, with the file untouched, if they change nothing. FileError.

    proven: what was verified, where that is not this file: only entries of the same configuration are stamped.
    """
    with lock_of(path):
        before = load(path)
        if proven is not None:
            configs = {entry.key: entry.config for entry in proven.entries}
            same = {entry.key for entry in before.entries if configs.get(entry.key) == entry.config}
            stamps = {key: value for key, value in stamps.items() if key in same}
        after = before.stamped(stamps)
        if after != before:
            files.write_text(path, after.dumps())
    return after != before


def lock_of(path: Path, timeout: float = 60) -> filelock.BaseFileLock:
    """A lock of the file `path`, kept beside the user's caches: the folder that is reviewed stays clean.

    timeout: seconds that acquiring waits, before it raises filelock.Timeout. It ends with the process that holds it.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    folder = Path(platformdirs.user_cache_dir("int8kit")) / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the lock folder {str(folder)!r} ({error.strerror}); set XDG_CACHE_HOME") from None
    return filelock.FileLock(folder / f"{name}.lock", timeout=timeout)
