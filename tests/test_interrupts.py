"""Ctrl-C: one line and exit status 130, wherever it arrives, and the processes of a run say nothing."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from int8kit import interrupt

SWALLOWS = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass  # as C code of numpy does
"""
INSTALL = "from int8kit import interrupt; interrupt.install(); import signal, time"


def run(code, cwd, **options):
    done = subprocess.run(
        [sys.executable, "-c", f"{INSTALL}\n{code}"], cwd=cwd, capture_output=True, text=True, timeout=60, **options
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    return tmp_path


def test_an_interrupt_inside_an_import_ends_the_process(folder):
    assert run("import swallows; print('goes on')", folder) == (130, "", "int8kit: interrupted\n")


def test_an_interrupt_inside_an_import_waits_while_a_verb_works(folder):
    code = (
        "with interrupt.working():\n"
        "    try:\n        import swallows; print('imported'); time.sleep(20)\n"
        "    except KeyboardInterrupt:\n        print(interrupt.line())"
    )
    assert run(code, folder) == (0, "imported\ninterrupted\n", "")


def test_a_slow_import_of_a_working_verb_is_cut_off(folder):
    code = "with interrupt.working(), interrupt.at_once():\n    import swallows\nprint('goes on')"
    assert run(code, folder) == (130, "", "int8kit: interrupted\n")


def test_nothing_is_raised_below_a_dispatcher(tmp_path):
    code = (
        "def __torch_dispatch__():\n    signal.raise_signal(signal.SIGINT); print('goes on')\n"
        "with interrupt.working():\n"
        "    try:\n        __torch_dispatch__(); time.sleep(20)\n"
        "    except KeyboardInterrupt:\n        print('raised')\n"
        "__torch_dispatch__()"
    )
    status, out, err = run(code, tmp_path)
    assert (status, err) == (130, "int8kit: interrupted\n")
    assert out in ("", "goes on\nraised\n")  # the end of the process discards what is not yet written


def test_outside_of_imports_an_interrupt_is_an_exception(tmp_path):
    code = "try:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('raised')"
    assert run(code, tmp_path) == (0, "raised\n", "")


def test_an_ignored_interrupt_stays_ignored(folder):
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    assert run("import swallows; print('goes on')", folder, **ignore) == (0, "goes on\n", "")


def test_the_line_says_what_is_kept_only_while_it_is(monkeypatch):
    with interrupt.keeping("a is kept"):
        pass
    assert interrupt.line() == "interrupted"

    def stopped():
        with interrupt.keeping("a is kept"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [interrupt.line(), interrupt.line()] == ["interrupted; a is kept", "interrupted"]


def test_processes_of_the_workers_loop_have_the_interrupt_blocked():
    pytest.importorskip("distributed")
    from int8kit.tune import cluster

    blocked, done = [], threading.Event()

    def look():
        blocked.extend(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        done.set()

    loop = cluster._deaf_loop()
    try:
        loop.loop.add_callback(lambda: threading.Thread(target=look).start())
        assert done.wait(10)
    finally:
        loop.stop()
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.process
@pytest.mark.parametrize("delay", [0.2, 0.9])
def test_ctrl_c_at_the_start_of_a_verb_is_one_line(tmp_path, delay):
    process = subprocess.Popen(
        [sys.executable, "-m", "int8kit", "verify"], cwd=tmp_path, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "int8kit: interrupted\n")
    assert process.returncode == 130
