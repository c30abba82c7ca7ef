"""Systems that lack something: flock fails as on NFS, or there is no fcntl, no resource and no fork, as on Windows."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from entries import GPU, entry

from int8kit import locks
from int8kit.database import store
from int8kit.errors import FileError
from int8kit.tune.journal import Journal

fcntl = pytest.importorskip("fcntl")
PLATFORMS = Path(__file__).parent / "platforms.py"
CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from entries import GPU, entry
from int8kit.database import store
from int8kit.tune.journal import Journal
from int8kit.cli.main import main
path = Path("a.json")
store.update(path, GPU, [entry(m=1)])
store.update(path, GPU, [entry(m=2)])
with Journal(path, {{"gpu": "x"}}):
    try:
        Journal(path, {{"gpu": "x"}})
    except store.FileError as error:
        print(str(error).partition(";")[0])
with Journal(path, {{"gpu": "x"}}):
    pass
main({call!r}.split())
"""


def on(platform, folder, call):
    """(exit status, lines of stdout, lines of stderr) of database writes and a verb on another platform."""
    code = CHILD.format(tests=str(Path(__file__).parent), call=call)
    done = subprocess.run([sys.executable, "-W", "error", PLATFORMS, platform, code], cwd=folder, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.process
@pytest.mark.parametrize(
    ("platform", "call", "line"),
    [
        ("no-flock", "db show --db a.json", None),
        ("no-syscall", "db show --db a.json", None),
        ("windows", "verify mutate", "int8kit: verify mutate needs os.fork, which this system lacks; run it on Linux"),
    ],
)
def test_databases_are_written_without_flock(tmp_path, platform, call, line):
    status, out, err = on(platform, tmp_path, call)
    assert out[0] == "another tuner is writing 'a.json'", err
    assert status == (2 if line else 0), err
    assert [one.startswith(line or "-") for one in err] == ([True] if line else [])
    assert [e.m for e in store.load(tmp_path / "a.json").entries] == [1, 2]
    assert not list(store.lock_of(tmp_path / "a.json").path.parent.glob("*.soft"))


@pytest.mark.process
def test_peak_memory_without_resource(tmp_path):
    code = "import torch; from int8kit.runtime import memory; print(memory.peak_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, PLATFORMS, "windows", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_lock_file_where_flock_fails(tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    path, first = tmp_path / "a.json", locks.Lock(tmp_path / "a.lock", "a.json")
    with first:
        assert (tmp_path / "a.soft").exists()
        start = time.monotonic()
        with pytest.raises(locks.Held, match=r"another process writes 'a\.json'.*if no int8kit runs, delete .*a\.soft"):
            locks.Lock(tmp_path / "a.lock", "a.json", timeout=0.1).acquire()
        assert time.monotonic() - start < 5
    assert not (tmp_path / "a.soft").exists()
    with first:  # again, after it was given back
        pass
    with Journal(path, {"gpu": "x"}), pytest.raises(FileError, match=r"another tuner is writing.*if no int8kit runs"):
        Journal(path, {"gpu": "x"})
    store.update(path, GPU, [entry()])
    assert len(json.loads(path.read_text())["entries"]) == 1


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EACCES + 1000, "strange")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(FileError, match=r"cannot lock .*a\.lock' \(strange\); set XDG_CACHE_HOME"):
        locks.Lock(tmp_path / "a.lock", "a.json").acquire()


def test_a_held_lock_without_a_lock_file_names_none(tmp_path):
    with locks.Lock(tmp_path / "a.lock", "a.json"), pytest.raises(locks.Held, match=r"and try again$"):
        locks.Lock(tmp_path / "a.lock", "a.json", timeout=0).acquire()
