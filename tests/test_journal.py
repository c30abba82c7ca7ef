"""tune/journal.py and tune/session.py: the finished steps of a killed run, and how the next run resumes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import filelock
import pytest

from int8kit import gpus
from int8kit.database import store
from int8kit.database.schema import Entry, Resources
from int8kit.errors import FileError
from int8kit.spec import GemmShape, Kernel, Operation, Source, SwigluShape, TileConfig
from int8kit.timing.interleave import Times
from int8kit.tune.journal import Journal
from int8kit.tune.search import ShapeHistory
from int8kit.tune.space import KernelVariant

RTX3090 = gpus.get("rtx3090")
RUN = {"gpu": "rtx3090", "policy": 3}
A, B = TileConfig(64, 64, 64, 4, 3), TileConfig(128, 128, 64, 4, 3, kernel=Kernel.MMA_SYNC, stream_k=2)
FREE = Resources(registers=128, spill_bytes=0, shared_bytes=49152)
SHAPE = GemmShape(4296, 4608, 4608)
ENTRY = Entry(
    m=4296,
    n=4608,
    k=4608,
    source=Source.PROXY,
    config=B,
    triton="3.6.0",
    kernel="k",
    resources=FREE,
    tried=3,
    time_us=9,
)

GATED = SwigluShape(SHAPE.m, SHAPE.n, SHAPE.k)
GATED_ENTRY = ENTRY.model_copy(update={"operation": Operation.SWIGLU})


@pytest.fixture
def database(tmp_path):
    return tmp_path / "t.json"


def write(database, run=RUN):
    """The journal of a run that was killed."""
    with Journal(database, run) as journal:
        journal.add_compiled(KernelVariant(A, True), FREE)
        journal.add_compiled(KernelVariant(B), "crash: the compiler ended its process")
        journal.add_compiled(KernelVariant(B, swiglu=True), FREE)
        journal.add_rejected(SHAPE, A, "wrong: is not bit-equal")
        journal.add_timed(SHAPE, 0, {B: Times(1.5, 2.0, 2.5), A: Times(3, 4, 5)})
        journal.add_timed(SHAPE, None, {B: Times(1.5, 2.0, 2.5)})
        journal.add_timed(GATED, 0, {B: Times(2.5, 3.0, 3.5)})
        journal.add_chosen(ENTRY)
        journal.add_chosen(GATED_ENTRY)
    return journal.path


def held(journal):
    return journal.compiled, journal.rejected, journal.histories, journal.chosen


ALL = (
    {
        KernelVariant(A, True): FREE,
        KernelVariant(B): "crash: the compiler ended its process",
        KernelVariant(B, swiglu=True): FREE,
    },
    {(SHAPE, A): "wrong: is not bit-equal"},
    {
        SHAPE: ShapeHistory(
            SHAPE,
            [{B: Times(1.5, 2.0, 2.5), A: Times(3, 4, 5)}],
            {B: Times(1.5, 2.0, 2.5)},
            {A: "wrong: is not bit-equal"},
        ),
        GATED: ShapeHistory(GATED, [{B: Times(2.5, 3.0, 3.5)}]),
    },
    {SHAPE: ENTRY, GATED: GATED_ENTRY},
)


def lines_of(journal):
    rounds = sum(len(h.rounds) + (h.sustained is not None) for h in journal.histories.values())
    return len(journal.compiled) + len(journal.rejected) + len(journal.chosen) + rounds


def test_a_journal_replays_every_step(database):
    write(database)
    with Journal(database, RUN) as journal:
        assert held(journal) == ALL
        journal.finish()
    assert not journal.path.exists()
    with Journal(database, RUN) as journal:
        assert held(journal) == ({}, {}, {}, {})


@pytest.mark.parametrize("run", [{**RUN, "policy": 5}, {**RUN, "gpu": "h200"}, {}])
def test_the_journal_of_another_run_is_replaced(database, run):
    write(database)
    with Journal(database, run) as journal:
        assert held(journal) == ({}, {}, {}, {})
    with Journal(database, run) as journal:  # and is itself a journal
        assert held(journal) == ({}, {}, {}, {})


def test_a_truncated_journal_loses_at_most_the_last_line(database):
    path = write(database)
    whole = path.read_bytes()
    lines = whole.count(b"\n")
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with Journal(database, RUN) as journal:
            done = lines_of(journal)
            assert done == max(whole[:size].count(b"\n") - 1, 0)
            journal.add_compiled(KernelVariant(A, False), FREE)  # a new line, not the rest of the incomplete one
        with Journal(database, RUN) as journal:
            assert lines_of(journal) == done + 1
    assert lines == 10


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"compiled": {}}',
        b'{"chosen": {"m": 0}}',
        b'{"a": 1, "b": 2}',
        b"\xff",
        b'{"timed": {"m": 1, "n": 1, "k": 1, "round": 3, "times": []}}',
    ],
)
def test_damage_in_the_middle_is_one_clear_error(database, line):
    path = write(database)
    lines = path.read_bytes().split(b"\n")
    lines[2] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(FileError, match="is damaged in line 3; delete it to start the run again, the database stays"):
        Journal(database, RUN)
    path.unlink()
    Journal(database, RUN).__exit__(None, None, None)  # the refused journal has released its lock


def test_a_journal_of_an_earlier_version_resumes(database):
    """Earlier versions wrote "even_k" for every kernel, and so compiled a Gluon kernel twice."""
    rows = [
        {"format": "int8kit.journal/2", "run": RUN},
        *(
            {"compiled": {"config": asdict(c), "even_k": even, "resources": FREE.model_dump()}}
            for c in (A, B) for even in (True, False)
        ),
    ]  # fmt: skip
    path = database.with_name("t.json.journal")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Journal(database, RUN) as journal:
        assert journal.compiled == {KernelVariant(A, True): FREE, KernelVariant(A, False): FREE, KernelVariant(B): FREE}


def test_a_second_tuner_is_refused_while_the_first_lives(database):
    with Journal(database, RUN), pytest.raises(FileError, match=r"another tuner is writing .*t\.json'; wait for it"):
        Journal(database, RUN)
    with Journal(database, RUN):
        pass


CHILD = """
import sys, time
from pathlib import Path
from int8kit import gpus
from int8kit.database.schema import Resources
from int8kit.spec import GemmShape
from int8kit.tune import session

