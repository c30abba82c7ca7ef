"""The verifier verified: every fault of `mutants.CATALOGUE` is seeded into a copy of the package and must be caught.

    copy of int8kit/ in a scratch folder --replacement--> checks in a child process (`judge`) --> Verdict
    scales-joined   killed by output, differs: "1x1x1, 16x16x32 w1 s2 g1, ...: 1 of 1 differ, first [0, 0]: got ..."

The child's working folder and PYTHONPATH are the scratch folder, and it says which copy it judges. The installation is
never written to, and compiled kernels go to a cache in the scratch folder. The unchanged copy is judged too, and must
hold: a verifier that fails sound kernels proves nothing.

A mutant is caught by a property in one of four ways: "differs", a wrong bit or a write outside the output; "crash", an
exception or the end of the process; "compile", it comes to no example or does not compile; "timeout", no example ended
for a while.

Patching the imported modules in this process was rejected: Triton reads a kernel's source from its file and keeps what
it compiled, and a fault may end or hang the process that runs it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from int8kit.errors import CheckFailed, UnknownName
from int8kit.gpus import Gpu, present
from int8kit.spec import Kernel
from int8kit.verify import executors, process_pool
from int8kit.verify.executors import Executor
from int8kit.verify.mutation.catalogue import CATALOGUE, TILES, Mutant
from int8kit.verify.properties import row_kernels

PACKAGE = Path(__file__).parent.parent.parent
PROPERTIES = ("accumulator", "output", "swiglu", "quantize", *row_kernels.KERNELS)

Ending = Literal["killed", "survived", "needs a card", "not applicable"]
How = Literal["differs", "crash", "compile", "timeout"]
_COMPILERS = ("CompilationError", "CompileTimeAssertionFailure", "UnsupportedLanguageConstruct", "SyntaxError")


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant."""

    name: str
    file: str
    fault: str
    ending: Ending
    by: str | None = None  # the property that caught it
    how: How | None = None
    evidence: str = ""  # the smallest example that shows it; or the reason why it was not run
    tried: dict[str, int] = field(default_factory=dict)  # examples of each property that was run, in order
    seconds: float = 0.0


@dataclass(frozen=True)
class _Job:
    """One child process: a mutant, or with None the unchanged copy, and what it is checked for, in order."""

    mutant: Mutant | None
    kernel: Kernel
    properties: tuple[str, ...]
    executor: Executor

    def request(self, examples: int | None, seed: int) -> str:
        """What `judge` reads. No tiles: the plain kernel's own."""
        tiles = [asdict(config) for config in TILES.get(self.kernel, ())]
        return json.dumps(
            {"executor": asdict(self.executor), "properties": self.properties, "tiles": tiles, "examples": examples,
             "seed": seed}
        )  # fmt: skip


@dataclass(frozen=True)
class _Limits:
    """How a run's children are run."""

    root: Path  # of the scratch folders
    examples: int | None
    seed: int
    jobs: int
    silence: float


def find(names: Iterable[str]) -> tuple[Mutant, ...]:
    """The mutants of these names, all without one. Raises UnknownName with the list."""
    listed = {mutant.name: mutant for mutant in CATALOGUE}
    for name in names:
        if name not in listed:
            raise UnknownName("mutant", name, listed)
    return tuple(dict.fromkeys(listed[name] for name in names)) or CATALOGUE


