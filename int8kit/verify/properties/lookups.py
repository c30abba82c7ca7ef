"""The property `lookup`: a plan, its text and the torch operators choose the configuration that the rule names.

The rule of `int8kit.lookup` is written here a second time, with its own constants and in another form: every candidate
gets a rank, and the least rank serves. Without a candidate near enough the cost model ranks the case's pool, and the
default of the shape from a table. Only the estimates come from `int8kit.cost_model`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations, product

from hypothesis import strategies as st

from int8kit import lookup as lookup_module
from int8kit import ops
from int8kit.cost_model import LAUNCH_US, Needs, assumed_needs, estimate, machine_of
from int8kit.database.database import Database
from int8kit.database.schema import Entry, Resources
from int8kit.errors import ConfigError
from int8kit.gpus import GPUS
from int8kit.lookup import Candidate, Plan, lookup
from int8kit.ranking import Evidence, Ranked, Ranking
from int8kit.spec import GemmShape, Kernel, Operation, Schedule, Source, TileConfig
from int8kit.toolchain import Toolchain
from int8kit.verify.examples.limits import K_MAX
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation

FACTOR, CLOSE = 4, 1.1  # of extents that one configuration may serve, without and with a pool
EQUAL = 1.02  # times of the model without the launch, up to this factor, count as equal
CONFIGS = (
    TileConfig(64, 64, 128, 4, 4),
    TileConfig(128, 256, 64, 8, 3, 5),
    TileConfig(64, 128, 64, 4, 5, 7, Kernel.MMA_SYNC, 2),
    TileConfig(128, 128, 128, 8, 4, 1, Kernel.WGMMA, 1),
    TileConfig(256, 128, 128, 8, 3, 8, Kernel.WGMMA),
    TileConfig(256, 64, 128, 8, 4, 8, Kernel.WGMMA, schedule=Schedule.PINGPONG),  # not the usual one of its tile
)
"""Configurations of the candidates: every field has several values, and every kernel occurs."""

DEFAULTS = {16: (16, 64, 128, 4, 4, 8), 64: (64, 64, 128, 4, 4, 8), 2**31: (128, 128, 64, 8, 4, 8)}
"""The default configuration of the Triton kernel, by the largest M that it serves."""

DEFAULTS_SM90 = {64: (64, 64, 128, 8, 10, 8), 2**31: (128, 128, 128, 8, 6, 8)}
"""Likewise that of the wgmma kernel, where there is a pool."""


@dataclass(frozen=True)
class LookupCase:
    """A shape, and candidates as (m, n, k, index of CONFIGS, has a SwiGLU epilogue).

    own, lent: indices of CONFIGS that the cost model ranks, of the GPU's database and of a borrowed one.
    """

    m: int
    n: int
    k: int
    swiglu: bool
    sms: int
    candidates: tuple[tuple[int, int, int, int, bool], ...]
    own: tuple[int, ...] = ()
    lent: tuple[int, ...] = ()

    def __str__(self) -> str:
        of = ", ".join(f"{m}x{n}x{k} {'swiglu ' if s else ''}{CONFIGS[c]}" for m, n, k, c, s in self.candidates)
        operation = Operation.SWIGLU if self.swiglu else Operation.GEMM
        pool = "".join(f", own {CONFIGS[c]}" for c in self.own) + "".join(f", lent {CONFIGS[c]}" for c in self.lent)
        return f"{operation} {self.m}x{self.n}x{self.k} on {self.sms} multiprocessors among [{of}]{pool}"

    @property
    def ranking(self) -> Ranking | None:
        """The pool on an H200 with another number of multiprocessors; None without a pool."""
        if not self.own and not self.lent:
            return None
        pool = [(c, False) for c in self.own] + [(c, True) for c in self.lent]
        kernels = tuple(Ranked(CONFIGS[c], NEEDS, borrowed) for c, borrowed in pool)
        machine = machine_of(replace(GPUS["h200"], sms=max(self.sms, 1)))
        if not self.lent:
            return Ranking(machine, kernels)
        return Ranking(machine, kernels, machine_of(GPUS["h100"]), (FAR,))


NEEDS = Needs(1, 0, 1)
FAR = Evidence(GemmShape(70001, 70001, 70001), CONFIGS[5])
"""An entry of the lender that is close to no case: it changes no choice, and must survive the plan's text."""