class Pool:
    def drive(self, programs):
        (program,) = programs
        results = None
        while True:
            try:
                batch = program.send(results)
            except StopIteration as end:
                return [end.value]
            results = {}
            for call in batch.calls:
                time.sleep(0.004)
                batch.on_result(call, Resources(registers=128, spill_bytes=0, shared_bytes=49152))

shapes = [GemmShape(m, 4608, 4608) for m in range(64, 1600, 64)]
(result,) = session.tune(shapes, session.targets_of([gpus.get("rtx3090")], [], Path(sys.argv[1])), Pool(), note=print)
print("done", len(result.entries))
"""


@pytest.mark.process
def test_resume_after_random_kills_gives_the_same_database(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}

    def start(name):
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / name)], env=environment, text=True, stdout=subprocess.PIPE
        )

    out, _ = start("straight.json").communicate(timeout=120)
    assert out == "done 24\n"
    times = random.Random(0)
    kills = 0
    while kills < 40:
        process = start("killed.json")
        journal = tmp_path / "killed.json.journal"
        size = journal.stat().st_size if journal.exists() else 0
        deadline = time.monotonic() + 60
        while (
            process.poll() is None and time.monotonic() < deadline
        ):  # wait for progress, then kill it at a random moment
            time.sleep(times.uniform(0.05, 0.25))
            if journal.exists() and journal.stat().st_size > size:
                process.send_signal(signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        kills += 1
        if (tmp_path / "killed.json").exists():
            store.load(tmp_path / "killed.json")  # complete at every moment
    assert 2 <= kills < 40
    assert "resuming an interrupted run" in out
    assert (tmp_path / "killed.json").read_text() == (tmp_path / "straight.json").read_text()
    assert not journal.exists()
    assert json.loads((tmp_path / "killed.json").read_text())["format"] == "int8kit.tuning/2"


@pytest.mark.parametrize(("make", "kind"), [(Path.mkdir, "folder"), (os.mkfifo, "FIFO")])
def test_a_journal_that_is_no_file_is_refused(database, make, kind):
    make(path := database.with_name("t.json.journal"))
    with pytest.raises(FileError, match=f"journal': it is a {kind}; remove it, or name another --output"):
        Journal(database, RUN)
    assert path.exists()


def test_a_check_before_the_run_writes_nothing(database):
    for _ in range(2):  # its lock is free again
        Journal(database, RUN).close()
    assert not database.with_name("t.json.journal").exists()
    text = write(database).read_text()
    Journal(database, {**RUN, "policy": 4}).close()
    assert database.with_name("t.json.journal").read_text() == text


def test_a_lock_that_cannot_be_taken_is_one_line(database, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(FileError, match=r"cannot lock .*Permission denied.*; set XDG_CACHE_HOME"):
        Journal(database, RUN)
