"""The property runner: one property on many examples, which hypothesis draws and shrinks to the smallest failure."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import platformdirs
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from int8kit.kernels import gemm
from int8kit.verify.examples.encoding import encoded
from int8kit.verify.executors import Executor
from int8kit.verify.gpu_memory import with_memory

# hypothesis keeps the constants of this program's source there; its default is the working folder
set_hypothesis_home_dir(
    os.environ.get("HYPOTHESIS_STORAGE_DIRECTORY") or Path(platformdirs.user_cache_dir("int8kit"), "hypothesis")
)

T = TypeVar("T")
Evidence = Literal["sampled", "every input", "compiled code"]
"""The kind of proof that a property gives: drawn examples, a whole finite domain, or a reading of the code."""


@dataclass(frozen=True)
class Result:
    """The result of one property."""

    name: str
    on: str  # the executor, in words
    examples: int
    failure: str | None = None  # the smallest failing example and how it differs
    skipped: int = 0  # entries that this executor cannot run
    raised: str | None = None  # the name of the exception, if the failure is not a difference
    example: str | None = None  # the failing example, as `encoding.to_json` writes it
    reason: str | None = None  # if the property does not apply
    evidence: Evidence = "sampled"


def run_property(
    name: str,
    on: Executor,
    strategy: st.SearchStrategy[T],
    check: Callable[[T], str | None],
    *,
    examples: int,
    random_seed: int,
    always: Iterable[T] = (),
    on_example: Callable[[object], None] = lambda _: None,
) -> Result:
    """Try `check` on `examples` drawn examples and on all of `always`; the Result has the smallest failure, if any.

    A strategy that is empty, such as `hypothesis.strategies.nothing()`, draws none.
    """
    tried: list[T] = []

    def attempt(example: T) -> None:
        tried.append(example)
        on_example(example)
        if why := with_memory(lambda: check(example)):
            raise _Differs(why)

    @seed(random_seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def search(example: T) -> None:
        attempt(example)

    failure = raised = None
    try:
        if not strategy.is_empty:
            search()
        for example in always:
            attempt(example)
    except _Differs as error:
        failure = f"{tried[-1]}: {error}"
    except Exception as error:  # a kernel that does not compile or launch is a failure of the kernel, not of the run
        raised = type(error).__name__
        failure = f"{tried[-1]}: {raised}: {str(error).splitlines()[0] if str(error) else _where(error)}"
    kept = encoded(tried[-1]) if failure and tried else None
    return Result(name, str(on), len(tried), failure, raised=raised, example=kept)


class _Differs(Exception):
    """A difference. The implementation under test may raise any other exception, AssertionError too."""


def _where(error: BaseException) -> str:
    """The source line that raised an exception without a message."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{place.line} ({Path(place.filename).name}, line {place.lineno})"


@contextmanager
def forbid_fallback() -> Iterator[None]:
    """A context in which a launch that falls back to another kernel is an error, and overflows are no warnings."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # the interpreter computes in numpy, which warns about the overflows drawn on purpose
        warnings.simplefilter("error", gemm.Fallback)  # else another kernel than the named one would be tested
        yield
