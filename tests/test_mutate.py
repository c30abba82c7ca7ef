"""verify/mutate.py, judge.py and mutants.py: the catalogue fits the kernels, and each fault's end is told."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from int8kit import gpus
from int8kit.cli import main, verify
from int8kit.errors import CheckFailed, UnknownName
from int8kit.spec import Kernel, why_illegal
from int8kit.verify import executors
from int8kit.verify.mutation import campaign
from int8kit.verify.mutation.campaign import Verdict
from int8kit.verify.mutation.catalogue import CATALOGUE, TILES, Mutant
from int8kit.verify.properties import checks

GPU = gpus.present() or gpus.get("rtx3090")
POINTER, ROWS = "kernels/gemm_triton.py", "kernels/quantize.py"
SHAM = Mutant("sham", POINTER, "# int64: M * K", "# 64 bits: M * K", "another comment", "accumulator")
BROKEN = Mutant("broken", POINTER, "import triton.language as tl", "import triton.language as", "no Python", "output")


def at_the_door(name, statement):
    """A mutant whose quantization comes to a statement of Python before anything else."""
    return Mutant(name, ROWS, "    held = k <=", f"    {statement}\n    held = k <=", statement, "quantize")


RAISES = at_the_door("raises", "raise ValueError('planted')")
ABORTS = at_the_door("aborts", "import os; os.abort()")
HANGS = at_the_door("hangs", "import time; time.sleep(9999)")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are made, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_catalogue_is_wide():
    names = [mutant.name for mutant in CATALOGUE]
    assert len(set(names)) == len(names) >= 30
    assert sum(not mutant.needs_gpu for mutant in CATALOGUE) >= 20
    assert {mutant.kernel for mutant in CATALOGUE} == set(Kernel)


@pytest.mark.parametrize("mutant", CATALOGUE, ids=lambda mutant: mutant.name)
def test_each_fault_has_one_place_in_the_present_source(mutant):
    source = campaign.mutated(mutant, campaign.PACKAGE)
    assert ast.dump(ast.parse(source)) != ast.dump(ast.parse((campaign.PACKAGE / mutant.file).read_text()))
    assert mutant.expected in campaign._properties(mutant.kernel)
    assert not mutant.fault.endswith(".")


def test_the_tiles_of_the_mutants_are_legal():
    assert set(TILES) == set(Kernel) - {Kernel.TRITON}
    for kernel, tiles in TILES.items():
        arch, memory = (90, 232448) if kernel is Kernel.WGMMA else (86, 101376)
        assert {tile.kernel for tile in tiles} == {kernel}
        assert [why_illegal(tile, arch=arch, shared_memory=memory) for tile in tiles] == [None] * len(tiles)
        assert any(tile.stream_k for tile in tiles)


def test_a_stale_catalogue_is_refused_before_any_work():
    with pytest.raises(CheckFailed, match=r"'no such text' was found 0 times in kernels/gemm_triton.py"):
        campaign.run([Mutant("stale", POINTER, "no such text", "", "", "output")], GPU)
    with pytest.raises(UnknownName, match=r"unknown mutant 'x'; known: .*scales-swapped"):
        campaign.find(["x"])
    assert campaign.find([]) == CATALOGUE


@pytest.mark.slow
@pytest.mark.process
def test_each_end_is_told_apart(scratch):
    """A wrong bit, an exception, a signal, a syntax error and a hang are caught; a sham survives every property."""
    todo = [*campaign.find(["stale-scale-row"]), RAISES, ABORTS, BROKEN, HANGS, SHAM]
    steps = []
    verdicts = campaign.run(todo, GPU, examples=5, silence=15, on_step=lambda *step: steps.append(step))
    assert [(v.name, v.ending, v.by, v.how) for v in verdicts] == [
        ("stale-scale-row", "killed", "output", "differs"), ("raises", "killed", "quantize", "crash"),
        ("aborts", "killed", "quantize", "crash"), ("broken", "killed", "output", "compile"),
        ("hangs", "killed", "quantize", "timeout"), ("sham", "survived", None, None),
    ]  # fmt: skip
    differs, raises, aborts, broken, hangs, sham = (v.evidence for v in verdicts)
    assert "differ, first [" in differs
    assert "ValueError: planted" in raises
    assert aborts.endswith("the process was ended by SIGABRT")
    assert "SyntaxError" in broken
    assert hangs.endswith("no end in 15 s")
    assert not sham
    assert list(verdicts[-1].tried) == list(campaign.PROPERTIES)
    assert min(verdicts[-1].tried.values()) >= 5
    total = len(campaign.PROPERTIES) + len(todo)  # the unchanged kernels, then these
    assert (steps[0], steps[-1]) == ((0, total), (total, total))
    assert not list(scratch.iterdir())


@pytest.mark.process
def test_faults_are_not_sought_in_unsound_kernels(monkeypatch, scratch):
    package = scratch / "installed" / "int8kit"
    shutil.copytree(campaign.PACKAGE, package)
    (package / "kernels" / "row_primitives.py").write_text("no Python")
    monkeypatch.setattr(campaign, "PACKAGE", package)
    with pytest.raises(CheckFailed, match=r"the unchanged kernels fail accumulator \(compile\): SyntaxError"):
        campaign.run([SHAM], GPU, processes=1)
    assert [path.name for path in scratch.iterdir()] == ["installed"]


@pytest.mark.process
def test_a_child_that_judges_another_copy_is_refused(monkeypatch, scratch):
    monkeypatch.setattr(
        shutil, "copytree", lambda _, to, ignore: to.mkdir(parents=True)
    )  # so that the installed one is found
    with pytest.raises(CheckFailed, match=r"the child checked .*int8kit, not its own copy"):
        campaign.run([SHAM], GPU, processes=1)
    assert not list(scratch.iterdir())


def test_what_a_machine_cannot_run_is_named(monkeypatch):
    """Not counted, neither as killed nor as survived."""
    interpreter = [executors.Executor("interpreter", "cpu", "CPU")]
    monkeypatch.setattr(executors, "available", lambda gpu: interpreter)
    todo = campaign.find(["hopper-deadlock", "fma-contraction"])
    verdicts = campaign.run(todo, GPU)
    assert [v.ending for v in verdicts] == ["needs a GPU"] * 2
    assert "interpreter" in verdicts[0].evidence
    assert campaign.score(verdicts) == {"killed": 0, "ran": 0, "score": None, "idle": {"needs a GPU": 2}}

    card = [executors.Executor("cross_arch", "cuda", "a card", "sm86"), executors.Executor("native", "cuda", "a card")]
    monkeypatch.setattr(executors, "available", lambda gpu: card)
    monkeypatch.setattr(campaign, "present", lambda: gpus.get("rtx4090"))
    [verdict] = campaign.run(campaign.find(["hopper-deadlock"]), GPU, processes=1)
    assert verdict.ending == "not applicable"
    assert "sm_90 only" in verdict.evidence
    for name, executor in (("naive-owner", card[0]), ("fma-contraction", card[1])):
        [mutant] = campaign.find([name])
        job = campaign._trial(mutant, card)
        assert job.executor == executor
        assert job.properties[0] == mutant.expected
        request = job.request(None, 0)
        assert {tile["kernel"] for tile in request["tiles"]} <= {Kernel.MMA_SYNC}
    monkeypatch.setattr(campaign, "present", lambda: gpus.get("h200"))
    assert campaign._not_runnable(campaign.find(["hopper-deadlock"])[0], card) is None


@pytest.mark.slow
def test_properties_over_given_tiles():
    """What a child runs: its kernel's configurations alone, so that no other kernel hides the fault."""
    seen = []
    executor = executors.available(GPU)[-1]
    tiles = (checks.SMALL_TILES[1],)
    result = checks.prove("output", executor, tiles, examples=5, on_example=seen.append)
    assert result.failure is None
    assert {d.config for d in seen[:5]} == set(tiles)


