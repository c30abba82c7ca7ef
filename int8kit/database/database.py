"""A tuning database in memory: merge, stamps, lookup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from int8kit import files, lookup
from int8kit.database.schema import FORMAT, Entry, GpuIdentity, Stamp
from int8kit.gpus import Gpu
from int8kit.lookup import Candidate, Plan
from int8kit.spec import NUMERICS_VERSION, POLICIES, GemmShape, Operation, TileConfig, is_near, why_illegal
from int8kit.toolchain import Toolchain

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
