"""Ctrl-C in the command line: one line and exit status 130, at a moment when no library swallows it.

    interrupt.install()                      # by the entry point, before any other import
    with interrupt.keeping("it is kept"):    # the line ends with these words
        ...

Python raises KeyboardInterrupt wherever the signal arrives. C code of numpy and torch swallows it while their modules
are imported: the verb goes on, or fails later with another error. Raised below torch's dispatcher, it aborts the
process. Therefore the handler looks at the stack. Inside an import or a dispatch, it ends a process that has no work to
keep at once. It waits for the end of the import or dispatch while a verb works, since the verb may have a result to
print and children to end.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

STATUS = 130  # as a shell reports a program that Ctrl-C ended
_LOOK_AGAIN_S = 0.02
_IMPORTING = "<frozen importlib._bootstrap>"
_NO_PLACE_TO_RAISE = ("__torch_dispatch__", "__torch_function__", "__del__")

_process = 0  # the process that installed the handler; a fork of it has the handler too
_working = 0  # blocks that end before the process does
_kept = ""  # the end of the line


def install() -> None:
    """Handle Ctrl-C in this process, unless the caller has it ignored, as `nohup` does."""
    global _process
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _process = os.getpid()
        signal.signal(signal.SIGINT, _interrupted)
        if hasattr(signal, "SIGALRM"):  # Windows has no timer
            signal.signal(signal.SIGALRM, _interrupted)


def finish() -> None:
    """From here on Ctrl-C ends the process without a word: its result is printed."""
    if _process == os.getpid():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """A block that Ctrl-C never cuts off: an interrupt inside an import is raised after the import."""
    global _working
    _working += 1
    try:
        yield
    finally:
        _working -= 1


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """A block inside `working` that Ctrl-C may cut off: slow imports, or work that leaves nothing behind."""
    global _working
    before, _working = _working, 0
    try:
        yield
    finally:
        _working = before


@contextlib.contextmanager
def keeping(words: str) -> Iterator[None]:
    """A block whose finished work is kept: after an interrupt inside it, the line ends with `words`."""
    global _kept
    _kept = words
    yield
    _kept = ""


def keep(words: str) -> None:
    """End the line of the interrupt that is under way with `words`."""
    global _kept
    _kept = words


def line() -> str:
    """The line for an interrupt."""
    global _kept
    words, _kept = _kept, ""
    return f"interrupted; {words}" if words else "interrupted"


def leave() -> None:
    """Print the line and end the process, without the exits of its libraries: one of them may be half imported."""
    text = f"int8kit: {line()}\n"
    with contextlib.suppress(OSError):
        if os.isatty(2):
            text = f"\r\x1b[2K\x1b[?25h{text}"  # erases a bar, and shows the cursor that the bar hides
        os.write(2, text.encode())
    os._exit(STATUS)


def _interrupted(_: int, frame: FrameType | None) -> None:
    if os.getpid() == _process and not _can_raise(frame):
        if _working and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_S)
            return
        leave()
    raise KeyboardInterrupt


def _can_raise(frame: FrameType | None) -> bool:
    """True if no import and no dispatch is under way in `frame` or in a caller of it."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING or frame.f_code.co_name in _NO_PLACE_TO_RAISE:
            return False
        frame = frame.f_back
    return not sys.is_finalizing()
