"""Tuning database of one GPU in memory: merge, verification stamps, lookup.

    database.resolve(GemmShape(4000, 12288, 4608), toolchain)  ->  Choice(shape, config, "nearest-m", ...)
    database.plan(12288, 4608, toolchain)                      ->  Plan: the same choices for every m of one weight
    database.merged([entry, ...])                              ->  Database

An entry of the running Triton generation and of the present kernel is preferred. Any other entry serves too, with a
note in its provenance: every configuration gives the same bits. `lookup` defines the levels of the lookup, `schema` the
rows, `store` the files, `borrow` the database that completes a small one.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from int8kit import files, lookup
from int8kit.cost_model import Needs, machine_of
from int8kit.database.schema import FORMAT, Entry, GpuIdentity, Resources, Stamp
from int8kit.gpus import Gpu
from int8kit.lookup import Candidate, Plan
from int8kit.ranking import CLOSE, Estimate, Evidence, Origin, Ranked, Ranking, distance
from int8kit.spec import (
    NUMERICS_VERSION,
    POLICIES,
    GemmShape,
    Operation,
    Source,
    TileConfig,
    operation_of,
    plain,
    why_illegal,
)
from int8kit.toolchain import Toolchain

Key = tuple[str, int, int, int, str]
"""`Entry.key`: operation, n, k, m, generation of Triton."""


@dataclass(frozen=True)
class Choice:
    """The configuration that serves a shape, and its origin."""

    shape: GemmShape
    config: TileConfig
    level: str  # of the lookup: "exact", "nearest-m", ...
    provenance: str
    is_verified: bool = False  # the entry's configuration was proven exact with the present kernel and Triton


@dataclass(frozen=True)
class Known:
    """A configuration's kernel as the database knows it: the entry that it won or nearly won, and its resources."""

    entry: Entry
    needs: Needs


def _policies() -> dict[str, str]:
    return {str(number): text for number, text in POLICIES.items()}


