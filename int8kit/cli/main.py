"""The command line. Each verb is a module of this package: it parses, calls and prints. The stages do the work.

Results go to stdout, as a table or with --json as one JSON document. Progress and notes go to stderr. Exit status:
0 done, 1 the check failed, 2 usage error (one line), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from int8kit import __version__, interrupt
from int8kit.cli import bench, compare, db, doctor, run, trace, tune, verify, warmup
from int8kit.cli.help import Root
from int8kit.cli.options import remedy_of
from int8kit.cli.terminal import quiet
from int8kit.errors import FileError, InputError, Int8kitError

app = typer.Typer(
    cls=Root, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run the linears of diffusion transformers in INT8 on the GPU's integer tensor cores. "
    "The verbs are listed in the order of work.",
    epilog="Exit status: 0 done; 1 the check failed; 2 usage error; 130 interrupted. "
    "`int8kit VERB --help` shows a verb's options and an example.",
)  # fmt: skip
app.command()(doctor.doctor)
app.command("trace-shapes")(trace.trace_shapes)
app.command()(tune.tune)
app.add_typer(verify.app, name="verify")
app.command()(warmup.warmup)
app.command()(run.run)
app.command()(compare.compare)
app.add_typer(bench.app, name="bench")
app.add_typer(db.app, name="db")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_EXTRAS = {
    "dask": "tune", "distributed": "tune", "diffusers": "run", "transformers": "run", "PIL": "run",
    "accelerate": "run", "tokenizers": "run", "bitsandbytes": "nf4", "peft": "lora",
    "hypothesis": "verify", "numpy": "verify",
}  # fmt: skip


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise InputError(f"no verb; expected {', '.join(_verbs())}; see `int8kit --help`")


def _verbs() -> list[str]:
    found: Any = typer.main.get_command(app)
    return [name for name in found.list_commands(None) if not found.commands[name].hidden]


def main(argv: list[str] | None = None) -> None:
    """Entry point: run a verb, turn an error of ours into one line, and exit."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode
    quiet()
    status, message = _run(argv)
    if not _flush():  # nobody reads the result any more: no word, as other programs do
        status, message = status or 1, message
    _exit(status, message)


def _run(argv: list[str] | None) -> tuple[int, str | None]:
    """Run a verb -> its exit status and the line to print."""
    usage_error: Any = typer.BadParameter.__base__  # typer exports no name for the root of its usage errors
    try:
        status = app(args=argv, prog_name="int8kit", standalone_mode=False) or 0
        if status == interrupt.STATUS:  # newer typers turn a KeyboardInterrupt into this, without a word
            raise KeyboardInterrupt
        return status, None
    except Int8kitError as error:
        return error.exit_status, _with_help(error, argv)
    except usage_error as error:
        return 2, _usage(error, argv)
    except ModuleNotFoundError as error:
        return 2, _missing(error)
    except (KeyboardInterrupt, typer.Abort):
        return interrupt.STATUS, interrupt.line()
    except BrokenPipeError:
        return 1, None
    except OSError as error:
        if error.errno not in FULL:
            raise
        return 1, f"cannot write ({error.strerror}); free some space, or name another file"


def _usage(error: Any, argv: list[str] | None) -> str:
    """The message of a usage error, with the value and the verb's help."""
    text = error.format_message().rstrip(".")
    if isinstance(error.__cause__, ValidationError) and error.param is not None:  # typer leaves out the value
        first = error.__cause__.errors()[0]
        kinds = {"int": "a whole number", "float": "a number"}
        expected = kinds.get(first["type"].partition("_")[0], first["msg"])
        text = f"{error.param.opts[0]} {first['input']!r}: expected {expected}"
    return f"{text[:1].lower()}{text[1:]}; see `{_command_of(argv)} --help`"


def _command_of(argv: list[str] | None) -> str:
    """The verb of a call, with its subcommand, as its help is called: "int8kit db show"."""
    command: Any = typer.main.get_command(app)
    words = ["int8kit"]
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("-"):
            break
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        words.append(word)
    return " ".join(words)


def _with_help(error: Int8kitError, argv: list[str] | None) -> str:
    """The message of an error; for a mistake of the call without a command as a remedy, with the verb's help."""
    message = str(error)
    if isinstance(error, InputError) and not isinstance(error, FileError) and "`" not in message:
        message += f"; see `{_command_of(argv)} --help`"
    return message


def _missing(error: ModuleNotFoundError) -> str:
    """One line for a package that is not installed. Raises `error` for a module that no extra has."""
    name = (error.name or "").split(".")[0]
    if name in ("torch", "triton"):
        return f"no module {name!r}; {remedy_of(name)}"
    if name not in _EXTRAS:
        raise error
    return f"no module {error.name!r}; install it with `pip install 'int8kit[{_EXTRAS[name]}]'`"


def _flush() -> bool:
    """Write out stdout. Where its reader is gone or its disk is full, discard the rest and return False."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        return False
    except OSError as error:
        _discard(sys.stdout)
        _say(f"cannot write to stdout ({error.strerror})")
        return False
    return True


def _discard(stream: Any) -> None:
    """Send the rest of a stream nowhere: the interpreter would fail to write it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(message: str) -> None:
    if sys.stderr is not None:
        try:
            print(f"int8kit: {' '.join(message.split())}", file=sys.stderr, flush=True)
        except OSError:
            _discard(sys.stderr)


def _exit(status: int, message: str | None) -> None:
    if message:
        _say(message)
    if status == interrupt.STATUS:  # nothing is left to write, and joining a pool of ended workers can block for ever
        os._exit(status)
    interrupt.finish()
    sys.exit(status)


if __name__ == "__main__":
    main()
