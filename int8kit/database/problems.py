"""Problems of a tuning database: everything a stranger should know before trusting it, one line a kind.

    problems(database, toolchain)  ->  ["4296x12288x4608 (...) and 3 more: not proven under Triton 3.7.1; run ...", ...]

Four groups: the header against the GPU's record, what an entry says against itself, its times against each other and
against the data sheet of the GPU that was timed, and its proof under the toolchain of this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from int8kit import gpus
from int8kit.database.database import Database, identity_of
from int8kit.database.schema import Entry, GpuIdentity, Resources, RunnerUp, Stamp
from int8kit.gpus import Gpu
from int8kit.spec import POLICIES, TIE, GemmShape, Source, default_config
from int8kit.toolchain import OLDEST, Toolchain, generation, release

PEAK = 1.05  # of a data sheet's rate: boards with a higher boost clock exist
ESTIMATE = 5.0  # times that the cost model may be off; 2.1 is the most of the shipped entries


def problems(database: Database, toolchain: Toolchain) -> list[str]:
    """Every problem of `database`, a line each; entries with the same problem share a line."""
    groups: dict[str, list[str]] = {}
    ids = {entry.identity: entry.shape for entry in database.entries}
    check = _Check(database.gpu, toolchain, ids)
    serving = {entry.key for entry in database.usable_entries(toolchain)}
    for entry in database.entries:
        found = [*check.contents(entry), *check.times(entry), *check.stamps(entry)]
        if entry.key in serving:
            found += check.proof(entry)
        for reason in found:
            groups.setdefault(reason, []).append(f"{entry.shape} ({entry.config})")
    lines = list(_header(database))
    for reason, names in groups.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{others}: {reason}")
    return lines


def _header(database: Database) -> Iterator[str]:
    """How the header disagrees with the GPU's record and with this version's policies."""
    header = database.header or identity_of(database.gpu)
    record = gpus.GPUS.get(header.alias)
    if record is not None:
        for name in GpuIdentity.model_fields:
            given, known = getattr(header, name), getattr(record, name)
            if given != known:
                yield f"header: {name} {given!r} of {header.alias!r}, whose record has {known!r}; give another alias"
    for number, text in database.policies.items():
        if not number.isdecimal():
            yield f"header: policy {number!r} is no number"
        elif POLICIES.get(int(number), text) != text:
            yield f"header: policy {number} has another text than this version's"
    for missing in sorted({str(e.policy) for e in database.entries if e.policy is not None} - set(database.policies)):
        yield f"header: no text for policy {missing}, which entries name"


def _peak(name: str | None) -> Gpu | None:
    """The record of the GPU that was timed, by the name that the driver gives it."""
    return next((gpu for gpu in gpus.GPUS.values() if gpu.name == name), None)


def _everyone(entry: Entry) -> list[Entry | RunnerUp]:
    """The winner and its runners-up."""
    return [entry, *(entry.runners_up or ())]


def _too_fast(shape: GemmShape, us: float, gpu: Gpu) -> Iterator[str]:
    """Whether a time beats the data sheet: operations at the INT8 rate, and the weight, which is never found in L2."""
    floor = max(shape.ops / (gpu.int8_tops * PEAK) / 1e6, shape.n * shape.k / (gpu.dram_gb_s * PEAK) / 1e3)
    if us < floor:
        yield f"{us} us is impossible; {gpu.name} needs {floor:.2f} us at its peak"


@dataclass(frozen=True)
class _Check:
    """The checks of one entry."""

    gpu: Gpu
    toolchain: Toolchain
    ids: dict[str, GemmShape]  # of the file's entries

    def contents(self, entry: Entry) -> Iterator[str]:
        """Contradictions in what an entry says of itself."""
        if entry.id is not None and entry.id != entry.identity:
            yield "edited since it was written: its id is another's"
        if entry.source is Source.MEASURED and entry.measured_on != self.gpu.name:
            yield f"marked measured, but timed on {entry.measured_on or 'no GPU'}"
        if entry.source is Source.PROXY and entry.measured_on in (None, self.gpu.name):
            yield f"marked proxy, but timed on {entry.measured_on or 'no GPU'}"
        if entry.source is Source.MODELLED and (entry.time_us or entry.measured_on or entry.runners_up):
            yield "marked modelled, but it has times"
        if entry.source is not Source.MODELLED and entry.policy is None:
            yield "timed by no policy"
        if entry.policy is not None and entry.policy not in POLICIES:
            yield f"unknown policy {entry.policy}; known are {', '.join(map(str, POLICIES))}"
        if release(entry.triton) < OLDEST:
            yield f"tuned with Triton {entry.triton}; the kernels need {OLDEST} or later"
        if entry.timed_with is not None and generation(entry.timed_with) == generation(entry.triton):
            yield f"carried from Triton {entry.timed_with} to {entry.triton}, which compile the same code"
        everyone = _everyone(entry)
        for one in everyone:
            yield from self._resources(one.resources)
            if one.config.kernel is entry.config.kernel and one.kernel != entry.kernel:
                yield "winner and runner-up are of different sources of one kernel"
        configs = [one.config for one in everyone]
        if len(set(configs)) < len(configs):
            yield "a configuration stands twice among winner and runners-up"
        if entry.tried < len(configs):
            yield f"{entry.tried} configurations tried, {len(configs)} in the entry"

    def _resources(self, resources: Resources) -> Iterator[str]:
        if resources.registers == 0 or resources.shared_bytes == 0:
            yield "no resources: 0 registers or 0 bytes of shared memory"
        if resources.spill_bytes:
            yield f"{resources.spill_bytes} bytes of spills; the tuner leaves such kernels out"
        if resources.registers > 255:
            yield f"{resources.registers} registers a thread; 255 is the most"
        if resources.shared_bytes > self.gpu.shared_memory:
            yield f"{resources.shared_bytes} bytes of shared memory; the GPU has {self.gpu.shared_memory} a block"

    def times(self, entry: Entry) -> Iterator[str]:
        """Times that cannot be, or contradict each other."""
        if entry.source is Source.MODELLED:
            if entry.model_us is None:
                yield "marked modelled, but it has no estimate"
            else:
                yield from _too_fast(entry.shape, entry.model_us, self.gpu)
        elif entry.model_us is not None and entry.time_us is not None and not entry.timed_with:
            ratio = entry.model_us / entry.time_us
            if not 1 / ESTIMATE <= ratio <= ESTIMATE:
                yield f"estimate and time are {max(ratio, 1 / ratio):.0f} times apart"
        if entry.time_us is None:
            if entry.p20_us or entry.p80_us or entry.default_us or entry.bf16_us:
                yield "quantiles or times of others without a time of its own"
            return
        timed = _peak(entry.measured_on)
        for one in _everyone(entry):
            yield from self._quantiles(one)
            if timed is not None and one.time_us is not None:
                yield from _too_fast(entry.shape, one.time_us, timed)
        if timed is not None and entry.bf16_us is not None:
            floor = entry.shape.ops / (timed.bf16_tflops * PEAK) / 1e6
            if entry.bf16_us < floor:
                yield f"bf16 in {entry.bf16_us} us; {timed.name} needs {floor:.2f} us"
        if entry.default_us is not None:
            if entry.time_us > entry.default_us:
                yield f"slower than the default, {entry.time_us} and {entry.default_us} us"
            if entry.config == default_config(entry.shape) and entry.time_us != entry.default_us:
                yield f"it is the default, and the default has another time, {entry.time_us} and {entry.default_us} us"
        others = [other.time_us for other in entry.runners_up or ()]
        if others != sorted(others):
            yield "runners-up are not in the order of their times"
        for other in entry.runners_up or ():
            if other.time_us * (1 + TIE) < entry.time_us:
                yield f"a runner-up is faster, {other.time_us} and {entry.time_us} us; tune again"

    def _quantiles(self, one: Entry | RunnerUp) -> Iterator[str]:
        if (one.p20_us is None) is not (one.p80_us is None):
            yield "one quantile without the other"
        elif one.p20_us and one.p80_us and one.time_us and not one.p20_us <= one.time_us <= one.p80_us:
            yield f"the median {one.time_us} us lies outside its quantiles {one.p20_us} and {one.p80_us} us"

    def stamps(self, entry: Entry) -> Iterator[str]:
        """Stamps that are not of this entry, or contradict themselves."""
        for stamp in entry.verified or ():
            if stamp.of != entry.identity and stamp.of in self.ids:
                yield f"its stamp is that of {self.ids[stamp.of]}: copied; run `int8kit verify --gpu {self.gpu.alias}`"
            elif stamp.of != entry.identity:
                yield f"changed since it was proven; run `int8kit verify --gpu {self.gpu.alias}`"
            yield from self._contradicts(stamp)

    def _contradicts(self, stamp: Stamp) -> Iterator[str]:
        if stamp.executor == "cross_arch" and stamp.arch != self.gpu.arch:
            yield f"a stamp of sm_{stamp.arch} code in a file of sm_{self.gpu.arch}: copied"
        device = _peak(stamp.device)
        if stamp.executor == "native" and device is not None and stamp.arch != device.arch:
            yield f"a stamp of {device.name}'s own code as sm_{stamp.arch}, which is sm_{device.arch}"

    def proof(self, entry: Entry) -> Iterator[str]:
        """Why nothing proves the entry under the toolchain."""
        verify = f"run `int8kit verify --gpu {self.gpu.alias}` on a GPU"
        if entry.is_stale(self.toolchain):
            yield f"the {entry.config.kernel} kernel has changed since; tune and verify again"
        elif not entry.proofs(self.toolchain, self.gpu.arch):
            others = entry.stamps(self.toolchain)
            ran = dict.fromkeys(f"as sm_{s.arch} code" if s.arch else "in the interpreter" for s in others)
            only = f", only {' and '.join(ran)}" if ran else ""
            triton = f"Triton {self.toolchain.triton}" if self.toolchain.triton else "any Triton"
            yield f"not proven under {triton} as sm_{self.gpu.arch} code with the present kernel{only}; {verify}"