@dataclass(frozen=True)
class Database:
    """The entries of one GPU, sorted by key."""

    gpu: Gpu
    entries: tuple[Entry, ...] = ()
    # The GPU as the file names it. For a GPU without a record, `gpu` borrows the rates of a similar GPU; `header` does
    # not, so that no file contains borrowed figures.
    header: GpuIdentity | None = field(default=None, compare=False)
    policies: dict[str, str] = field(default_factory=_policies, compare=False)
    # The database of a similar GPU, whose configurations are ranked for this one. Its entries are not this database's.
    lender: Database | None = field(default=None, compare=False, repr=False)
    _ranked: dict[Toolchain, tuple[tuple[Candidate, Entry], ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _kernels: dict[Toolchain, dict[TileConfig, Known]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def merged(self, new: Iterable[Entry]) -> Database:
        """This database with the entries of `new`.

        A weaker source never replaces a stronger one of the same kernel; otherwise the newer entry wins. An entry whose
        kernel has changed gives way to any new one. The stamps of an entry stay as long as its configuration does.
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

    def contains(self, entry: Entry) -> bool:
        """True if the database has `entry`; stamps and stored ids are not compared."""
        ignored = {"verified": None, "id": None}
        return any(e.model_copy(update=ignored) == entry.model_copy(update=ignored) for e in self.entries)

    def usable_entries(self, toolchain: Toolchain) -> list[Entry]:
        """Entries that may serve under `toolchain`.

        An entry of another Triton generation is left out where this generation has one of the same shape.
        """
        own = {e.key[:4] for e in self.entries if not e.is_other_triton(toolchain)}
        return [e for e in self.entries if e.key[:4] not in own or not e.is_other_triton(toolchain)]

    def stamped(self, stamps: dict[Key, Sequence[Stamp]]) -> Database:
        """This database with verification stamps, by entry key.

        Stamps of another configuration, kernel or numerics are dropped. An interpreter stamp is dropped if a GPU has
        executed the entry at full size under the same Triton.
        """
        entries = []
        for entry in self.entries:
            new = stamps.get(entry.key, ())
            kinds = {(stamp.kernel, stamp.numerics) for stamp in new}
            old = [s for s in entry.verified or () if not kinds or (s.kernel, s.numerics) in kinds]
            kept = {s.key: s for s in (*old, *new) if s.of == entry.identity}
            on_gpu = {s.triton for s in kept.values() if s.executor != "interpreter"}
            final = [s for s in kept.values() if s.executor != "interpreter" or s.triton not in on_gpu]
            entries.append(entry.model_copy(update={"verified": tuple(sorted(final, key=lambda s: s.key)) or None}))
        return replace(self, entries=tuple(entries))

    def candidates(self, toolchain: Toolchain, wanted: GemmShape | None = None) -> list[tuple[Candidate, Entry]]:
        """Candidates of the lookup with their entries, the preferred ones first.

        Preferred are entries of this Triton generation, then of the present kernels, then of a strong source.
        wanted: only candidates with N and K close to the N and K of this shape. The cost model chooses for others.
        """
        ranked = self._rank(toolchain)
        if wanted is None:
            return list(ranked)
        return [(c, e) for c, e in ranked if _is_close(c.shape.n, wanted.n) and _is_close(c.shape.k, wanted.k)]

    def _rank(self, toolchain: Toolchain) -> tuple[tuple[Candidate, Entry], ...]:
        """All candidates in order, computed once per toolchain: `run` and `verify` resolve many shapes."""
        if toolchain not in self._ranked:
            gpu = self.gpu
            usable = [
                entry
                for entry in self.usable_entries(toolchain)
                if why_illegal(entry.config, arch=gpu.arch, shared_memory=gpu.shared_memory) is None
            ]
            usable.sort(key=lambda e: (e.is_other_triton(toolchain), e.is_stale(toolchain), -e.source.strength, e.key))
            self._ranked[toolchain] = tuple((Candidate(e.shape, e.config, e.operation), e) for e in usable)
        return self._ranked[toolchain]

    def kernels(self, toolchain: Toolchain) -> dict[TileConfig, Known]:
        """The kernels of the entries and of their runners-up, each with the L2 swizzle that won for the most shapes.

        First those that won for the most shapes. The cost model hardly distinguishes widths of the swizzle.
        """
        if toolchain not in self._kernels:
            known: dict[TileConfig, Known] = {}
            wins: Counter[TileConfig] = Counter()  # of configurations, and of their kernels with any L2 swizzle
            ranked = [entry for _, entry in self._rank(toolchain)]
            for entry in ranked:
                known.setdefault(entry.config, Known(entry, _needs(entry.resources)))
                wins.update((entry.config, replace(entry.config, group_m=0)))
            for entry in ranked:
                for one in entry.runners_up or ():
                    if self._runs(one.config):
                        known.setdefault(one.config, Known(entry, _needs(one.resources)))
            order = sorted(known, key=lambda c: (-wins[replace(c, group_m=0)], -wins[c], c))
            first = {replace(c, group_m=0): c for c in reversed(order)}
            self._kernels[toolchain] = {c: known[c] for c in order if first[replace(c, group_m=0)] == c}
        return self._kernels[toolchain]

    def ranking(self, wanted: GemmShape, toolchain: Toolchain) -> Ranking:
        """The configurations that the cost model ranks for the weight of `wanted`: its own, and those of the lender."""
        own = self.kernels(toolchain)
        kernels = [Ranked(config, known.needs) for config, known in own.items()]
        if self.lender is None:
            return Ranking(machine_of(self.gpu), tuple(kernels))
        lent = {config: known.needs for config, known in self.lender.kernels(toolchain).items()}
        evidence: dict[GemmShape, Evidence] = {}
        for candidate, entry in self.lender.candidates(toolchain, wanted):
            timed = entry.source is not Source.MODELLED and entry.operation is Operation.GEMM
            if timed and candidate.config not in own and self._runs(candidate.config):
                evidence.setdefault(candidate.shape, Evidence(candidate.shape, candidate.config))
                lent.setdefault(candidate.config, _needs(entry.resources))
        kernels += [Ranked(c, needs, True) for c, needs in lent.items() if c not in own and self._runs(c)]
        return Ranking(machine_of(self.gpu), tuple(kernels), machine_of(self.lender.gpu), tuple(evidence.values()))

    def _runs(self, config: TileConfig) -> bool:
        return why_illegal(config, arch=self.gpu.arch, shared_memory=self.gpu.shared_memory) is None

    def resolve(self, shape: GemmShape, toolchain: Toolchain, operation: Operation = Operation.GEMM) -> Choice:
        """The configuration for `shape`, and the lookup level that found it."""
        return next(choice for _, choice, _ in self.levels(shape, toolchain, operation) if choice is not None)

    def levels(
        self, shape: GemmShape, toolchain: Toolchain, operation: Operation = Operation.GEMM
    ) -> list[tuple[str, Choice | None, Entry | None]]:
        """Each lookup level with its choice and the entry behind it. The first level that has a choice serves."""
        pairs = self.candidates(toolchain, shape)
        ranking = self.ranking(shape, toolchain)
        request = lookup.Request(shape, [candidate for candidate, _ in pairs], self.gpu.sms, operation, ranking)
        found: list[tuple[str, Choice | None, Entry | None]] = []
        for level, match in lookup.matches(request):
            if match is None:
                found.append((level, None, None))
                continue
            entry, why = None, f"no entry of {self.gpu.alias} is near"
            if match.candidate is not None:
                entry = next(e for candidate, e in pairs if candidate is match.candidate)
                why = provenance(entry, toolchain)
            elif level != lookup.DEFAULT:
                entry, why = self._reason(shape, request.estimates, toolchain)
            elif request.estimates:
                why += f"; {_estimated(request.estimates)}"
            proven = _proves(entry, match.config, toolchain, self.gpu.arch)
            found.append((level, Choice(shape, match.config, level, why, proven), entry))
        return found

    def _reason(self, shape: GemmShape, estimates: Sequence[Estimate], toolchain: Toolchain) -> tuple[Entry, str]:
        """The entry from which the first estimate's configuration comes, and why that one serves."""
        first, lender = estimates[0], self.lender
        if first.origin is Origin.OWN or lender is None:
            entry, origin = self.kernels(toolchain)[first.config].entry, ""
        else:
            found = [e for c, e in lender.candidates(toolchain, shape) if c.config == first.config]
            known = lender.kernels(toolchain).get(first.config)
            entry = min(found, key=lambda e: distance(e.shape, shape)) if found or known is None else known.entry
            origin = f"from {lender.gpu.alias}, "
        if entry.config != first.config:
            origin += "runner-up, "
        return entry, f"{origin}{provenance(entry, toolchain)}; {_estimated(estimates)}"

    def choices_without_entry(self, shapes: Iterable[GemmShape], toolchain: Toolchain) -> list[Choice]:
        """The choice for each of `shapes` that has no entry, sorted by shape."""
        known = {e.tuned for e in self.entries}
        missing = sorted(set(shapes) - known)
        return [self.resolve(plain(shape), toolchain, operation_of(shape)) for shape in missing]

    def plan(self, n: int, k: int, toolchain: Toolchain) -> Plan:
        """The plan of a weight [n, k]. It chooses for every m as `resolve` does."""
        weight = GemmShape(1, n, k)
        found = dict.fromkeys(candidate for candidate, _ in self.candidates(toolchain, weight))
        return Plan(tuple(found), self.gpu.sms, self.ranking(weight, toolchain))

    def plans(self, toolchain: Toolchain) -> Callable[[int, int], Plan]:
        """The function (n, k) -> plan of a weight [n, k], which finds each plan once."""
        return functools.cache(lambda n, k: self.plan(n, k, toolchain))

    def dumps(self) -> str:
        """The text of the database's file: one entry per line, sorted by key."""
        document = {
            "format": FORMAT,
            "numerics": NUMERICS_VERSION,
            "policies": {**self.policies, **_policies()},
            "gpu": (self.header or identity_of(self.gpu)).model_dump(exclude_none=True),
            "entries": [entry.with_id().model_dump(mode="json", exclude_none=True) for entry in self.entries],
        }
        return files.dump_rows(document, "entries")


def _is_close(a: int, b: int) -> bool:
    return max(a, b) <= CLOSE * min(a, b)


def _estimated(estimates: Sequence[Estimate]) -> str:
    """The estimated times of the first configuration and of the next one."""
    first, *others = estimates
    text = f"estimated {first.us:.1f} us"
    return text + (f"; next {others[0].config}, {others[0].us:.1f} us" if others else "")


def _proves(entry: Entry | None, config: TileConfig, toolchain: Toolchain, arch: int) -> bool:
    """Whether stamps of `entry` prove `config`. A runner-up of the entry has none."""
    return entry is not None and entry.config == config and bool(entry.proofs(toolchain, arch))


def _needs(of: Resources) -> Needs:
    return Needs(of.registers, of.spill_bytes, of.shared_bytes)


def identity_of(gpu: Gpu) -> GpuIdentity:
    """The header of a file for `gpu`."""
    return GpuIdentity(**{name: getattr(gpu, name) for name in GpuIdentity.model_fields})


def provenance(entry: Entry, toolchain: Toolchain) -> str:
    """Source and shape of an entry, and how its toolchain differs from `toolchain`."""
    found = [f"{entry.source} for {entry.shape}"]
    if entry.is_other_triton(toolchain):
        found.append(f"tuned with Triton {entry.triton}, running {toolchain.triton}")
    if entry.is_stale(toolchain):
        found.append("tuned with another kernel source")
    return "; ".join(found)