@pytest.mark.process
def test_the_verb_kills(monkeypatch, scratch, verb):
    """By one property: a run by all of them, of sound kernels too, is above."""
    monkeypatch.setattr(campaign, "_properties", lambda kernel: ("output",))
    out, _ = verb("verify", "--mutate", "--only", "scales-joined", "--only", "naive-owner", "--examples", "5", "--json")
    document = json.loads(out)
    killed, stream_k = document["mutants"]
    assert (killed["name"], killed["by"], killed["how"]) == ("scales-joined", "output", "differs")
    assert document["killed"] >= 1
    assert document["score"] == 1.0
    assert stream_k["ending"] == ("killed" if torch.cuda.is_available() else "needs a GPU")
    assert not list(scratch.iterdir())


def test_a_survivor_is_listed_and_fails_the_verb(monkeypatch, capfd):
    canned = [
        Verdict("a", POINTER, "fault a", "killed", "output", "differs", "1x1x1: 1 of 1 differ", {}, 1.2),
        Verdict("b", POINTER, "fault b", "killed", "output", "timeout", "no end in 9 s", {}, 9.0),
        Verdict("c", POINTER, "fault c", "survived", tried={"output": 7}, seconds=3.0),
        Verdict("d", POINTER, "fault d", "needs a GPU", evidence="PTX"),
        Verdict("e", POINTER, "fault e", "not applicable", evidence="no sm_90"),
    ]
    monkeypatch.setattr(campaign, "run", lambda *_, **__: canned)
    with pytest.raises(SystemExit) as exit_:
        main.main(["verify", "--mutate"])
    out, err = capfd.readouterr()
    assert exit_.value.code == 1
    assert "killed by output (timeout)" in out
    assert "needs a GPU: PTX" in out
    assert "2 of 3 killed (67%), 1 need a card, 1 not applicable here" in out
    assert out.endswith("survived: c (fault c); tried 7 examples of output\n")
    assert err == "int8kit: 1 of 3 faults survived: c\n"


