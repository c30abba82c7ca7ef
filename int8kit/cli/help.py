"""Help texts, and the words of usage errors: verbs in the order of work, shell completion in a group."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperGroup

ORDER = ("doctor", "trace-shapes", "tune", "verify", "warmup", "run", "compare", "bench", "db")
_USAGE_ERROR: Any = typer.BadParameter.__base__  # typer exports no name for the root of its usage errors
_COMPLETION = ("--install-completion", "--show-completion")


class Group(TyperGroup):
    """A group of commands, each listed with its whole first sentence."""

    title = "Commands"

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each command with its first sentence."""
        found = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        with formatter.section(self.title):
            formatter.write_dl([(name, one.get_short_help_str(1000)) for name, one in found if not one.hidden])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` name. Raises a usage error with the names that exist."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            names = [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
            ctx.fail(f"no {self.title[:-1].lower()} {args[0]!r}; expected {', '.join(names)}")
        return super().resolve_command(ctx, args)


class Root(Group):
    """The group of all verbs."""

    title = "Verbs"

    def invoke(self, ctx: Any) -> Any:
        """Run a verb. Raises a usage error that names the expected arguments."""
        given = list(ctx.args)
        try:
            return super().invoke(ctx)
        except _USAGE_ERROR as error:
            if (message := _expected(error, given)) is None:
                raise
            raise _USAGE_ERROR(message, error.ctx) from None

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the verbs in the order of work; unknown ones last."""
        names = list(self.commands)
        return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), names.index(name)))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Options of the program, then the verbs, then shell completion."""
        rows = [(record, param.opts) for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl([record for record, names in rows if not set(names) & set(_COMPLETION)])
        self.format_commands(ctx, formatter)
        if completion := [record for record, names in rows if set(names) & set(_COMPLETION)]:
            with formatter.section("Shell completion"):
                formatter.write_dl(completion)


def _expected(error: Any, given: list[str]) -> str | None:
    """The message about an argument that is missing, or about a negative number that was read as an option."""
    kind = type(error).__name__
    if kind == "MissingParameter" and error.ctx is not None and error.param is not None:
        names = [one.name.upper() for one in error.ctx.command.params if not one.opts[0].startswith("-")]
        return f"no {error.param.name.upper()}; expected `{error.ctx.command_path} {' '.join(names)}`"
    if kind == "NoSuchOption":
        negative = (text for text in given if re.fullmatch(r"-\d+", text) and text.startswith(error.option_name))
        return next((f"{text}: expected a number of 1 or more" for text in negative), None)
    return None
