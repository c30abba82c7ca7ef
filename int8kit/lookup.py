"""Lookup of the tile configuration that serves a GEMM: one rule for layers, `run`, `verify`, `db` and benchmarks.

    lookup(GemmShape(4000, 12288, 4608), candidates, sms=82)  ->  Match("nearest-m", config, candidate)

The levels are tried in order. The first level that finds a configuration serves:

    exact      a candidate with the same (m, n, k)
    nearest-m  a candidate with the same (n, k): the nearest m by log distance and by waves over the multiprocessors
    nearest    a candidate of another weight: the nearest shape, by the same distance
    model      the configuration that the cost model ranks first, if it is one that the GPU's database uses
    borrowed   the same, if it is one of the borrowed database of a similar GPU
    default    `spec.architecture_default`; the model ranks it with the others

On the second and third level a candidate's extents are within a factor of `ranking.CLOSE`, and its kernel supports the
shape. The order of the candidates decides between equal distances. Without a `Ranking` the levels `model` and
`borrowed` find nothing, and the factor is `spec.NEAR`. A new level is a `Level` in `LEVELS`.

A `Plan` holds the candidates and the ranking of one weight as a text. The text passes through a torch operator and into
exported graphs. The rows of x are known at the call alone, so the ranking happens there, once for each number of rows.
This module imports neither torch nor triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from int8kit.cost_model import Machine, Needs
from int8kit.errors import ConfigError, ShapeError
from int8kit.ranking import CLOSE, Estimate, Evidence, Origin, Ranked, Ranking, are_within
from int8kit.spec import (
    NEAR,
    GemmShape,
    Kernel,
    Operation,
    Schedule,
    TileConfig,
    architecture_default,
    default_config,
    supports,
    usual_schedule,
)


class Candidate(NamedTuple):
    """A tuned shape and its configuration."""

    shape: GemmShape
    config: TileConfig
    operation: Operation = Operation.GEMM


@dataclass(frozen=True)
class Request:
    """A shape to look up, and the candidates, the preferred ones first."""

    shape: GemmShape
    candidates: Sequence[Candidate]
    sms: int  # multiprocessors of the GPU
    operation: Operation = Operation.GEMM
    ranking: Ranking | None = None

    @cached_property
    def estimates(self) -> list[Estimate]:
        """The ranked configurations, the fastest first; none without a ranking."""
        return self.ranking.estimates(self.shape, self.operation) if self.ranking else []

    @property
    def near(self) -> float:
        """Factor within which a candidate's extents are near."""
        return CLOSE if self.ranking and self.ranking.kernels else NEAR

    def nearest(self, serves: Callable[[Candidate], bool]) -> Candidate | None:
        """The nearest candidate that `serves` admits."""
        found = [c for c in self.candidates if c.operation in (self.operation, Operation.GEMM) and serves(c)]
        # SwiGLU runs the GEMM's kernel with another epilogue: first its own entries, then the entries of the GEMM
        return min(found, key=lambda c: (c.operation is not self.operation, self._distance(c)), default=None)

    def _distance(self, candidate: Candidate) -> float:
        """Log distances of m, n and k, and of the waves that the candidate's tiles make on the GPU."""
        a, b, config = candidate.shape, self.shape, candidate.config

        def waves(of: GemmShape) -> int:
            tiles = math.ceil(of.m / config.block_m) * math.ceil(of.n / config.block_n)
            return math.ceil(tiles / max(self.sms, 1))

        pairs = ((a.m, b.m), (a.n, b.n), (a.k, b.k), (waves(a), waves(b)))
        return round(sum(abs(math.log(x / y)) for x, y in pairs), 9)


class Match(NamedTuple):
    """The configuration that serves, the level that found it, and its candidate, if any."""

    level: str
    config: TileConfig
    candidate: Candidate | None


class Level(NamedTuple):
    """One step of the lookup: a name and a function."""

    name: str
    find: Callable[[Request], Candidate | TileConfig | None]


def _exact(request: Request) -> Candidate | None:
    return request.nearest(lambda c: c.shape == request.shape)