def test_interrupted_it_tells_what_is_known(monkeypatch, capfd):
    def run(*_, on_verdict, **__):
        on_verdict(Verdict("a", POINTER, "fault a", "killed", "output", "differs", "1x1x1: 1 of 1 differ", {}, 1.2))
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "run", run)
    with pytest.raises(KeyboardInterrupt):
        verify._mutate(None, [], None, 0, as_json=False, markdown=False)
    out, err = capfd.readouterr()
    assert "fault a" in out
    assert f"1 of {len(CATALOGUE)} faults judged before this was interrupted" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--mutate", "--db", "x.json"), ["--mutate with --db", "leave"]),
        (("--mutate", "--shapes", "x.json"), ["--shapes", "leave"]),
        (("--mutate", "--examples", "0"), ["--examples 0", "1 or more"]),
        (("--mutate", "--only", "x"), ["unknown mutant 'x'", "scales-joined"]),
        (("--mutate", "--gpu", "rtx9"), ["unknown card 'rtx9'"]),
        (("--only", "scales-joined"), ["--only scales-joined", "add --mutate"]),
    ],
    ids=" ".join,
)
def test_bad_combinations_end_in_one_line(capfd, args, words):
    with pytest.raises(SystemExit) as exit_:
        main.main(["verify", *args])
    _, err = capfd.readouterr()
    assert exit_.value.code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def living_in(folder):
    """Processes whose working folder is in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += [entry] if str(entry.readlink()).startswith(f"{folder}/") else []
        except OSError:  # ended meanwhile, or not ours
            continue
    return found


@pytest.mark.process
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "int8kit", "verify", "--mutate", "--only", "stale-scale-row"], cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(scratch)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    while not living_in(scratch):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not living_in(scratch)
    assert not list(scratch.iterdir())
