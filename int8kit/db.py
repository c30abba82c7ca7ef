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

What the second rung gives was never slower than the default on what the shipped entries' runs timed (tests/test_db.py).

Within a rung an entry of the running Triton's generation and of the present kernel source is preferred; another
serves with a remark, since any legal configuration gives the same bits. A numerics version or a card that differs
refuses the whole file. A merge keeps the stronger source, then the newer entry. No host name, user, path or address is
stored: fields that the schema does not know are refused.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock
import platformdirs
from pydantic import ValidationError

from int8kit import files, gpus
from int8kit.gpus import Gpu
from int8kit.schema import FORMAT, Card, Document, Entry, Resources, Stamp, generation
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

RUNGS = ("exact", "nearest-m", "nearest", "default")
_REMEDY = "make one with `int8kit tune`, or name another with --db"


@dataclass(frozen=True)
class Toolchain:
    """What compiles kernels in this process. Entries of another serve with a remark, and after those of this one."""

    triton: str = ""  # version; "" compares with nothing
    kernels: Mapping[Kernel, str] = field(default_factory=dict)  # hash of each kernel's source; likewise if absent

    def ages(self, entry: Entry) -> tuple[bool, bool]:
        """Whether `entry` was tuned with another generation of Triton, and with another source of its kernel."""
        mine = self.kernels.get(entry.config.kernel, entry.kernel)
        return bool(self.triton) and generation(entry.triton) != generation(self.triton), entry.kernel != mine

    def proves(self, entry: Entry) -> bool:
        """Whether `entry`, as it is, was verified with the present source of its kernel."""
        present = self.kernels.get(entry.config.kernel, entry.kernel)
        return any((stamp.kernel, stamp.of) == (present, entry.subject) for stamp in entry.verified or ())


@dataclass(frozen=True)
class Choice:
    """A configuration and where it came from."""

    shape: GemmShape
    config: TileConfig
    rung: str
    why: str
    verified: bool = False  # the entry's configuration was proven exact with the present kernel


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

    def complaints(self, toolchain: Toolchain) -> list[str]:
        """What speaks against entries: of a changed kernel or unproven, a line each; each slower than the default."""
        found, groups = [], dict[str, list[str]]()
        for entry in self.serving(toolchain):
            name = f"{entry.shape} ({entry.config})"
            if toolchain.ages(entry)[1]:
                why = f"the {entry.config.kernel} kernel has changed since; tune and verify again"
                groups.setdefault(why, []).append(name)
            elif any(stamp.of != entry.subject for stamp in entry.verified or ()):
                why = f"changed since it was proven; run `int8kit verify --gpu {self.gpu.alias}`"
                groups.setdefault(why, []).append(name)
            elif not toolchain.proves(entry):
                why = f"not proven with the present kernel; run `int8kit verify --gpu {self.gpu.alias}`"
                groups.setdefault(why, []).append(name)
            if entry.time_us and entry.default_us and entry.time_us > entry.default_us:
                found.append(f"{name}: slower than the default, {entry.time_us} and {entry.default_us} us")
        for why, names in groups.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{names[0]}{others}: {why}")
        return found

    def serving(self, toolchain: Toolchain) -> list[Entry]:
        """Those that can serve: not those of another generation of Triton where this one has an entry of the shape."""
        own = {entry.shape for entry in self.entries if not toolchain.ages(entry)[0]}
        return [entry for entry in self.entries if entry.shape not in own or not toolchain.ages(entry)[0]]

    def stamped(self, stamps: dict[tuple[int, int, int, str], Sequence[Stamp]]) -> Database:
        """With verification stamps, by entry key. Stamps of another kernel source are void and dropped.

        What a card has executed at full size, the interpreter adds nothing to.
        """
        entries = []
        for entry in self.entries:
            new = stamps.get(entry.key, ())
            kernels = {stamp.kernel for stamp in new}
            old = [s for s in entry.verified or () if s.of == entry.subject and (not kernels or s.kernel in kernels)]
            kept = sorted({(s.on, s.device): s for s in (*old, *new)}.values(), key=lambda s: (s.on, s.device))
            if any(s.on != "interpreter" for s in kept):
                kept = [s for s in kept if s.on != "interpreter"]
            entries.append(entry.model_copy(update={"verified": tuple(kept) or None}))
        return Database(self.gpu, tuple(entries))

    def resolve(self, shape: GemmShape, toolchain: Toolchain = Toolchain()) -> Choice:
        """The configuration for `shape` and the rung it was found on."""
        for rung, entry in self.ladder(shape, toolchain):
            if entry is not None:
                return Choice(shape, entry.config, rung, remarks(entry, toolchain), toolchain.proves(entry))
        return Choice(shape, default_config(shape), RUNGS[-1], f"no entry of {self.gpu.alias} is near")

    def ladder(self, shape: GemmShape, toolchain: Toolchain = Toolchain()) -> list[tuple[str, Entry | None]]:
        """Each rung but the default with the best entry on it, or None; the first entry is the one that serves."""
        legal = [e for e in self.entries if self._why_illegal(e.config) is None]
        near = [e for e in legal if all(map(is_near, (e.m, e.n, e.k), (shape.m, shape.n, shape.k)))]
        same_weight = [e for e in near if (e.n, e.k) == (shape.n, shape.k)]
        found = [e for e in same_weight if e.m == shape.m], same_weight, near

        def far(e: Entry) -> tuple[Any, ...]:
            return _distance(e, shape, self.gpu.sms), *toolchain.ages(e), -e.source.strength, e.key

        return [(rung, min(entries, key=far, default=None)) for rung, entries in zip(RUNGS, found, strict=False)]

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
        card = Card(alias=gpu.alias, name=gpu.name, arch=gpu.arch, sms=gpu.sms, shared_memory=gpu.shared_memory)
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


