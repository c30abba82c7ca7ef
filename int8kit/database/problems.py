"""Problems of a tuning database that a user should know before trusting it, one line per kind of problem.

    problems(database, toolchain)  ->  ["4296x12288x4608 (...) and 3 more: not proven under Triton 3.7.1; run ...", ...]

Four groups of checks:

    header    against the record of the GPU and the measurement policies of this version
    contents  fields of an entry against each other
    times     against each other, and against the data sheet of the timed GPU
    proof     verification stamps under the toolchain of this process
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from int8kit import files, gpus
from int8kit.database.database import Database, identity_of
from int8kit.database.schema import Entry, GpuIdentity, Resources, RunnerUp, Stamp
from int8kit.gpus import Gpu
from int8kit.spec import POLICIES, TIE, GemmShape, Source, default_config
from int8kit.toolchain import OLDEST, Toolchain, generation, release

PEAK_MARGIN = 1.05  # boards with a higher boost clock than the data sheet's exist
MODEL_ERROR = 5.0  # largest plausible ratio of estimate and time; 2.1 in the shipped entries


def problems(database: Database, toolchain: Toolchain, path: Path | None = None) -> list[str]:
    """Every problem of `database`, one line each. Entries with the same problem share a line.

    path: its file, which the remedies name. They never name a file inside the installed package, which a verb would
    then change.
    """
    if path is not None and path.is_absolute() and path.is_relative_to(files.shipped("tuning_db")):
        path = None
    groups: dict[str, list[str]] = {}
    ids = {entry.identity: entry.shape for entry in database.entries}
    verify = f"run `int8kit verify --gpu {database.gpu.alias}{f' --db {path}' if path else ''}`"
    check = _EntryChecks(database.gpu, toolchain, ids, verify)
    usable = {entry.key for entry in database.usable_entries(toolchain)}
    for entry in database.entries:
        found = [*check.contents(entry), *check.times(entry), *check.stamps(entry)]
        if entry.key in usable:
            found += check.proof(entry)
        for reason in found:
            groups.setdefault(reason, []).append(f"{entry.shape} ({entry.config})")
    lines = list(_header(database))
    for reason, names in groups.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{others}: {reason}")
    return lines


def _header(database: Database) -> Iterator[str]:
    """Differences of the header from the GPU's record and from this version's policies."""
    header = database.header or identity_of(database.gpu)
    record = gpus.GPUS.get(header.alias)
    if record is not None:
        for name in GpuIdentity.model_fields:
            given, known = getattr(header, name), getattr(record, name)
            if given != known:
                yield f"header: {name} {given!r}, but {known!r} in the record of {header.alias}; use another alias"
    for number, text in database.policies.items():
        if not number.isdecimal():
            yield f"header: policy {number!r}: expected a number"
        elif POLICIES.get(int(number), text) != text:
            yield f"header: policy {number} has another text than in this version"
    for missing in sorted({str(e.policy) for e in database.entries if e.policy is not None} - set(database.policies)):
        yield f"header: no text for policy {missing}, which entries name"


def _record_of(name: str | None, own: Gpu) -> Gpu | None:
    """The record of the GPU with this driver name; `own`, the file's GPU, if it has the name."""
    return own if own.name == name else next((gpu for gpu in gpus.GPUS.values() if gpu.name == name), None)


def _finalists(entry: Entry) -> list[Entry | RunnerUp]:
    """The winner and its runners-up."""
    return [entry, *(entry.runners_up or ())]


def _too_fast(shape: GemmShape, us: float, gpu: Gpu) -> Iterator[str]:
    """A time below the data sheet's limit: all operations at the INT8 rate, or one read of the weight from DRAM."""
    floor = max(
        shape.flops / (gpu.int8_tops * PEAK_MARGIN) / 1e6, shape.n * shape.k / (gpu.dram_gb_s * PEAK_MARGIN) / 1e3
    )
    if us < floor:
        yield f"{us} us is impossible; {gpu.name} needs {floor:.2f} us at its peak"


