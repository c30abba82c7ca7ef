"""`int8kit verify mutate`: the catalogue of seeded faults, and generated mutants."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int8kit import interrupt
from int8kit.cli.options import interpret_without_gpu, named_gpu
from int8kit.cli.terminal import Force, Json, Output, check_output, note, progress, show
from int8kit.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from int8kit.gpus import Gpu
    from int8kit.verify.mutation.generate import GeneratedMutant
    from int8kit.verify.mutation.verdict import GeneratedVerdict

AT_LEAST = 0.95


def mutate(
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="GPU whose code is verified. Default: the present GPU, else rtx3090.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Seed this fault or this generated mutant alone; repeatable.")
    ] = None,
    generate: Annotated[
        int | None, typer.Option(metavar="N", help="Instead of the catalogue: N mutants that rules generate.")
    ] = None,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="Of the generated mutants: part I of N.")] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Generate in this file alone, such as gemm_triton or ops; repeatable.")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="Generate by this rule alone, such as constant or mask; repeatable.")
    ] = None,
    at_least: Annotated[
        float | None, typer.Option(help="Least score of the generated mutants, killed / (killed + survived). [0.95]")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Generated examples of each property. Default: 150; 60 on a GPU.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the examples, or of the choice of mutants.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    output: Output = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Verify the verifier: seed faults into copies of the kernels, one by one; a property must catch each of them.

    The exit status is 1 if a fault survives that this machine can execute. Faults that need a GPU are listed with the
    reason. A run takes minutes on a CPU; one fault with --only takes about a minute.

    With --generate, rules make the faults: a constant off by one, a mask dropped, two arguments exchanged. Verdicts
    are stored as they come, so the same command resumes a run that was killed. The exit status is 1 if the score is
    under --at-least.

    Example: int8kit verify mutate --only scales-joined

    Example: int8kit verify mutate --generate 300 --part 1/4
    """
    if examples is not None and examples < 1:
        raise InputError(f"--examples {examples}: expected 1 or more")
    if not hasattr(os, "fork"):
        raise InputError("verify mutate needs os.fork, which this system lacks; run it on Linux or WSL")
    _check_options(only, generate, part, kernel, rule, at_least, examples)
    check_output(output, force)
    named = named_gpu(gpu)
    if generate is not None:
        chosen = _sample(generate, seed, part, kernel or [], rule or [])
        _generated(named, chosen, True, AT_LEAST if at_least is None else at_least, markdown, output, as_json)
    elif only and any(":" in name for name in only):
        from int8kit.verify.mutation.generate import find

        _generated(named, tuple(map(find, only)), False, 1.0, markdown, output, as_json)
    else:
        _catalogue(named, only or [], examples, seed, markdown, output, as_json)


def _check_options(
    only: list[str] | None, generate: int | None, part: str | None, kernel: list[str] | None, rule: list[str] | None,
    at_least: float | None, examples: int | None,
) -> None:  # fmt: skip
    """Raise InputError for options that do not fit together."""
    given = {"--part": part, "--kernel": kernel, "--rule": rule, "--at-least": at_least}
    for option, value in given.items():
        if generate is None and value:
            raise InputError(f"{option} without --generate: it selects generated mutants")
    if generate is not None and generate < 1:
        raise InputError(f"--generate {generate}: expected 1 or more")
    if generate is not None and only:
        raise InputError("--only with --generate: name mutants, or have them generated")
    generated = [name for name in only or [] if ":" in name]
    if generated and len(generated) < len(only or []):
        raise InputError("--only: expected faults of the catalogue, or generated mutants, not both")
    if (generate is not None or generated) and examples is not None:
        raise InputError("--examples: generated mutants are tried with the examples that `int8kit verify` takes")
    if at_least is not None and not 0 <= at_least <= 1:
        raise InputError(f"--at-least {at_least}: expected 0 to 1")


