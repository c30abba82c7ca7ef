"""Progress and results of the verbs: lines where stderr is no terminal, and a stdout that is full or closed."""

import errno
import io
import json
import os
import pty
import shlex
import subprocess
import sys
import warnings

import pytest

from int8kit.cli import terminal
from int8kit.errors import FileError
from int8kit.kernels.gemm import Fallback


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_line_at_most_every_30_seconds(clock):
    lines = []
    bars = terminal.LineProgress(lines.append, clock)
    task = bars.add_task("tuning", total=48)
    for second in range(200):
        clock.now = second
        bars.advance(task, 0.25)
    times = ("30 s", "1 min", "1 min 30 s", "2 min", "2 min 30 s", "3 min")
    assert lines == [f"tuning {7.75 + 7.5 * at:g} of 48, {time}" for at, time in enumerate(times)]


def test_a_line_comes_while_one_step_takes_long(clock):
    lines = []
    bars = terminal.LineProgress(lines.append, clock)
    loading = bars.add_task("loading a model", total=1)
    for clock.now in (29.9, 30, 59, 61, 3900):
        bars.look()
    assert lines == ["loading a model, 30 s", "loading a model, 1 min 1 s", "loading a model, 1 h 5 min"]
    bars.remove_task(loading)
    clock.now = 8000
    bars.look()
    assert len(lines) == 3


def test_several_tasks_share_a_line(clock):
    lines = []
    bars = terminal.LineProgress(lines.append, clock)
    first, second = bars.add_task("a", total=3), bars.add_task("b")
    bars.update(first, completed=1)
    bars.update(second, completed=5)
    clock.now = 31
    bars.update(second, total=9)
    assert lines == ["a 1 of 3, 31 s; b 5 of 9, 31 s"]


def test_a_stage_ends_after_its_steps(monkeypatch, clock):
    made = []

    class Lines(terminal.LineProgress):
        def __init__(self, write):
            super().__init__(made.append, clock)

    monkeypatch.setattr(terminal, "LineProgress", Lines)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with terminal.stages() as stage:
        step = stage("compiling", 2)
        step()
        other = stage("timing", 1)
        clock.now = 40
        step()  # which ends it
        assert made == ["compiling 2 of 2, 40 s; timing, 40 s"]
        clock.now = 80
        other()
        stage("choosing", 1)
    assert made[1:] == ["timing, 1 min 20 s"]


def test_a_bar_leaves_nothing_behind():
    """In a terminal of its own: what it wrote last, it erased, and nothing is on the screen before the result."""
    controller, end = pty.openpty()
    code = (
        "from int8kit.cli import terminal\n"
        "with terminal.progress('tuning') as (bar, task):\n"
        "    bar.update(task, total=3)\n    bar.advance(task)\n    bar.refresh()\n"
        "terminal.note('a [red] note')"
    )
    environment = {**os.environ, "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=end, stderr=end, check=True, env=environment)
    os.close(end)
    text = os.read(controller, 1 << 16).decode()
    assert "tuning" in text
    before, _, after = text.rpartition("\x1b[2K")  # erases the line
    assert "tuning" not in after
    assert before.count("\n") == before.count("\x1b[1A")  # as many lines up as down
    assert "int8kit: a [red] note" in after


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_stderr_that_is_full_or_closed_ends_no_work(monkeypatch, capsys):
    for stream in (Full(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.note("a note")
        with terminal.progress("working") as (bar, task):
            bar.advance(task)
        assert not terminal._is_terminal()
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_a_document_goes_to_a_file_and_is_ours(tmp_path, capsys):
    path = tmp_path / "out" / "a.json"
    terminal.check_output(path)
    terminal.show({"a": 1}, "table", False, path)
    out, err = capsys.readouterr()
    assert (out, err) == ("table\n", f"int8kit: wrote {path}\n")
    assert json.loads(path.read_text()) == {"format": terminal.RESULT_FORMAT, "a": 1}
    terminal.check_output(path)  # written again without --force
    path.write_text("{}")
    with pytest.raises(FileError, match="was not written by int8kit"):
        terminal.check_output(path)
    terminal.show({"a": 1}, "table", False, terminal.STDOUT)
    assert json.loads(capsys.readouterr().out)["a"] == 1


def test_warnings_of_other_libraries_are_silent_and_ours_are_notes(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        terminal.quiet()
        warnings.warn("something is deprecated", DeprecationWarning, stacklevel=1)
        warnings.warn("the Triton kernel serves", Fallback, stacklevel=1)
    assert capsys.readouterr().err == "int8kit: the Triton kernel serves\n"


CALL = [sys.executable, "-m", "int8kit", "db", "schema"]


@pytest.mark.process
def test_a_full_disk_behind_stdout_is_one_line():
    done = subprocess.run(["sh", "-c", f"{shlex.join(CALL)} >/dev/full"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.process
def test_a_closed_pipe_is_silent():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(CALL, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""