def _nearest_m(request: Request) -> Candidate | None:
    wanted = request.shape
    return request.nearest(lambda c: (c.shape.n, c.shape.k) == (wanted.n, wanted.k) and _is_near(c, request))


def _nearest(request: Request) -> Candidate | None:
    return request.nearest(lambda c: _is_near(c, request))


def _is_near(candidate: Candidate, request: Request) -> bool:
    able = supports(candidate.config.kernel, request.shape, request.operation)
    return able and are_within(candidate.shape, request.shape, request.near)


def _ranked(request: Request, origin: Origin) -> TileConfig | None:
    """The configuration that the model ranks first, if it has this origin."""
    first = next(iter(request.estimates), None)
    return first.config if first and first.origin is origin else None


def _model(request: Request) -> TileConfig | None:
    return _ranked(request, Origin.OWN)


def _borrowed(request: Request) -> TileConfig | None:
    return _ranked(request, Origin.BORROWED)


def _default(request: Request) -> TileConfig:
    if request.ranking is None:
        return default_config(request.shape)
    machine = request.ranking.machine
    return architecture_default(request.shape, machine.arch, machine.shared_memory, request.operation)


LEVELS = (
    Level("exact", _exact),
    Level("nearest-m", _nearest_m),
    Level("nearest", _nearest),
    Level("model", _model),
    Level("borrowed", _borrowed),
    Level("default", _default),
)
DEFAULT = LEVELS[-1].name


def matches(request: Request) -> list[tuple[str, Match | None]]:
    """The match of each level, in order. The first that is not None serves."""
    found: list[tuple[str, Match | None]] = []
    for level in LEVELS:
        one = level.find(request)
        if one is None:
            found.append((level.name, None))
        elif isinstance(one, Candidate):
            found.append((level.name, Match(level.name, one.config, one)))
        else:
            found.append((level.name, Match(level.name, one, None)))
    return found


def lookup(
    shape: GemmShape,
    candidates: Sequence[Candidate],
    *,
    sms: int,
    operation: Operation = Operation.GEMM,
    ranking: Ranking | None = None,
) -> Match:
    """The match that serves `shape`. candidates: the preferred ones first; sms: multiprocessors of the GPU."""
    request = Request(shape, candidates, sms, operation, ranking)
    for level in LEVELS:
        one = level.find(request)
        if isinstance(one, Candidate):
            return Match(level.name, one.config, one)
        if one is not None:
            return Match(level.name, one, None)
    raise AssertionError("the last level finds a configuration for every shape")


_PLAIN_FORMAT = "int8kit.plan/2"
_TEXT_FORMAT = "int8kit.plan/3"
"""The second format has no ranking. It is still read and written: exported graphs and pickled layers contain it."""


@dataclass(frozen=True)
class Plan:
    """The candidates and the ranking of one weight, gathered when a model is loaded.

    text: the plan as it passes through a torch operator: format, multiprocessors, candidates, ranking.
    """

    candidates: tuple[Candidate, ...] = ()
    sms: int = 0
    ranking: Ranking | None = None
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = [str(self.sms), *map(_row, self.candidates)]
        ranking = [] if self.ranking is None else _ranking_rows(self.ranking)
        form = _PLAIN_FORMAT if self.ranking is None else _TEXT_FORMAT
        object.__setattr__(self, "text", ";".join([form, *rows, *ranking]))

    @classmethod
    def fixed(cls, *pairs: tuple[GemmShape, TileConfig]) -> Plan:
        """A plan of given configurations for given shapes."""
        return cls(tuple(Candidate(shape, config) for shape, config in pairs))

    @property
    def configs(self) -> tuple[TileConfig, ...]:
        """The configurations of the candidates and of the ranking. Without any, defaults alone serve."""
        ranked = self.ranking.kernels if self.ranking else ()
        return tuple(dict.fromkeys([one.config for one in self.candidates] + [one.config for one in ranked]))

    def choosable(self, n: int, k: int, operation: Operation = Operation.GEMM) -> set[TileConfig]:
        """Every configuration that `choose` can give for the weight [n, k]."""
        of = (GemmShape(m, n, k) for m in (16, 64, 2**31 - 1))
        defaults = {_default(Request(shape, (), self.sms, operation, self.ranking)) for shape in of}
        return defaults.union(c for c in self.configs if supports(c.kernel, GemmShape(1, n, k), operation))

    def choose(self, shape: GemmShape, operation: Operation = Operation.GEMM) -> TileConfig:
        """The configuration for `shape`."""
        return lookup(shape, self.candidates, sms=self.sms, operation=operation, ranking=self.ranking).config

    @classmethod
    def from_text(cls, text: str) -> Plan:
        """The plan of a `text`. Raises ConfigError for a text that is not a plan of this version."""
        return _plan_of(text)


