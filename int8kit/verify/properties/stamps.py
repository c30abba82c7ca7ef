"""The property `stamps`: a proof holds for one kernel source, Triton, architecture, configuration and numerics alone.

A case is an entry with one stamp that differs from the entry, or from the present toolchain, in some of ASPECTS. It
proves only if it differs in none. A version of Triton may be spelt in several ways. The same answer is expected of
`Entry.proofs`, of the choice that a database makes, of `db check`, and of a database that is stamped or merged. Nothing
is executed: the databases are synthetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import Any, Literal

from hypothesis import strategies as st

from int8kit.database.database import Database
from int8kit.database.problems import problems
from int8kit.database.schema import Entry, Resources, Stamp, identity, stamp
from int8kit.gpus import GPUS
from int8kit.spec import NUMERICS_VERSION, GemmShape, Kernel, Operation, Source, TileConfig
from int8kit.toolchain import ANY_TOOLCHAIN, Toolchain
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation

ASPECTS = ("kernel", "triton", "arch", "numerics", "config", "shape", "operation")
"""Aspects of a stamp that must be the present ones."""

SPELT = ("3.7.1", "3.7.1.0", "v3.7.1", "3.07.1")
"""Spellings of one version of Triton. The first is the usual one."""

GENERATIONS = (
    ("3.6.0", "3.6.3", "3.7", "3.7.0", "3.7.1", "3.7.10", "3.7.1.post1"),
    ("3.8.0", "3.8", "3.9.1", "3.10.0"),
)
"""Versions of Triton that compile the kernels to the same code."""

_CONFIGS = {
    Kernel.TRITON: TileConfig(128, 128, 64, 8, 4),
    Kernel.MMA_SYNC: TileConfig(64, 128, 64, 4, 5, 8, Kernel.MMA_SYNC, 2),
    Kernel.WGMMA: TileConfig(128, 128, 128, 8, 4, 8, Kernel.WGMMA, 1),
}
_SHAPE = GemmShape(300, 512, 256)
_TRITON = "3.7.1"
_ARCH = 90


@dataclass(frozen=True)
class StampCase:
    """The kernel of the entry, the executor of its stamp, and what is different in the stamp."""

    kernel: Kernel
    executor: Literal["native", "cross_arch", "interpreter"]
    differs: tuple[str, ...] = ()
    spelt: str = _TRITON  # the version of Triton in the stamp, unless it differs

    def __str__(self) -> str:
        return (
            f"a stamp of the {self.kernel} kernel, {self.executor}, of another {' and '.join(self.differs) or '-'}"
            f"{'' if self.spelt == _TRITON else f', Triton {self.spelt}'}"
        )


def _hash(kernel: Kernel) -> str:
    return f"hash of {kernel}"


TOOLCHAIN = Toolchain(_TRITON, {kernel: _hash(kernel) for kernel in Kernel})


def entry_of(case: StampCase) -> Entry:
    """The entry of a case, without its stamp."""
    return Entry(
        operation=Operation.GEMM, m=_SHAPE.m, n=_SHAPE.n, k=_SHAPE.k, source=Source.MODELLED, triton=_TRITON,
        config=_CONFIGS[case.kernel], kernel=_hash(case.kernel), tried=1, model_us=9.0,
        resources=Resources(registers=1, spill_bytes=0, shared_bytes=1),
    )  # fmt: skip


def stamp_of(case: StampCase) -> Stamp:
    """The stamp of a case."""
    other = frozenset(case.differs)
    config, shape = _CONFIGS[case.kernel], _SHAPE
    if "config" in other:
        config = replace(config, group_m=3)
    if "shape" in other:
        shape = replace(shape, m=shape.m + 1)
    arch = None if case.executor == "interpreter" else 86 if "arch" in other else _ARCH
    return Stamp(
        executor=case.executor, device="a GPU", arch=arch,
        of=identity(Operation.SWIGLU if "operation" in other else Operation.GEMM, shape, config),
        kernel="another hash" if "kernel" in other else _hash(case.kernel),
        triton="3.7.2" if "triton" in other else case.spelt,
        numerics=NUMERICS_VERSION + ("numerics" in other),
    )  # fmt: skip


def check(case: StampCase, on: Executor | Implementation) -> str | None:
    """How a proof is accepted that is none, or lost that is one; None if neither."""
    mark = stamp_of(case)
    entry = entry_of(case).model_copy(update={"verified": (mark,)})
    database = Database(replace(GPUS["h200"], arch=_ARCH), (entry,))
    in_code = case.executor != "interpreter"
    own = mark.of == entry.identity
    present = own and not {"kernel", "triton", "numerics"} & set(case.differs)
    proves = in_code and not case.differs
    missing = f"not proven under Triton {_TRITON} as sm_{_ARCH} code"
    kept = database.stamped({}).entries[0].verified or ()
    found = {
        "Entry.stamps": (bool(entry.stamps(TOOLCHAIN)), present),
        "Entry.proofs": (bool(entry.proofs(TOOLCHAIN, _ARCH)), proves),
        "Database.resolve": (database.resolve(_SHAPE, TOOLCHAIN).is_verified, proves),
        "db check": (not any(missing in line for line in problems(database, TOOLCHAIN)), proves),
        "Database.stamped keeps it": (mark in kept, own),
        "any toolchain": (bool(entry.stamps(ANY_TOOLCHAIN)), own and "numerics" not in case.differs),
    }
    for name, (got, want) in found.items():
        if got is not want:
            return f"{name}: {'accepted' if got else 'refused'}, expected the opposite"
    return _stale(case, entry) or _stamped(case, mark) or _merged(case, entry) or _preferred(case) or _generations()


def _stale(case: StampCase, entry: Entry) -> str | None:
    """Whether an entry of another kernel source counts as stale, of its own kernel alone."""
    for kernel in Kernel:
        changed = Toolchain(_TRITON, {**TOOLCHAIN.kernel_hashes, kernel: "changed"})
        if entry.is_stale(changed) is not (kernel is case.kernel):
            return f"a changed {kernel} kernel makes the entry {'stale' if entry.is_stale(changed) else 'no stale'} one"
        if entry.proofs(changed, _ARCH) and kernel is case.kernel:
            return "a stamp proves although its kernel has changed"
    return None


def _stamped(case: StampCase, mark: Stamp) -> str | None:
    """The stamps of an entry with a full set of older ones after `mark` is added."""
    new = stamp(
        "native", device="this GPU", arch=_ARCH, entry=entry_of(case), kernel=_hash(case.kernel), triton=_TRITON
    )  # fmt: skip
    want_new = (_TRITON, _hash(case.kernel), NUMERICS_VERSION, entry_of(case).identity, _ARCH, "native", "this GPU")
    if (new.triton, new.kernel, new.numerics, new.of, new.arch, new.executor, new.device) != want_new:
        return f"`stamp` wrote {new}, expected {want_new}"
    if not entry_of(case).model_copy(update={"verified": (new,)}).proofs(TOOLCHAIN, _ARCH):
        return "a new stamp proves nothing, expected a proof"
    entry = entry_of(case).model_copy(update={"verified": (mark,)})
    after = Database(GPUS["h200"], (entry,)).stamped({entry.key: [new]}).entries[0].verified or ()
    same = mark.of == entry.identity and not {"kernel", "numerics"} & set(case.differs)
    stays = same and (case.executor != "interpreter" or "triton" in case.differs or case.spelt != _TRITON)
    if new not in after or (mark in after) is not stays:
        return f"after a new proof the old stamp {'stays' if mark in after else 'is gone'}, expected the opposite"
    return None


def _merged(case: StampCase, entry: Entry) -> str | None:
    """The stamps and the configuration of an entry after another one of its key is merged."""
    database = Database(GPUS["h200"], (entry,))
    other = entry_of(case).model_copy(update={"config": replace(entry.config, group_m=5)})
    weak = entry_of(case)
    strong = weak.model_copy(update={"source": Source.MEASURED, "time_us": 9.0, "measured_on": "NVIDIA H200"})
    changed = weak.model_copy(update={"kernel": "changed"})
    steps: tuple[tuple[str, Database, Entry, Any, Any], ...] = (
        ("the same configuration", database, weak, entry.config, entry.verified),
        ("another configuration", database, other, other.config, None),
        ("a weaker source", Database(GPUS["h200"], (strong,)), other, entry.config, None),
        ("a changed kernel", Database(GPUS["h200"], (strong,)), changed, changed.config, None),
    )
    for name, before, new, config, verified in steps:
        [after] = before.merged([new]).entries
        if (after.config, after.verified) != (config, verified):
            return f"merged with {name}: {after.config} with stamps {after.verified}, expected {config} with {verified}"
        wanted = changed.kernel if new is changed else weak.kernel
        if after.kernel != wanted:
            return f"merged with {name}: kernel {after.kernel}, expected {wanted}"
    return None


def _preferred(case: StampCase) -> str | None:
    """The entry that serves a shape between two equally near ones: the one of M = 882, if the other one is worse."""
    one = entry_of(case)
    near, far = (
        one.model_copy(update={"m": m, "config": replace(one.config, group_m=g)}) for m, g in ((800, 3), (882, 5))
    )
    strong = {"source": Source.MEASURED, "time_us": 9.0, "measured_on": "NVIDIA H200"}
    steps = {
        "equal": (near, far, near),
        "of another Triton": (near.model_copy(update={"triton": "3.8.0"}), far, far),
        "stale": (near.model_copy(update={"kernel": "changed"}), far, far),
        "a weaker source": (near, far.model_copy(update=strong), far),
        "stale, of a stronger source": (near.model_copy(update={"kernel": "changed", **strong}), far, far),
    }
    for name, (first, second, want) in steps.items():
        database = Database(GPUS["h200"], ()).merged([second, first])
        for got in (
            database.resolve(replace(_SHAPE, m=840), TOOLCHAIN).config,
            database.plan(_SHAPE.n, _SHAPE.k, TOOLCHAIN).choose(replace(_SHAPE, m=840)),
        ):
            if got != want.config:
                return f"M = 800 {name}: {got} serves, expected {want.config}"
    both = Database(GPUS["h200"], ()).merged([one, one.model_copy(update={"triton": "3.8.0"})])
    if len(both.entries) != 2 or both.usable_entries(TOOLCHAIN) != [one]:
        return "entries of two Triton generations: expected that the present one is usable alone"
    return None


def _generations() -> str | None:
    """Whether two versions of Triton are taken for the wrong ones, of one generation or of two."""
    for mine, theirs in permutations((*GENERATIONS[0], *GENERATIONS[1]), 2):
        same = any({mine, theirs} <= set(versions) for versions in GENERATIONS)
        if Toolchain(mine, {}).is_other_triton(theirs) is same:
            return f"Triton {theirs} beside {mine}: expected {'the same' if same else 'another'} generation"
    return None


def examples() -> st.SearchStrategy[StampCase]:
    """Strategy for cases that differ in any number of aspects."""
    return st.builds(
        StampCase, kernel=st.sampled_from(Kernel), executor=st.sampled_from(("native", "cross_arch", "interpreter")),
        spelt=st.sampled_from(SPELT),
        differs=st.lists(st.sampled_from(ASPECTS), unique=True, max_size=4).map(lambda some: tuple(sorted(some))),
    )  # fmt: skip


def always() -> Iterator[StampCase]:
    """Each kernel and executor with no difference, with each single difference, and with each pair."""
    for kernel in Kernel:
        for executor in ("native", "cross_arch", "interpreter"):
            for count in (0, 1, 2):
                for differs in combinations(ASPECTS, count):
                    yield StampCase(kernel, executor, differs)
            yield from (StampCase(kernel, executor, spelt=spelt) for spelt in SPELT[1:])
