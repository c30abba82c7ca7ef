"""A run of generated mutants: each in a copy of the package, in a forked child, up to the first property that fails.

    run(generate.sample(300, 0), gpu, journal)  ->  [GeneratedVerdict(...), ...] in the order of the mutants

The unchanged copy is checked too and must pass. A survivor in device code is compiled and compared with the original,
see `equivalence`. Copies share the cache of compiled kernels, whose keys hold the source. A mutant of a constant has
its own cache, because a key may lack it.
"""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from int8kit.errors import CheckFailed
from int8kit.gpus import Gpu, present
from int8kit.spec import Kernel
from int8kit.verify import executors, process_pool, property_runs
from int8kit.verify.executors import Executor
from int8kit.verify.mutation import attempt, equivalence, generate, reach, triage
from int8kit.verify.mutation.campaign import how_of
from int8kit.verify.mutation.fork_server import ForkServer
from int8kit.verify.mutation.generate import GeneratedMutant
from int8kit.verify.mutation.mutant import TILES
from int8kit.verify.mutation.verdict import GeneratedVerdict
from int8kit.verify.mutation.verdict_journal import VerdictJournal
from int8kit.verify.process_pool import Call, Ending, Place
from int8kit.verify.verify_kernels import DEFAULT_TILES

SILENCE_S = 90.0  # the largest example in the interpreter takes a tenth
OnStep = Callable[[int, int], None]


