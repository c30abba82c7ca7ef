"""Tables for people: what the verbs print on stdout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from int8kit.db import Entry

if TYPE_CHECKING:  # a verb needs the packages of its own stage, not those of all
    from int8kit.runtime.generate import Outcome
    from int8kit.verify.checks import Result


def shapes_table(document: dict[str, Any]) -> str:
    """The GEMMs of a shapes document, case by case."""
    parts = []
    for case in document["cases"]:
        rows = [
            (g["m"], g["n"], g["k"], g["count"], "yes" if g["bias"] else "", "int8" if g["int8"] else "",
             f"{g['flops'] / 1e9:.2f}", f"{g['share']:.2%}", _some(g["layers"]))
            for g in case["gemms"]
        ]  # fmt: skip
        head = ("M", "N", "K", "count", "bias", "runs in", "GFLOP", "share", "layers")
        title = (
            f"{case['width']}x{case['height']} px, batch {case['batch']}, {case['branch']}, "
            f"{case['slots']} text slots, {case['tokens']} tokens: {case['gemm_flops'] / 1e12:.2f} TFLOP in GEMMs, "
            f"{case['attention_flops'] / 1e12:.2f} in attention"
        )
        parts.append(f"{title}\n{tabulate(rows, head, disable_numparse=True, stralign='right')}")
    return "\n\n".join(parts)


def _some(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def tuning_table(entries: Iterable[Entry]) -> str:
    """Entries of a tuning run: each shape's configuration, what it takes, and its time."""
    rows, cards = [], set()
    for e in entries:
        cards.add(e.measured_on or "the model: no card was timed")
        us = e.time_us or e.model_us or 0.0
        rows.append(
            (e.shape, e.config, e.source, e.tried, e.resources.registers, e.resources.shared_bytes // 1024,
             f"{us:.0f}", f"{e.shape.ops / us / 1e6:.0f}" if us else "",
             f"{e.default_us / e.time_us:.2f}x" if e.default_us and e.time_us else "",
             f"{e.bf16_us / e.time_us:.2f}x" if e.bf16_us and e.time_us else "")
        )  # fmt: skip
    head = ["M x N x K", "tile", "source", "tried", "regs", "KiB", "us", "TOP/s", "vs default", "vs bf16"]
    while rows and not any(row[len(head) - 1] for row in rows):  # nothing was timed: no ratios to show
        head.pop()
    table = tabulate([row[: len(head)] for row in rows], head, disable_numparse=True, stralign="right")
    return f"{table}\ntimes by {', '.join(sorted(cards))}"


def verify_table(results: Iterable[Result]) -> str:
    """What each property came to."""

    def verdict(r: Result) -> str:
        if r.failure:
            return "differs"
        if r.skipped:
            return f"holds; {r.skipped} need a card" if r.examples else f"not run: {r.skipped} need a card"
        return "holds"

    rows = [(r.name, r.on, r.examples, verdict(r)) for r in results]
    return tabulate(rows, ("property", "executed by", "examples", "verdict"), disable_numparse=True)


def run_tables(outcome: Outcome) -> str:
    """The configurations of an image and what it took."""
    rows = [(c.shape, count, c.config, c.rung, "yes" if c.verified else "no", c.why) for c, count in outcome.choices]
    head = ("M x N x K", "layers", "tile", "rung", "verified", "from")
    configs = tabulate(rows, head, disable_numparse=True)
    took = [
        ("load", f"{outcome.load_s:.2f} s"),
        ("encode and quantize", f"{outcome.prepare_s:.2f} s"),
        (f"{outcome.steps} steps", f"{outcome.denoise_s:.2f} s (median {outcome.step_ms:.0f} ms)"),
        ("decode", f"{outcome.decode_s:.2f} s"),
        ("peak memory", f"{outcome.peak_gib:.2f} GiB ({outcome.device})"),
    ]
    return f"{configs}\n\n{tabulate(took, disable_numparse=True)}"
