"""A test of the verifier: each fault of the catalogue is seeded into a copy of the package, and verification must fail.

    copy of int8kit/ in a scratch folder --replacement--> properties in a child process --> Verdict
    scales-joined   killed by output, differs: "1x1x1, 16x16x32 w1 s2 g1, ...: 1 of 1 differ, first [0, 0]: got ..."

The child's working folder and PYTHONPATH are the scratch folder, and it reports which copy it checks. The installation
is never written to, and compiled kernels go to a cache in the scratch folder. The unchanged copy is checked too and
must pass: a verifier that fails sound kernels proves nothing.

A property catches a fault in one of four ways:

    differs    a wrong bit, or a write outside the output
    crash      an exception, or the end of the process
    compile    no example was reached, or the kernel does not compile
    timeout    no example ended for the silence limit

Patching the imported modules in this process was rejected. Triton reads a kernel's source from its file and keeps
compiled kernels. A fault may also end or hang the process that runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from int8kit.errors import CheckFailed
from int8kit.gpus import Gpu, present
from int8kit.spec import Kernel
from int8kit.verify import executors, process_pool, property_runs
from int8kit.verify.executors import Executor
from int8kit.verify.mutation import child
from int8kit.verify.mutation.mutant import TILES, Mutant
from int8kit.verify.process_pool import Call, Ending, Place
from int8kit.verify.properties import registry

PACKAGE = Path(__file__).parent.parent.parent

Fate = Literal["killed", "survived", "needs a GPU", "not applicable"]
How = Literal["differs", "crash", "compile", "timeout"]
_COMPILERS = ("CompilationError", "CompileTimeAssertionFailure", "UnsupportedLanguageConstruct", "SyntaxError")


@dataclass(frozen=True)
class Verdict:
    """The result for one mutant."""

    name: str
    file: str
    fault: str
    ending: Fate
    by: str | None = None  # the property that caught it
    how: How | None = None
    evidence: str = ""  # the smallest example that shows it; or the reason why it was not run
    tried: dict[str, int] = field(default_factory=dict)  # examples of each property that passed, in order
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """The work of one child: a mutant, or with None the unchanged copy, and the properties to check, in order."""

    mutant: Mutant | None
    kernel: Kernel
    properties: tuple[str, ...]
    executor: Executor

    def request(self, examples: int | None, seed: int) -> dict[str, Any]:
        """The argument of `child.check`. Faults outside the Gluon kernels have no tiles."""
        tiles = [json.loads(json.dumps(asdict(config))) for config in TILES.get(self.kernel, ())]
        return {"executor": asdict(self.executor), "properties": self.properties, "tiles": tiles,
                "examples": examples, "seed": seed}  # fmt: skip


def run(
    mutants: Iterable[Mutant],
    gpu: Gpu,
    *,
    examples: int | None = None,
    seed: int = 0,
    processes: int | None = None,
    silence: float | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Try `mutants` on this machine, `processes` at a time, and return their verdicts in order.

    gpu: on a newer GPU, the mutants of the mma.sync kernel run as this GPU's code. examples: of each property, by
    default the number in its budget. on_step is given the number of children that ended and the number of all.
    on_verdict is given the verdict of each mutant that is run. Raises CheckFailed if the unchanged kernels fail, or if
    a mutant's text is not found exactly once. Interrupted, it ends its children and removes its folders.
    """
    mutants = tuple(mutants)
    for mutant in mutants:
        mutated(mutant, PACKAGE)
    found = executors.available(gpu)
    not_run = {mutant.name: verdict for mutant in mutants if (verdict := _not_runnable(mutant, found))}
    seeded = [_trial(mutant, found) for mutant in mutants if mutant.name not in not_run]
    sound = list(dict.fromkeys(replace(t, mutant=None, properties=(name,)) for t in seeded for name in t.properties))
    trials, verdicts = [*sound, *seeded], dict(not_run)

    def on_ending(index: int, ending: Ending) -> None:
        verdict, mutant = _verdict(trials[index], ending), trials[index].mutant
        if mutant:
            verdicts[mutant.name] = verdict
            on_verdict(verdict)
        elif verdict.ending != "survived":
            raise CheckFailed(
                f"the unchanged kernels fail {verdict.by} ({verdict.how}): {verdict.evidence}; "
                "faults prove nothing before `int8kit verify` passes"
            )
        ended.append(index)
        on_step(len(ended), len(trials))

    ended: list[int] = []
    on_step(0, len(trials))
    with tempfile.TemporaryDirectory(prefix="int8kit-mutate-") as root:
        folders = [Path(root).resolve() / str(index) for index in range(len(trials))]
        process_pool.run_all(
            [Call(child.check, trial.request(examples, seed)) for trial in trials],
            processes=processes or property_runs.process_count(found[-1]),
            open_place=lambda index: _copy(trials[index].mutant, folders[index]),
            silence=silence,
            on_report=lambda index, report: _check_copy(report, folders[index]),
            on_ending=on_ending,
        )
    return [verdicts[mutant.name] for mutant in mutants]