def _row(candidate: Candidate) -> str:
    return f"{candidate.operation.value} {candidate.shape} {_config_text(candidate.config)}"


def _config_text(c: TileConfig) -> str:
    numbers = c.block_m, c.block_n, c.block_k, c.num_warps, c.num_stages, c.group_m, c.stream_k
    words = [c.kernel.value, ",".join(map(str, numbers))]
    if c.schedule is not None and c.schedule is not usual_schedule(c):  # left out otherwise, as in earlier texts
        words.append(c.schedule.value)
    return " ".join(words)


def _ranking_rows(ranking: Ranking) -> Iterator[str]:
    """The rows of a ranking: the figures of both GPUs, the configurations with their resources, the evidence."""
    for word, machine in (("machine", ranking.machine), ("lender", ranking.lender)):
        if machine is not None:
            yield f"{word} {','.join(map(repr, machine))}"
    for config, needs, borrowed in ranking.kernels:
        yield f"{'lent' if borrowed else 'own'} {','.join(map(str, needs))} {_config_text(config)}"
    for shape, config in ranking.evidence:
        yield f"near {shape} {_config_text(config)}"


@lru_cache(maxsize=1024)
def _plan_of(text: str) -> Plan:
    head, *parts = text.split(";")
    if head not in (_TEXT_FORMAT, _PLAIN_FORMAT):
        raise ConfigError(f"a plan of the format {head[:40]!r}: expected {_TEXT_FORMAT!r}; build the layer again")
    try:
        sms, *rows = parts
        words = [row.split(" ") for row in rows]
        candidates = [_candidate(row) for row in words if row[0] in _OPERATIONS]
        others = [row for row in words if row[0] not in _OPERATIONS]
        return Plan(tuple(candidates), int(sms), _ranking(others) if others or head == _TEXT_FORMAT else None)
    except (ValueError, TypeError, ShapeError):
        raise ConfigError(f"damaged plan {text[:80]!r}: build the layer again") from None


_OPERATIONS = {operation.value for operation in Operation}


def _candidate(words: list[str]) -> Candidate:
    operation, shape, *config = words
    return Candidate(_shape(shape), _config(config), Operation(operation))


def _ranking(rows: list[list[str]]) -> Ranking:
    """The ranking of its rows. Raises ValueError or TypeError for other rows."""
    machines: dict[str, Machine] = {}
    kernels, evidence = [], []
    for word, first, *config in rows:
        if word in ("machine", "lender") and not config:
            machines[word] = Machine(*(float(v) if "." in v else int(v) for v in first.split(",")))  # type: ignore[arg-type]
        elif word in ("own", "lent"):
            kernels.append(Ranked(_config(config), Needs(*map(int, first.split(","))), word == "lent"))
        elif word == "near":
            evidence.append(Evidence(_shape(first), _config(config)))
        else:
            raise ValueError(word)
    if "machine" not in machines:
        raise ValueError("no machine")
    return Ranking(machines["machine"], tuple(kernels), machines.get("lender"), tuple(evidence))


def _shape(text: str) -> GemmShape:
    return GemmShape(*map(int, text.split("x")))


def _config(words: list[str]) -> TileConfig:
    kernel, numbers, *schedule = words
    block_m, block_n, block_k, warps, stages, group_m, stream_k = map(int, numbers.split(","))
    [named] = map(Schedule, schedule) if schedule else [None]
    return TileConfig(block_m, block_n, block_k, warps, stages, group_m, Kernel(kernel), stream_k, named)