def _sample(
    count: int, seed: int, part: str | None, kernels: list[str], rules: list[str]
) -> tuple[GeneratedMutant, ...]:
    """The mutants of a run."""
    from int8kit.verify.mutation import generate

    number, of = 1, 1
    if part is not None:
        if not (found := re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)) or int(found[1]) > int(found[2]):
            raise InputError(f"--part {part}: expected I/N, such as 2/4")
        number, of = int(found[1]), int(found[2])
    return generate.part(generate.sample(count, seed, kernels=kernels, rules=rules), number, of)


def _catalogue(
    named: Gpu | None, only: list[str], examples: int | None, seed: int, markdown: bool, output: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Seed the faults of the catalogue."""
    from int8kit.verify.mutation.catalogue import find

    mutants = find(only)
    interpret_without_gpu()
    from int8kit import gpus
    from int8kit.cli import tables
    from int8kit.verify.mutation import campaign

    target = named or gpus.resolve(None)
    verdicts: list[campaign.Verdict] = []

    def show_verdicts() -> None:
        score = campaign.score(verdicts)
        document = {"gpu": target.alias, **score, "mutants": [vars(v) for v in verdicts]}
        show(document, tables.mutation_table(verdicts, score, markdown), as_json, output)

    with (
        _Partial(lambda: len(verdicts), len(mutants), "faults", show_verdicts),
        progress("checks of the faults and of the unchanged kernels") as (bar, task),
    ):
        verdicts = campaign.run(
            mutants, target, examples=examples, seed=seed, on_verdict=verdicts.append,
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    show_verdicts()
    if survivors := [v.name for v in verdicts if v.ending == "survived"]:
        ran = campaign.score(verdicts)["ran"]
        raise CheckFailed(f"{len(survivors)} of {ran} faults survived: {', '.join(survivors)}")


def _generated(
    named: Gpu | None, mutants: tuple[GeneratedMutant, ...], whole: bool, at_least: float, markdown: bool,
    output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Run generated mutants. whole: a run with a journal, which first checks that the unchanged kernels pass."""
    interpret_without_gpu()
    from int8kit import gpus
    from int8kit.cli import tables
    from int8kit.verify.mutation import generated_campaign
    from int8kit.verify.mutation.verdict import score
    from int8kit.verify.mutation.verdict_journal import VerdictJournal

    target = named or gpus.resolve(None)
    journal = VerdictJournal(output, generated_campaign.identity(target)) if whole else None
    verdicts: dict[str, GeneratedVerdict] = {}
    if journal and (known := sum(mutant.name in journal.verdicts for mutant in mutants)):
        note(f"{known} of {len(mutants)} verdicts are in {journal.path}")

    def show_verdicts() -> None:
        found = score(verdicts.values())
        document = {"gpu": target.alias, **found, "mutants": [vars(v) for v in verdicts.values()]}
        show(document, tables.generated_table(verdicts.values(), found, markdown), as_json, output)

    def keep(verdict: GeneratedVerdict) -> None:
        verdicts[verdict.name] = verdict

    with (
        _Partial(lambda: len(verdicts), len(mutants), "mutants", show_verdicts, _RESUME if journal else ""),
        progress(f"checks of the mutants{' and of the unchanged kernels' if whole else ''}") as (bar, task),
    ):
        all_ = generated_campaign.run(
            mutants, target, journal, sound=whole, on_verdict=keep,
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    verdicts = {verdict.name: verdict for verdict in all_}
    show_verdicts()
    found = score(all_)
    if found["score"] is not None and found["score"] < at_least:
        ran = found["killed"] + found["survived"]
        raise CheckFailed(
            f"{found['survived']} of {ran} mutants survived: a score of {found['score']:.1%}, "
            f"expected {at_least:.0%} or more"
        )


_RESUME = "; finished work is kept, run the same command again to continue from here"


class _Partial:
    """A context that reports the verdicts so far when the run is interrupted."""

    def __init__(
        self, done: Callable[[], int], total: int, what: str, show_verdicts: Callable[[], None], kept: str = ""
    ) -> None:
        """kept: how the run can be resumed, as the end of the line."""
        self.done, self.total, self.what, self.show_verdicts, self.kept = done, total, what, show_verdicts, kept

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            interrupt.keep(f"{self.done()} of {self.total} {self.what} were tried{self.kept}")
            if self.done():
                self.show_verdicts()