def score(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """{"killed", "ran", "score": killed / ran or None, "idle": {ending: count}} of a run."""
    endings = Counter(verdict.ending for verdict in verdicts)
    killed = endings.pop("killed", 0)
    ran = killed + endings.pop("survived", 0)
    return {"killed": killed, "ran": ran, "score": killed / ran if ran else None, "idle": dict(endings)}


def mutated(mutant: Mutant, package: Path) -> str:
    """The source of the mutant's file in `package`, with the fault. Raises CheckFailed unless found at one place."""
    text = (package / mutant.file).read_text(encoding="utf-8")
    for old, new in mutant.edits:
        if (count := text.count(old)) != 1:
            raise CheckFailed(
                f"mutant {mutant.name}: {old!r} was found {count} times in {mutant.file}, expected once; "
                "bring the catalogue in int8kit/verify/mutation up to date with the kernel"
            )
        text = text.replace(old, new)
    return text


def _not_runnable(mutant: Mutant, executors: list[Executor]) -> Verdict | None:
    """The verdict on a mutant that nothing here can execute, with the reason; or None."""
    about = mutant.name, mutant.file, mutant.fault
    if executors[-1].on == "interpreter":
        runs = not mutant.needs_gpu or _shown_here(mutant, executors[-1])
        return None if runs else Verdict(*about, "needs a GPU", evidence=mutant.needs_gpu)
    gpu = present()
    if mutant.kernel is Kernel.WGMMA and gpu is not None and gpu.arch != 90:
        return Verdict(*about, "not applicable", evidence=f"the wgmma kernel runs on sm_90 only, not on {gpu.name}")
    return None


def _shown_here(mutant: Mutant, executor: Executor) -> bool:
    """Whether a property that runs no Gluon kernel should catch the fault: `fallback`, or a proof."""
    proof = registry.PROOFS.get(mutant.expected)
    return mutant.expected == "fallback" or (proof is not None and proof.why_not(executor) is None)


def _trial(mutant: Mutant, executors: list[Executor]) -> Trial:
    """The mma.sync kernel runs as code of the GPU that was asked for; the others as code of the present GPU."""
    if executors[-1].on == "interpreter" and mutant.needs_gpu:
        return Trial(mutant, mutant.kernel, (mutant.expected,), executors[-1])
    names = registry.of_mutants(mutant.kernel)
    order = sorted(names, key=lambda name: name != mutant.expected)
    return Trial(mutant, mutant.kernel, tuple(order), executors[0 if mutant.kernel is Kernel.MMA_SYNC else -1])


@contextmanager
def _copy(mutant: Mutant | None, folder: Path) -> Iterator[Place]:
    """The place of a child that imports a copy of the package with the fault."""
    try:
        shutil.copytree(PACKAGE, folder / "int8kit", ignore=shutil.ignore_patterns("__pycache__"))
        if mutant:
            (folder / "int8kit" / mutant.file).write_text(mutated(mutant, PACKAGE), encoding="utf-8")
        path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        cache = {"TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONDONTWRITEBYTECODE": "1"}
        yield Place(folder=folder, path=path, environment=cache)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_copy(report: dict[str, Any], folder: Path) -> None:
    if report.get("package", (package := str(folder / "int8kit"))) != package:
        raise CheckFailed(f"the child checked {report['package']}, not its own copy {package}; see PYTHONPATH")


def _verdict(trial: Trial, ending: Ending) -> Verdict:
    """The verdict that a child's reports and its ending give."""
    about = (trial.mutant.name, trial.mutant.file, trial.mutant.fault) if trial.mutant else ("", "", "")
    tried: dict[str, int] = {}
    example, failure = "", ""
    how: How | None = None
    for report in ending.reports:
        example = report.get("example", example)
        if report.get("failure"):
            failure, how = report["failure"], how_of(report["raised"])
        elif "property" in report:
            tried[report["property"]] = report["examples"]
    if not failure and ending.kind != "done":
        how = "timeout" if ending.kind == "silent" else "crash" if example else "compile"
        reasons = {"silent": f"no end in {ending.detail}", "signal": f"the process was ended by {ending.detail}"}
        failure = f"{example}: {reasons.get(ending.kind, ending.detail)}".removeprefix(": ")
    by = trial.properties[min(len(tried), len(trial.properties) - 1)] if how else None
    return Verdict(*about, "killed" if how else "survived", by, how, failure, tried, ending.seconds)


def how_of(raised: str | None) -> How:
    """The way in which a property caught a fault. raised: the name of the exception, if any."""
    if raised in _COMPILERS:
        return "compile"
    # hypothesis' word for an example that fails at times: a race
    return "differs" if raised is None or raised.startswith("Flaky") else "crash"