@dataclass(frozen=True)
class _EntryChecks:
    """The checks of one entry. Each yields one line per problem."""

    gpu: Gpu
    toolchain: Toolchain
    ids: dict[str, GemmShape]  # shape of each entry in the file, by `Entry.identity`
    verify: str  # the remedy for a missing proof

    def contents(self, entry: Entry) -> Iterator[str]:
        """Fields of an entry that contradict each other."""
        if entry.id is not None and entry.id != entry.identity:
            yield "edited since it was written: its id does not match its shape and configuration"
        if entry.source is Source.MEASURED and entry.measured_on != self.gpu.name:
            yield f"marked measured, but timed on {entry.measured_on or 'no GPU'}"
        if entry.source is Source.PROXY and entry.measured_on in (None, self.gpu.name):
            yield f"marked proxy, but timed on {entry.measured_on or 'no GPU'}"
        if entry.source is Source.MODELLED and (entry.time_us or entry.measured_on or entry.runners_up):
            yield "marked modelled, but it has times"
        if entry.source is not Source.MODELLED and entry.policy is None:
            yield "has times, but no measurement policy"
        if entry.policy is not None and entry.policy not in POLICIES:
            yield f"unknown policy {entry.policy}; expected one of {', '.join(map(str, POLICIES))}"
        if release(entry.triton) < OLDEST:
            yield f"tuned with Triton {entry.triton}; the kernels need {OLDEST} or later"
        if entry.timed_with is not None and generation(entry.timed_with) == generation(entry.triton):
            yield f"migrated from Triton {entry.timed_with} to {entry.triton}, which compile the same code"
        finalists = _finalists(entry)
        for one in finalists:
            yield from self._resources(one.resources)
            if one.config.kernel is entry.config.kernel and one.kernel != entry.kernel:
                yield "winner and runner-up have different hashes of one kernel"
        configs = [one.config for one in finalists]
        if len(set(configs)) < len(configs):
            yield "a configuration occurs twice among winner and runners-up"
        if entry.tried < len(configs):
            yield f"{entry.tried} configurations tried, but {len(configs)} in the entry"

    def _resources(self, resources: Resources) -> Iterator[str]:
        if resources.registers == 0 or resources.shared_bytes == 0:
            yield "no resources: 0 registers or 0 bytes of shared memory"
        if resources.spill_bytes:
            yield f"{resources.spill_bytes} bytes of spills; the tuner rejects such kernels"
        if resources.registers > 255:
            yield f"{resources.registers} registers per thread; expected at most 255"
        if resources.shared_bytes > self.gpu.shared_memory:
            most = self.gpu.shared_memory
            yield f"{resources.shared_bytes} bytes of shared memory; expected at most {most} per block"

    def times(self, entry: Entry) -> Iterator[str]:
        """Times that are impossible or contradict each other."""
        if entry.source is Source.MODELLED:
            if entry.model_us is None:
                yield "marked modelled, but it has no estimate"
            else:
                yield from _too_fast(entry.shape, entry.model_us, self.gpu)
        elif entry.model_us is not None and entry.time_us is not None and not entry.timed_with:
            ratio = entry.model_us / entry.time_us
            if not 1 / MODEL_ERROR <= ratio <= MODEL_ERROR:
                yield f"estimate and time differ by a factor of {max(ratio, 1 / ratio):.3g}"
        if entry.time_us is None:
            if entry.p20_us or entry.p80_us or entry.default_us or entry.bf16_us:
                yield "has quantiles or reference times, but no time_us"
            return
        timed = _record_of(entry.measured_on, self.gpu)
        for one in _finalists(entry):
            yield from self._quantiles(one)
            if timed is not None and one.time_us is not None:
                yield from _too_fast(entry.shape, one.time_us, timed)
        if timed is not None and entry.bf16_us is not None:
            floor = entry.shape.flops / (timed.bf16_tflops * PEAK_MARGIN) / 1e6
            if entry.bf16_us < floor:
                yield f"bf16 in {entry.bf16_us} us is impossible; {timed.name} needs {floor:.2f} us"
        if entry.default_us is not None:
            if entry.time_us > entry.default_us:
                yield f"slower than the default configuration: {entry.time_us} us against {entry.default_us} us"
            if entry.config == default_config(entry.shape) and entry.time_us != entry.default_us:
                yield f"is the default configuration, but time_us {entry.time_us} is not default_us {entry.default_us}"
        others = [other.time_us for other in entry.runners_up or ()]
        if others != sorted(others):
            yield "runners-up are not sorted by time"
        for other in entry.runners_up or ():
            if other.time_us * (1 + TIE) < entry.time_us:
                yield f"a runner-up is faster: {other.time_us} us against {entry.time_us} us; tune again"

    def _quantiles(self, one: Entry | RunnerUp) -> Iterator[str]:
        if (one.p20_us is None) is not (one.p80_us is None):
            yield "one quantile without the other"
        elif one.p20_us and one.p80_us and one.time_us and not one.p20_us <= one.time_us <= one.p80_us:
            yield f"the median {one.time_us} us lies outside its quantiles {one.p20_us} and {one.p80_us} us"

    def stamps(self, entry: Entry) -> Iterator[str]:
        """Stamps that belong to another entry or contradict themselves."""
        for stamp in entry.verified or ():
            if stamp.of != entry.identity and stamp.of in self.ids:
                yield f"its stamp belongs to {self.ids[stamp.of]}: copied; {self.verify}"
            elif stamp.of != entry.identity:
                yield f"changed since it was proven; {self.verify}"
            yield from self._contradicts(stamp)

    def _contradicts(self, stamp: Stamp) -> Iterator[str]:
        if stamp.executor == "cross_arch" and stamp.arch != self.gpu.arch:
            yield f"a stamp for sm_{stamp.arch} code in a file for sm_{self.gpu.arch}: copied"
        device = _record_of(stamp.device, self.gpu)
        if stamp.executor == "native" and device is not None and stamp.arch != device.arch:
            yield f"a native stamp for sm_{stamp.arch} code on {device.name}, which is sm_{device.arch}"

    def proof(self, entry: Entry) -> Iterator[str]:
        """The missing proof of the entry under the toolchain."""
        verify = f"{self.verify} on a GPU"
        if entry.is_stale(self.toolchain):
            yield f"the {entry.config.kernel} kernel has changed since; tune and verify again"
        elif not entry.proofs(self.toolchain, self.gpu.arch):
            others = entry.stamps(self.toolchain)
            ran = dict.fromkeys(f"as sm_{s.arch} code" if s.arch else "in the interpreter" for s in others)
            only = f", only {' and '.join(ran)}" if ran else ""
            triton = f"Triton {self.toolchain.triton}" if self.toolchain.triton else "any Triton"
            yield f"not proven under {triton} as sm_{self.gpu.arch} code with the present kernel{only}; {verify}"