def identity(gpu: Gpu) -> dict[str, Any]:
    """All that makes the verdicts of two runs comparable: the package's source, the executors, Triton."""
    import triton

    files = sorted(generate.PACKAGE.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    return {"source": digest, "on": [str(one) for one in executors.available(gpu)], "triton": triton.__version__}


@dataclass(frozen=True)
class Trial:
    """The work of one child. mutant: None for the unchanged copy."""

    mutant: GeneratedMutant | None
    file: str
    properties: tuple[str, ...]
    executor: Executor

    def request(self) -> dict[str, Any]:
        """The argument of `attempt.attempt`."""
        arch = self.executor.code or 0
        wanted = reach.kernels_of(self.file) if self.mutant else tuple(Kernel)
        kernels = [k for k in wanted if k is not Kernel.WGMMA or arch == 90]
        tiles = [tile for kernel in kernels for tile in TILES.get(kernel, DEFAULT_TILES) if self.executor.runs(tile)]
        rows = [json.loads(json.dumps(asdict(tile))) for tile in tiles]
        return {"executor": asdict(self.executor), "properties": self.properties, "tiles": rows, "seed": 0}

    @property
    def key(self) -> str:
        """The name of a trial of the unchanged copy in the journal."""
        return json.dumps([self.properties, self.request()["tiles"], str(self.executor)])


def run(
    mutants: Sequence[GeneratedMutant],
    gpu: Gpu,
    journal: VerdictJournal | None = None,
    *,
    sound: bool = True,
    processes: int | None = None,
    silence: float = SILENCE_S,
    on_step: OnStep = lambda done, total: None,
    on_verdict: Callable[[GeneratedVerdict], None] = lambda verdict: None,
) -> list[GeneratedVerdict]:
    """Try `mutants` on this machine, `processes` at a time, and return their verdicts in order.

    journal: verdicts in it are taken over, and new ones are appended. sound: the unchanged copy must pass first.
    on_verdict: is given the verdict of each mutant that is run, and of a survivor again once its code was compared.
    Raises CheckFailed if the unchanged kernels fail. Interrupted, it ends its children and removes its folders.
    """
    campaign = _Campaign(mutants, executors.available(gpu), journal, on_step, on_verdict)
    campaign.processes = processes or property_runs.process_count(campaign.executors[-1])
    with tempfile.TemporaryDirectory(prefix="int8kit-mutate-") as root, campaign.copies(Path(root).resolve()):
        campaign.try_properties(silence, sound)
        campaign.compare_survivors(silence)
    return [campaign.verdicts[mutant.name] for mutant in mutants]


class _Campaign:
    """The state of one run."""

    def __init__(
        self, mutants: Sequence[GeneratedMutant], found: list[Executor], journal: VerdictJournal | None,
        on_step: OnStep, on_verdict: Callable[[GeneratedVerdict], None],
    ) -> None:  # fmt: skip
        self.mutants, self.executors, self.journal = mutants, found, journal
        self.on_step, self.on_verdict = on_step, on_verdict
        self.processes = 1
        self.verdicts: dict[str, GeneratedVerdict] = {}
        known = journal.verdicts if journal else {}
        for mutant in mutants:
            if (idle := self._not_run(mutant)) is not None:
                self.verdicts[mutant.name] = idle
            elif mutant.name in known:
                self.verdicts[mutant.name] = known[mutant.name]
                on_verdict(known[mutant.name])

    @contextmanager
    def copies(self, root: Path) -> Iterator[None]:
        """The template of the copies, with its bytecode, and the folders of the run."""
        self.root, self.template = root, root / "template"
        shutil.copytree(generate.PACKAGE, self.template / "int8kit", ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(self.template, quiet=2)
        yield

    def try_properties(self, silence: float, sound: bool) -> None:
        """Run every mutant without a verdict, after the unchanged copy."""
        open_ones = [mutant for mutant in self.mutants if mutant.name not in self.verdicts]
        seeded = [Trial(m, m.file, reach.properties_of(m.file), self._executor(m)) for m in open_ones]
        trials = [*(self._sound(seeded) if sound else ()), *seeded]
        passed, ended = len(self.mutants) - len(open_ones), list[int]()
        self.on_step(passed, passed + len(trials))

        def on_ending(index: int, ending: Ending) -> None:
            self._conclude(trials[index], ending)
            ended.append(index)
            self.on_step(passed + len(ended), passed + len(trials))

        if trials:
            interpret = {"TRITON_INTERPRET": "1"} if self.executors[-1].on == "interpreter" else {}
            with ForkServer(interpret) as server:
                process_pool.run_all(
                    [Call(attempt.attempt, trial.request()) for trial in trials],
                    processes=self.processes,
                    open_place=lambda index: self._copy(trials[index].mutant, server, interpret),
                    silence=silence,
                    on_ending=on_ending,
                )

    def compare_survivors(self, silence: float, most: int | None = None) -> None:
        """Compile the survivors in device code and the original, and find the equivalent mutants.

        most: variants of each kernel that are compiled; all by default.
        """
        left = [
            m for m in self.mutants
            if (v := self.verdicts[m.name]).ending == "survived" and m.device and not v.compared
        ]  # fmt: skip
        if not left:
            return
        archs = sorted({86, *(executor.code or 86 for executor in self.executors)})
        groups = sorted({equivalence.groups_of(m.stem) for m in left})
        work: list[tuple[GeneratedMutant | None, tuple[str, ...]]] = [(None, group) for group in groups]
        work += [(m, equivalence.groups_of(m.stem)) for m in left]
        environment = {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1", "CUDA_VISIBLE_DEVICES": ""}
        with ForkServer(environment) as server:
            endings = process_pool.run_all(
                [Call(equivalence.digests, {"groups": group, "archs": archs, "most": most}) for _, group in work],
                processes=self.processes,
                open_place=lambda index: self._copy(work[index][0], server, environment),
                silence=silence,
            )
        compiled = [next((r["digests"] for r in ending.reports if "digests" in r), None) for ending in endings]
        original = {group: digests for (mutant, group), digests in zip(work, compiled, strict=True) if mutant is None}
        for (mutant, group), digests in zip(work, compiled, strict=True):
            if mutant is not None:
                self._compared(mutant, digests is not None and digests == original[group])

    def _compared(self, mutant: GeneratedMutant, same: bool) -> None:
        found = replace(self.verdicts[mutant.name], compared=True)
        if same:
            found = replace(found, ending="equivalent", evidence="every variant compiles to the same PTX")
        self._record(found)

    def _executor(self, mutant: GeneratedMutant) -> Executor:
        """The mma.sync kernel runs as code of the GPU that was asked for; the others as code of the present GPU."""
        return self.executors[0 if reach.kernels_of(mutant.file) == (Kernel.MMA_SYNC,) else -1]

    def _sound(self, seeded: list[Trial]) -> list[Trial]:
        """The trials of the unchanged copy that no earlier run has passed: one for each property and set of tiles."""
        found: dict[str, Trial] = {}
        for trial in seeded:
            for name in trial.properties:
                one = replace(trial, mutant=None, properties=(name,))
                found[one.key] = one
        known = self.journal.sound if self.journal else set()
        return [trial for key, trial in found.items() if key not in known]

    def _not_run(self, mutant: GeneratedMutant) -> GeneratedVerdict | None:
        """The verdict on a mutant that is not run, with the reason; or None."""
        if (why := triage.reason(mutant)) is not None:
            return _verdict(mutant, "triaged", evidence=why)
        if self.executors[-1].on == "interpreter":
            why = "no CPU executes this line"
            return _verdict(mutant, "needs a GPU", evidence=why) if mutant.gpu_alone else None
        if mutant.interpreter_alone:
            return _verdict(mutant, "not applicable", evidence="only Triton's interpreter executes this line")
        gpu = present()
        if reach.kernels_of(mutant.file) == (Kernel.WGMMA,) and gpu is not None and gpu.arch != 90:
            return _verdict(
                mutant, "not applicable", evidence=f"the wgmma kernel runs on sm_90 only, not on {gpu.name}"
            )
        return None

    def _conclude(self, trial: Trial, ending: Ending) -> None:
        """Record what a child's reports and its ending say."""
        for report in ending.reports:
            if "package" in report and not report["package"].startswith(str(self.root)):
                raise CheckFailed(f"the child checked {report['package']}, not its own copy; see PYTHONPATH")
        result = next((r for r in ending.reports if "tried" in r), None)
        last: dict[str, str] = next((r for r in reversed(ending.reports) if "example" in r), {})
        if result is None:
            how = "timeout" if ending.kind == "silent" else "crash" if last else "compile"
            reasons = {"silent": f"no end in {ending.detail}", "signal": f"the process was ended by {ending.detail}"}
            why = f"{last.get('example', '')}: {reasons.get(ending.kind, ending.detail)}".removeprefix(": ")
            result = {"failure": why, "by": last.get("property", trial.properties[0]), "tried": {}}
        else:
            how = how_of(result["raised"]) if result["failure"] else ""
        if trial.mutant is None:
            if result["failure"]:
                raise CheckFailed(
                    f"the unchanged kernels fail {result['by']} ({how}): {result['failure']}; "
                    "faults prove nothing before `int8kit verify` passes"
                )
            if self.journal:
                self.journal.add_sound(trial.key)
            return
        self._record(
            _verdict(
                trial.mutant,
                "killed" if result["failure"] else "survived",
                by=result["by"],
                how=how or None,
                evidence=result["failure"] or "",
                tried=result["tried"],
                seconds=round(ending.seconds, 1),
            )
        )

    def _record(self, verdict: GeneratedVerdict) -> None:
        self.verdicts[verdict.name] = verdict
        if self.journal:
            self.journal.add(verdict)
        self.on_verdict(verdict)

    @contextmanager
    def _copy(self, mutant: GeneratedMutant | None, server: ForkServer, environment: dict[str, str]) -> Iterator[Place]:
        """The place of a child that imports a copy of the package with the fault."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        shared = self.root / "triton"
        try:
            shutil.copytree(self.template, folder, dirs_exist_ok=True)
            if mutant:
                path = folder / "int8kit" / mutant.file
                path.write_text(mutant.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
                for old in path.parent.glob(f"__pycache__/{path.stem}.*"):
                    old.unlink()
                if mutant.function == mutant.function.upper():  # a constant of the module
                    shared = folder / "triton"
            path_of_child = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
            cache = {"TRITON_CACHE_DIR": str(shared), "PYTHONDONTWRITEBYTECODE": "1"}
            yield Place(server.command, folder, path_of_child, {**cache, **environment})
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _verdict(mutant: GeneratedMutant, ending: str, **more: Any) -> GeneratedVerdict:
    before, after = mutant.diff(generate.read(mutant.file))
    return GeneratedVerdict(mutant.name, mutant.file, mutant.line, mutant.rule, before, after, ending, **more)
