"""Lookup of the tile configuration that serves a GEMM: one rule for layers, `run`, `verify`, `db` and benchmarks.

    lookup(GemmShape(4000, 12288, 4608), candidates, sms=82)  ->  Match("nearest-m", config, candidate)

The levels are tried in order. The first level that finds a configuration serves:

    exact      a candidate with the same (m, n, k)
    nearest-m  a candidate with the same (n, k): the nearest m by log distance and by waves over the multiprocessors
    nearest    a candidate of another weight: the nearest shape, by the same distance
    default    `spec.default_config`

On the second and third level a candidate's extents are within a factor of `spec.NEAR`. The order of the candidates
decides between equal distances. A new level is a `Level` in `LEVELS`.

A `Plan` holds the candidates of one weight as a text. The text passes through a torch operator and into exported
graphs. This module imports neither torch nor triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from int8kit.errors import ConfigError, ShapeError
from int8kit.spec import GemmShape, Kernel, Operation, Schedule, TileConfig, default_config, is_near, usual_schedule


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
    return request.nearest(lambda c: (c.shape.n, c.shape.k) == (wanted.n, wanted.k) and is_near(c.shape.m, wanted.m))


def _nearest(request: Request) -> Candidate | None:
    return request.nearest(lambda c: _are_near(c.shape, request.shape))


def _default(request: Request) -> TileConfig:
    return default_config(request.shape)


LEVELS = (
    Level("exact", _exact),
    Level("nearest-m", _nearest_m),
    Level("nearest", _nearest),
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
    shape: GemmShape, candidates: Sequence[Candidate], *, sms: int, operation: Operation = Operation.GEMM
) -> Match:
    """The match that serves `shape`. candidates: the preferred ones first; sms: multiprocessors of the GPU."""
    request = Request(shape, candidates, sms, operation)
    for level in LEVELS:
        one = level.find(request)
        if isinstance(one, Candidate):
            return Match(level.name, one.config, one)
        if one is not None:
            return Match(level.name, one, None)
    raise AssertionError("the last level finds a configuration for every shape")


def _are_near(a: GemmShape, b: GemmShape) -> bool:
    return all(is_near(x, y) for x, y in ((a.m, b.m), (a.n, b.n), (a.k, b.k)))


_TEXT_FORMAT = "int8kit.plan/2"


@dataclass(frozen=True)
class Plan:
    """The candidates of one weight, gathered when a model is loaded. The default serves where there are none.

    text: the plan as it passes through a torch operator: format, multiprocessors, candidates.
    """

    candidates: tuple[Candidate, ...] = ()
    sms: int = 0
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = [_row(candidate) for candidate in self.candidates]
        object.__setattr__(self, "text", ";".join([_TEXT_FORMAT, str(self.sms), *rows]))

    @classmethod
    def fixed(cls, *pairs: tuple[GemmShape, TileConfig]) -> Plan:
        """A plan of given configurations for given shapes."""
        return cls(tuple(Candidate(shape, config) for shape, config in pairs))

    def choose(self, shape: GemmShape, operation: Operation = Operation.GEMM) -> TileConfig:
        """The configuration for `shape`."""
        return lookup(shape, self.candidates, sms=self.sms, operation=operation).config

    @classmethod
    def from_text(cls, text: str) -> Plan:
        """The plan of a `text`. Raises ConfigError for a text that is not a plan of this version."""
        return _plan_of(text)


def _row(candidate: Candidate) -> str:
    c = candidate.config
    numbers = c.block_m, c.block_n, c.block_k, c.num_warps, c.num_stages, c.group_m, c.stream_k
    words = [candidate.operation.value, str(candidate.shape), c.kernel.value, ",".join(map(str, numbers))]
    if c.schedule is not None and c.schedule is not usual_schedule(c):  # left out otherwise, as in earlier texts
        words.append(c.schedule.value)
    return " ".join(words)


@lru_cache(maxsize=1024)
def _plan_of(text: str) -> Plan:
    head, *parts = text.split(";")
    if head != _TEXT_FORMAT:
        raise ConfigError(f"a plan of the format {head[:40]!r}: expected {_TEXT_FORMAT!r}; build the layer again")
    try:
        sms, *rows = parts
        return Plan(tuple(map(_candidate, rows)), int(sms))
    except (ValueError, TypeError, ShapeError):
        raise ConfigError(f"damaged plan {text[:80]!r}: build the layer again") from None


def _candidate(row: str) -> Candidate:
    operation, shape, kernel, numbers, *schedule = row.split(" ")
    block_m, block_n, block_k, warps, stages, group_m, stream_k = map(int, numbers.split(","))
    [named] = map(Schedule, schedule) if schedule else [None]
    config = TileConfig(block_m, block_n, block_k, warps, stages, group_m, Kernel(kernel), stream_k, named)
    return Candidate(GemmShape(*map(int, shape.split("x"))), config, Operation(operation))