def _serves(config: TileConfig, case: LookupCase) -> bool:
    """Whether the kernel can copy the rows of the operands and of a bf16 output, 16 bytes at once."""
    written = (case.n // 2 if case.swiglu else case.n) * 2
    return {
        Kernel.TRITON: True, Kernel.MMA_SYNC: not case.k % 16, Kernel.WGMMA: not case.k % 16 and not written % 16,
    }[config.kernel]  # fmt: skip


def _ranked(case: LookupCase) -> tuple[str, TileConfig]:
    """The first of the pool whose estimate is about the least, or the default."""
    shape, operation = GemmShape(case.m, case.n, case.k), Operation.SWIGLU if case.swiglu else Operation.GEMM
    default = _default(case)
    assert case.ranking is not None
    machine = case.ranking.machine
    pool = [("model", CONFIGS[c], NEEDS) for c in case.own] + [("borrowed", CONFIGS[c], NEEDS) for c in case.lent]
    pool = [one for one in pool if _serves(one[1], case)] + [("default", default, assumed_needs(default, 90))]
    us = [estimate(shape, config, needs, machine, operation) - LAUNCH_US for _, config, needs in pool]
    level, config, _ = next(one for one, time in zip(pool, us, strict=True) if time <= EQUAL * min(us))
    return level, config


def _default(case: LookupCase) -> TileConfig:
    fast = TileConfig(*_of(DEFAULTS_SM90, case.m), Kernel.WGMMA)
    return fast if _serves(fast, case) else TileConfig(*_of(DEFAULTS, case.m))


def _of(table: Mapping[int, tuple[int, int, int, int, int, int]], m: int) -> tuple[int, int, int, int, int, int]:
    return table[next(most for most in table if m <= most)]


def expected(case: LookupCase) -> tuple[str, TileConfig]:
    """The level and the configuration that the rule names."""
    wanted = case.m, case.n, case.k
    factor = CLOSE if case.own or case.lent else FACTOR
    ranks = []
    for number, (m, n, k, index, swiglu) in enumerate(case.candidates):
        config, distance = CONFIGS[index], 0.0
        near = all(a <= factor * b and b <= factor * a for a, b in zip((m, n, k), wanted, strict=True))
        able = (m, n, k) == wanted or _serves(config, case)  # an entry of the shape ran there
        if (swiglu and not case.swiglu) or not near or not able:
            continue
        waves = [
            -(-(-(-rows // config.block_m) * -(-columns // config.block_n)) // max(1, case.sms))
            for rows, columns in ((m, n), (case.m, case.n))
        ]
        for a, b in zip((m, n, k, waves[0]), (*wanted, waves[1]), strict=True):
            distance += abs(math.log(a) - math.log(b))
        level = 0 if (m, n, k) == wanted else 1 if (n, k) == wanted[1:] else 2
        ranks.append((level, swiglu is not case.swiglu, round(distance, 7), number))
    if ranks:
        level, *_, number = min(ranks)
        return ("exact", "nearest-m", "nearest")[level], CONFIGS[case.candidates[number][3]]
    return _ranked(case) if case.own or case.lent else ("default", TileConfig(*_of(DEFAULTS, case.m)))


def check(case: LookupCase, on: Executor | Implementation) -> str | None:
    """How the choice of a plan, of its text, of the operators or of a database differs from the rule's, or None."""
    level, config = expected(case)
    shape = GemmShape(case.m, case.n, case.k)
    operation = Operation.SWIGLU if case.swiglu else Operation.GEMM
    of = {False: Operation.GEMM, True: Operation.SWIGLU}
    candidates = tuple(Candidate(GemmShape(m, n, k), CONFIGS[c], of[s]) for m, n, k, c, s in case.candidates)
    for function in (ops._choose, lookup_module._plan_of):
        getattr(function, "cache_clear", lambda: None)()  # of answers to an earlier rule
    ranking = case.ranking
    # 0, which is unknown, is the default
    plan = Plan(candidates, case.sms, ranking) if case.sms else Plan(candidates, ranking=ranking)
    if plan.sms != case.sms:
        return f"a plan of {plan.sms} multiprocessors, expected {case.sms}"
    again = Plan.from_text(plan.text)
    if (again.candidates, again.sms, again.ranking, again.text) != (candidates, case.sms, ranking, plan.text):
        return f"the plan of its text: {again}, expected {plan}"
    for damaged in (plan.text.replace("plan/", "plan/9"), f"{plan.text};x", plan.text.replace(str(case.sms), "x", 1)):
        try:
            Plan.from_text(damaged)
        except ConfigError:
            continue
        return f"Plan.from_text took {damaged!r}, expected ConfigError"
    plain = [one for one in candidates if one.operation is Operation.GEMM]
    if list(Plan.fixed(*((one.shape, one.config) for one in plain)).candidates) != plain:
        return "Plan.fixed has other candidates than it was given"
    match = lookup(shape, candidates, sms=case.sms, operation=operation, ranking=ranking)
    found = {
        "lookup": match.config,
        "Plan.choose": plan.choose(shape, operation),
        "the operators": ops._choose(plan.text, operation, *(case.m, case.n, case.k)),
    }
    for name, got in found.items():
        if got != config:
            return f"{name} chose {got}, expected {config} ({level})"
    if match.level != level:
        return f"level {match.level}, expected {level}"
    if why := _beside(case, plan):
        return why
    return _in_database(case, shape, operation)


def _beside(case: LookupCase, plan: Plan) -> str | None:
    """How the answer to a question that differs in one thing from the case's differs from the rule's, or None.

    The functions keep answers. A key that lacks that thing gives the answer of the case, which came first.
    """
    others = [replace(case, **{name: min(5 * getattr(case, name), K_MAX)}) for name in ("m", "n", "k")]
    others += [replace(case, swiglu=not case.swiglu)]
    *before, (m, n, k, config, swiglu) = case.candidates or [(case.m, case.n, case.k, 0, False)]
    last = (m, n, k, (config + 1) % len(CONFIGS), swiglu)
    others += [replace(case, sms=case.sms + 1), replace(case, candidates=(*before, last))]
    others += [replace(case, own=tuple((c + 1) % len(CONFIGS) for c in case.own))]
    of = {False: Operation.GEMM, True: Operation.SWIGLU}
    for other in others:
        mine = plan
        if (other.candidates, other.sms, other.own) != (case.candidates, case.sms, case.own):
            rows = [Candidate(GemmShape(m, n, k), CONFIGS[c], of[s]) for m, n, k, c, s in other.candidates]
            mine = Plan(tuple(rows), other.sms, other.ranking)
        level, config_of = expected(other)
        shape, operation = GemmShape(other.m, other.n, other.k), of[other.swiglu]
        for name, got in (
            ("the plan of a text", Plan.from_text(mine.text).choose(shape, operation)),
            ("the operators", ops._choose(mine.text, operation, *(other.m, other.n, other.k))),
        ):
            if got != config_of:
                return f"then, for {other}, {name} chose {got}, expected {config_of} ({level})"
    return None


def _in_database(case: LookupCase, shape: GemmShape, operation: Operation) -> str | None:
    """How the choice of a database with the candidates as entries differs from the rule's, or None.

    Its candidates are sorted, and no two are of one shape.
    """
    of = {False: Operation.GEMM, True: Operation.SWIGLU}
    ordered = tuple(sorted(case.candidates, key=lambda c: (of[c[4]].value, c[1], c[2], c[0])))
    if len({(m, n, k, s) for m, n, k, _, s in ordered}) < len(ordered) or not case.sms:
        return None
    entries = tuple(
        Entry(
            operation=of[s], m=m, n=n, k=k, source=Source.MODELLED, config=CONFIGS[c], triton="3.7.1", kernel="k",
            resources=_RESOURCES, tried=1,
        )
        for m, n, k, c, s in ordered
    )  # fmt: skip
    database = Database(replace(GPUS["h200"], sms=case.sms), ()).merged(reversed(entries))
    pool = tuple(dict.fromkeys(c for *_, c, _ in ordered))
    wins = {c: sum(c == other for *_, other, _ in ordered) for c in pool}
    own = tuple(sorted(pool, key=lambda c: (-wins[c], CONFIGS[c].group_m)))
    level, config = expected(replace(case, candidates=ordered, own=own, lent=()))
    if not own:  # nothing to rank but the default of the architecture
        level, config = "default", _default(case)
    choice = database.resolve(shape, _TOOLCHAIN, operation)
    if (choice.level, choice.config) != (level, config):
        return f"Database.resolve chose {choice.config} ({choice.level}), expected {config} ({level})"
    planned = database.plan(case.n, case.k, _TOOLCHAIN).choose(shape, operation)
    return None if planned == config else f"Database.plan chose {planned}, expected {config} ({level})"


_RESOURCES = Resources(registers=1, spill_bytes=0, shared_bytes=1)
_TOOLCHAIN = Toolchain("3.7.1", dict.fromkeys(Kernel, "k"))


def examples() -> st.SearchStrategy[LookupCase]:
    """Strategy for cases with up to five candidates, whose extents are often equal, or just near enough."""
    base = st.sampled_from((1, 16, 17, 64, 65, 100, 256, 399, 400, 401, 1600, 1601))
    pool = st.lists(st.integers(0, len(CONFIGS) - 1), max_size=4, unique=True).map(tuple)
    candidate = st.tuples(base, base, base, st.integers(0, len(CONFIGS) - 1), st.booleans())
    return st.builds(
        LookupCase, m=base, n=base, k=base, swiglu=st.booleans(), sms=st.sampled_from((0, 1, 20, 132)),
        candidates=st.lists(candidate, max_size=5).map(tuple), own=pool, lent=pool,
    )  # fmt: skip


def always() -> tuple[LookupCase, ...]:
    """Each level, the limits of nearness and of the defaults, both operations, and an equal distance."""
    found = [LookupCase(m, 32, 32, False, 132, ()) for m in (1, 16, 17, 64, 65, 4096)]
    for m, n, k in (
        (400, 100, 100),
        (401, 100, 100),
        (100, 401, 100),
        (100, 400, 100),
        (25, 100, 100),
        (24, 100, 100),
        (100, 100, 401),
        (100, 100, 25),
    ):
        found += [LookupCase(m, n, k, swiglu, 132, ((100, 100, 100, 1, False),)) for swiglu in (False, True)]
    both = ((100, 96, 96, 0, False), (200, 96, 96, 1, True), (100, 96, 112, 2, False), (50, 96, 96, 3, False))
    for m in (50, 70, 71, 100, 140, 150, 200, 800):
        found += [LookupCase(m, 96, 96, swiglu, 4, both) for swiglu in (False, True)]
    found += [LookupCase(100, 96, 96, False, 132, ((50, 96, 96, a, False), (200, 96, 96, b, False)))
              for a in range(len(CONFIGS)) for b in range(len(CONFIGS)) if a != b]  # fmt: skip
    for axis, (near, far) in product(range(3), permutations(((60, 0), (300, 1)))):  # each axis counts
        of = [[size if i == axis else 100 for i in range(3)] for size, _ in (near, far)]
        first, second = ((m, n, k, c, False) for (m, n, k), (_, c) in zip(of, (near, far), strict=True))
        found.append(LookupCase(100, 100, 100, False, 132, (first, second)))
    for (a, b), n, sms in product(permutations(range(len(CONFIGS)), 2), (64, 112, 256), (1, 4)):
        pair = ((64, n, 96, a, False), (256, n, 96, b, False))  # waves decide, of whole and of partial tiles
        found += [LookupCase(m, n, 96, False, sms, pair) for m in (100, 128, 129, 160)]
    for axis in range(3):  # the limit of nearness of large extents
        for size in (120000, 120001):
            (m, n, k), (near_m, near_n, near_k) = (
                tuple(extent if i == axis else 100 for i in range(3)) for extent in (size, 30000)
            )
            found.append(LookupCase(m, n, k, False, 132, ((near_m, near_n, near_k, 1, False),)))
    for order in permutations(((5000, 64, 100, 0, False), (20001, 64, 100, 1, False))):  # almost equally near
        found.append(LookupCase(10000, 64, 100, False, 1000, order))
    for (a, b), sms in product(permutations(range(len(CONFIGS)), 2), (142, 160, 188, 400)):  # waves of large GPUs
        wide = ((2000, 6000, 96, a, False), (8000, 6000, 96, b, False))
        found += [LookupCase(m, 6000, 96, False, sms, wide) for m in (3500, 4000, 4100)]
    many = tuple((m, 96, 96, m // 50 % len(CONFIGS), False) for m in range(50, 1050, 50))
    found += [LookupCase(m, 96, 96, False, 132, many) for m in (50, 70, 480, 1001)]
    for own, lent in (((0, 1), (4,)), ((4, 0), (1,)), ((0,), ()), ((), (1, 2)), ((2, 3, 4, 5), (0,))):  # ranks
        for m, (n, k) in product((1, 16, 17, 64, 65, 400, 3000), ((96, 96), (100, 100), (4608, 1600), (1004, 2048))):
            found += [LookupCase(m, n, k, swiglu, 132, (), own, lent) for swiglu in (False, True)]
    close = ((100, 96, 96, 1, False), (400, 96, 96, 3, False))
    for m in (90, 91, 110, 111, 364, 400, 440, 441):  # the limit of an entry where there is a pool
        found.append(LookupCase(m, 96, 96, False, 132, close, (0,), (2,)))
    for k in (96, 100, 104, 112):  # entries whose kernel does not support the shape
        found += [LookupCase(100, n, k, s, 132, ((100, 100, 100, c, False),)) for c in (2, 3) for n in (100, 104, 112)
                  for s in (False, True)]  # fmt: skip
    return tuple(found)
