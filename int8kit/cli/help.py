"""Help texts: verbs in the order of work and in whole sentences, shell completion in a group."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

ORDER = ("doctor", "trace-shapes", "tune", "verify", "run", "compare", "bench", "db")
_COMPLETION = ("--install-completion", "--show-completion")


class Group(TyperGroup):
    """A group of commands, each listed with its whole first sentence."""

    title = "Commands"

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each command with its first sentence."""
        found = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        with formatter.section(self.title):
            formatter.write_dl([(name, one.get_short_help_str(1000)) for name, one in found if not one.hidden])


class Root(Group):
    """The group of all verbs."""

    title = "Verbs"

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