def run(
    mutants: Iterable[Mutant],
    gpu: Gpu,
    *,
    examples: int | None = None,
    seed: int = 0,
    jobs: int | None = None,
    silence: float = process_pool.SILENCE_S,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_verdict: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Judge `mutants` on this machine, `jobs` at a time (default: as `isolate.processes` has it), in order.

    gpu: on a newer card, Ampere's mutants run as this card's code. examples: of each property; None: as `checks.run`.
    on_step is told how many children ended, and of how many; on_verdict what became of each mutant that is run. Raises
    CheckFailed if the unchanged kernels fail, or a mutant's text is not found once. Interrupted, it ends its children
    and removes its folders.
    """
    mutants = tuple(mutants)
    for mutant in mutants:
        mutated(mutant, PACKAGE)
    found = executors.available(gpu)
    idle = {mutant.name: idle for mutant in mutants if (idle := _idle(mutant, found))}
    todo = [_job(mutant, found) for mutant in mutants if mutant.name not in idle]
    with tempfile.TemporaryDirectory(prefix="int8kit-mutate-") as root:
        limits = _Limits(Path(root).resolve(), examples, seed, jobs or process_pool.processes(found[-1]), silence)
        judged = asyncio.run(_run(todo, limits, on_step, on_verdict))
    return [idle.get(mutant.name) or judged[mutant.name] for mutant in mutants]


def score(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """{"killed", "ran", "score": killed / ran or None, "idle": {ending: count}} of a run."""
    endings = Counter(verdict.ending for verdict in verdicts)
    killed = endings.pop("killed", 0)
    ran = killed + endings.pop("survived", 0)
    return {"killed": killed, "ran": ran, "score": killed / ran if ran else None, "idle": dict(endings)}


def mutated(mutant: Mutant, package: Path) -> str:
    """The source of the mutant's file in `package`, with the fault. Raises CheckFailed unless found at one place."""
    text = (package / mutant.file).read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise CheckFailed(
            f"mutant {mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}, legal is once; "
            "bring int8kit/verify/mutation/catalogue.py up to date with the kernel"
        )
    return text.replace(mutant.old, mutant.new)


def _idle(mutant: Mutant, executors: list[Executor]) -> Verdict | None:
    """The verdict on a mutant that nothing here can execute, with the reason; or None."""
    about = mutant.name, mutant.file, mutant.fault
    if executors[-1].on == "interpreter":
        return Verdict(*about, "needs a card", evidence=mutant.needs_card) if mutant.needs_card else None
    card = present()
    if mutant.kernel is Kernel.WGMMA and card is not None and card.arch != 90:
        return Verdict(*about, "not applicable", evidence=f"the wgmma kernel runs on sm_90 only, not on {card.name}")
    return None


def _job(mutant: Mutant, executors: list[Executor]) -> _Job:
    order = dict.fromkeys((mutant.expected, *_properties(mutant.kernel)))
    return _Job(mutant, mutant.kernel, tuple(order), _executor(mutant.kernel, executors))


def _properties(kernel: Kernel) -> tuple[str, ...]:
    """Those that a kernel's faults may break: the rows' kernels are plain Triton, and only Hopper's begins early."""
    more = {Kernel.TRITON: PROPERTIES[3:], Kernel.WGMMA: ("order",)}
    return (*PROPERTIES[:3], *more.get(kernel, ()))


def _executor(kernel: Kernel, executors: list[Executor]) -> Executor:
    """Ampere's kernel as the card's code that was asked for; the others as this card's own."""
    return executors[0 if kernel is Kernel.MMA_SYNC else -1]


async def _run(
    todo: list[_Job], limits: _Limits, on_step: Callable[[int, int], None], on_verdict: Callable[[Verdict], None]
) -> dict[str, Verdict]:
    """The unchanged kernels, and all of `todo`: verdicts by the mutants' names."""
    kernels = {job.kernel: job.executor for job in todo}
    sound = [_Job(None, kernel, (name,), kernels[kernel]) for kernel in kernels for name in _properties(kernel)]
    done, total = 0, len(sound) + len(todo)
    gate = asyncio.Semaphore(limits.jobs)
    on_step(done, total)

    async def one(job: _Job) -> Verdict:
        nonlocal done
        async with gate:
            verdict = await _judge(job, limits)
        if job.mutant is None and verdict.ending != "survived":
            raise CheckFailed(
                f"the unchanged kernels fail {verdict.by} ({verdict.how}): {verdict.evidence}; "
                "faults prove nothing before `int8kit verify` holds"
            )
        if job.mutant:
            on_verdict(verdict)
        done += 1
        on_step(done, total)
        return verdict

    verdicts = await asyncio.gather(*map(one, (*sound, *todo)))
    return {verdict.name: verdict for verdict in verdicts[len(sound) :]}


async def _judge(job: _Job, limits: _Limits) -> Verdict:
    """One child, from its scratch folder to the verdict; cancelled, it ends the child and removes the folder."""
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=limits.root))
    try:
        shutil.copytree(PACKAGE, folder / "int8kit", ignore=shutil.ignore_patterns("__pycache__"))
        if job.mutant:
            (folder / "int8kit" / job.mutant.file).write_text(mutated(job.mutant, PACKAGE), encoding="utf-8")
        command = [sys.executable, "-m", "int8kit.verify.mutation.child", job.request(limits.examples, limits.seed)]
        # asyncio's own subprocess was rejected: cancelled while it starts one, it can wait for ever
        with (
            (folder / "stderr").open("w+b") as log,
            subprocess.Popen(
                command, cwd=folder, env=_environment(folder, limits.jobs), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            ) as process,
        ):  # fmt: skip
            try:
                found = await _listen(process, job, folder, limits.silence)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with a compiler that it may have started
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = (job.mutant.name, job.mutant.file, job.mutant.fault) if job.mutant else ("", "", "")
    return Verdict(*about, "killed" if found["how"] else "survived", seconds=time.monotonic() - start, **found)


def _environment(folder: Path, jobs: int) -> dict[str, str]:
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(folder / "triton"),
        "OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


async def _listen(process: subprocess.Popen[bytes], job: _Job, folder: Path, silence: float) -> dict[str, Any]:
    """A child's messages up to its end or a hang -> by, how, evidence and tried of a Verdict."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stdout
    )
    tried: dict[str, int] = {}
    example, package = "", str(folder / "int8kit")

    def caught(how: How | None, evidence: str) -> dict[str, Any]:
        by = job.properties[min(len(tried), len(job.properties) - 1)] if how else None
        return {"by": by, "how": how, "evidence": evidence, "tried": tried}

    try:
        while (line := await asyncio.wait_for(reader.readline(), silence)).endswith(b"\n"):
            message = json.loads(line)
            if message.get("package", package) != package:
                raise CheckFailed(f"the child judged {message['package']}, not its own copy; unset PYTHONSAFEPATH")
            example = message.get("example", example)
            if message.get("failure"):
                return caught(_how(message["raised"]), message["failure"])
            if "property" in message:
                tried[message["property"]] = message["examples"]
    except TimeoutError:
        return caught("timeout", f"{example}: no end in {silence:g} s".removeprefix(": "))
    finally:
        transport.close()
    if len(tried) == len(job.properties):
        return caught(None, "")
    end = _end(process.wait(), folder / "stderr")
    return caught("crash" if example else "compile", f"{example}: {end}".removeprefix(": "))


def _how(raised: str | None) -> How:
    if raised in _COMPILERS:
        return "compile"
    # hypothesis' word for an example that fails at times: a race
    return "differs" if raised is None or raised.startswith("Flaky") else "crash"


def _end(code: int, log: Path) -> str:
    """How a child ended that came to no result: by a signal, or by what it wrote last, an exception as a rule."""
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), f"exit status {code}")