def remarks(entry: Entry, toolchain: Toolchain) -> str:
    """Where an entry is from, and what of its identity is not this process's."""
    found = [f"{entry.source} for {entry.shape}"]
    other_triton, other_kernel = toolchain.ages(entry)
    if other_triton:
        found.append(f"tuned with Triton {entry.triton}, running {toolchain.triton}")
    if other_kernel:
        found.append("tuned with another kernel source")
    return "; ".join(found)


def is_ours(path: Path) -> bool:
    """True if `path` is a tuning database."""
    return files.is_ours(path, FORMAT)


def load(path: Path, alias: str | None = None) -> Database:
    """The database in `path`. Raises FileError if it is damaged, not ours, of other numerics, or of another card."""
    document = files.read_json(path, FORMAT, remedy=_REMEDY)
    try:
        found = Document.model_validate(document)
        card, entries = found.gpu, found.entries
        for entry in entries:
            shape = entry.shape  # raises ShapeError outside the kernels' domain
            reason = why_illegal(entry.config, arch=card.arch, shared_memory=card.shared_memory)
            if reason:
                raise TypeError(f"{shape}: {reason}")
            if entry.source is not Source.MODELLED and entry.time_us is None:
                raise TypeError(f"{shape}: {entry.source} without time_us")
        if twice := [key for key, count in Counter(entry.key for entry in entries).items() if count > 1]:
            n, k, m, triton = twice[0]
            raise TypeError(f"{GemmShape(m, n, k)} stands twice for Triton {triton}")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FileError(f"{str(path)!r} is damaged ({error.title}.{place}: {first['msg']}); {_REMEDY}") from None
    except TypeError as error:
        raise FileError(f"{str(path)!r} is damaged ({error}); {_REMEDY}") from None
    if found.numerics != NUMERICS_VERSION:
        raise FileError(f"{str(path)!r} has numerics {found.numerics}; legal is {NUMERICS_VERSION}; {_REMEDY}")
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


def user_path(alias: str) -> Path:
    """The user's own database of a card, which lies over the shipped one."""
    return Path(platformdirs.user_data_dir("int8kit")) / "tuning_db" / f"{alias}.json"


def known() -> list[Path]:
    """The files that serve some card: ./tuning_db's or the shipped ones, and the user's own."""
    here = Path("tuning_db")
    folder = here if here.is_dir() else files.shipped("tuning_db")
    return [*sorted(folder.glob("*.json")), *sorted(user_path("x").parent.glob("*.json"))]


def gather(
    gpu: Gpu, given: Path | None = None, toolchain: Toolchain = Toolchain()
) -> tuple[Database, tuple[Path, ...]]:
    """What serves a card and the files that it is from: `given` alone, or what `find` finds with the user's on top.

    On top as in a merge, but an entry of the user's for a kernel that has changed since covers none. Raises FileError.
    """
    base = find(gpu.alias, given)
    own = user_path(gpu.alias) if given is None else None
    paths = tuple(path for path in (base, own) if path is not None and (path == given or path.is_file()))
    database = Database(gpu)
    for path in paths:
        loaded = load(path, gpu.alias)
        known = {entry.key for entry in database.entries}
        fresh = [e for e in loaded.entries if e.key not in known or not toolchain.ages(e)[1]]
        database = replace(database.merged(fresh), gpu=loaded.gpu)
    return database, paths


def update(path: Path, gpu: Gpu, entries: Iterable[Entry], *, force: bool = False) -> Database:
    """Merge `entries` into the file, under a lock and in one step; returns what it now holds.

    A file that is not a tuning database is refused, or with `force` replaced. Raises FileError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_of(path):
        fresh = not path.exists() or (force and not is_ours(path))
        database = (Database(gpu) if fresh else load(path, gpu.alias)).merged(entries)
        files.write_text(path, database.dumps())
    return database


def stamp(path: Path, stamps: dict[tuple[int, int, int, str], Sequence[Stamp]], proven: Database | None = None) -> bool:
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
