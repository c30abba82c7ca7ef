"""Tables for people: what the verbs print on stdout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from int8kit.database.database import Choice, Database
from int8kit.database.schema import Entry
from int8kit.toolchain import Toolchain

if TYPE_CHECKING:  # a verb needs the packages of its own stage, not those of all
    from int8kit.runtime.generate import GeneratedImage
    from int8kit.runtime.layer_errors import Branch
    from int8kit.verify.compare_implementations import Column
    from int8kit.verify.mutation.campaign import Verdict
    from int8kit.verify.runner import Result


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


def database_table(database: Database, toolchain: Toolchain) -> str:
    """Every entry of a database: where it is from, what it gained, and whether it is of the present kernels."""
    rows = []
    for e in database.entries:
        us = e.time_us or e.model_us
        rows.append(
            (e.shape, e.config, e.source, f"{us:.0f}" if us else "", f"{e.shape.ops / us / 1e6:.0f}" if us else "",
             f"{e.default_us / e.time_us:.2f}x" if e.default_us and e.time_us else "",
             f"{e.bf16_us / e.time_us:.2f}x" if e.bf16_us and e.time_us else "",
             e.triton, proven_by(e, toolchain, database.gpu.arch), "changed" if e.is_stale(toolchain) else "")
        )  # fmt: skip
    head = ("M x N x K", "tile", "source", "us", "TOP/s", "vs default", "vs bf16", "Triton", "proven", "kernel")
    return tabulate(rows, head, disable_numparse=True, stralign="right")


def proven_by(entry: Entry, toolchain: Toolchain, arch: int) -> str:
    """What proves an entry as code of `arch`, such as "native on NVIDIA H200"; "no" without a proof."""
    proofs = dict.fromkeys(f"{s.executor} on {s.device}" for s in entry.proofs(toolchain, arch))
    return ", ".join(proofs) or "no"


def levels_table(levels: Iterable[tuple[str, Choice | None, Entry | None]]) -> str:
    """How a configuration is found, level by level; an arrow marks the one that serves."""
    rows, served = [], False
    for level, choice, entry in levels:
        if choice is None:
            rows.append(("", level, "", "no entry"))
        else:
            why = choice.provenance if entry else "legal everywhere"
            rows.append(("" if served else "->", level, str(choice.config), why))
            served = True
    return tabulate(rows, ("", "level", "tile", "why"), disable_numparse=True)


def verify_table(results: Iterable[Result], markdown: bool = False) -> str:
    """What each property came to."""

    def verdict(r: Result) -> str:
        if r.failure:
            return "differs"
        if r.skipped:
            return f"holds; {r.skipped} need a card" if r.examples else f"not run: {r.skipped} need a card"
        return "holds"

    rows = [(r.name, r.on, r.examples, verdict(r)) for r in results]
    head = ("property", "executed by", "examples", "verdict")
    return tabulate(rows, head, tablefmt=_format(markdown), disable_numparse=True)


def implementations_table(columns: Iterable[Column], markdown: bool = False) -> str:
    """Properties down, subjects across; below, why a property does not apply."""
    columns = list(columns)
    reasons = []
    for c in columns:
        if why := dict.fromkeys(r.reason for r in c.results if r.reason):
            reasons.append(f"n/a for {c.implementation}: {'; '.join(why)}")

    def cell(r: Result) -> str:
        return "n/a" if r.reason else "fails" if r.failure else f"holds ({r.examples})"

    rows = [(results[0].name, *map(cell, results)) for results in zip(*(c.results for c in columns), strict=True)]
    head = ("property", *(c.implementation for c in columns))
    return "\n".join([tabulate(rows, head, tablefmt=_format(markdown), disable_numparse=True), "", *reasons])


def layers_table(branches: Iterable[Branch], markdown: bool = False, most: int = 12) -> str:
    """Each branch's output, and its `most` worst layers: those most worth protecting."""
    parts = []
    for b in branches:
        rows = [
            (one.name, f"{one.n}x{one.k}", f"{one.error.sqnr_db:.1f}", f"{one.error.cosine:.6f}",
             f"{one.error.max_error:.2%}", f"{one.saturated:.3%}") for one in b.layers[:most]
        ]  # fmt: skip
        head = ("layer", "N x K", "SQNR dB", "cosine", "max error", "saturated")
        table = tabulate(rows, head, tablefmt=_format(markdown), disable_numparse=True, stralign="right")
        out = b.output
        parts.append(
            f"{b.name}: output {out.sqnr_db:.1f} dB, cosine {out.cosine:.6f}, max error {out.max_error:.2%}; "
            f"the {len(rows)} of {len(b.layers)} layers most worth protecting\n{table}"
        )
    return "\n\n".join(parts)


def _format(markdown: bool) -> str:
    return "pipe" if markdown else "simple"


def mutation_table(verdicts: Iterable[Verdict], score: dict[str, Any], markdown: bool = False) -> str:
    """What became of each seeded fault; the score; and of survivors what was tried."""

    def verdict(v: Verdict) -> str:
        if v.ending == "killed":
            return f"killed by {v.by}" + ("" if v.how == "differs" else f" ({v.how})")
        return v.ending if v.ending == "survived" else f"{v.ending}: {v.evidence}"

    rows, survivors = [], []
    for v in verdicts:
        rows.append((v.name, v.file, v.fault, verdict(v), f"{v.seconds:.1f}" if v.seconds else ""))
        if v.ending == "survived":
            tried = ", ".join(f"{count} examples of {name}" for name, count in v.tried.items())
            survivors.append(f"survived: {v.name} ({v.fault}); tried {tried}")
    head = ("mutant", "file", "fault", "verdict", "seconds")
    aligned = ("left",) * 4 + ("right",)
    table = tabulate(rows, head, tablefmt=_format(markdown), disable_numparse=True, colalign=aligned)
    share = f" ({score['score']:.0%})" if score["ran"] else ""
    idle = {"needs a GPU": "need a GPU", "not applicable": "not applicable here"}
    counts = [f"{score['killed']} of {score['ran']} killed{share}"]
    counts += [f"{score['idle'][ending]} {text}" for ending, text in idle.items() if ending in score["idle"]]
    return "\n".join([table, "", ", ".join(counts), *survivors])


def run_tables(outcome: GeneratedImage) -> str:
    """The configurations of an image and what it took."""
    rows = [
        (c.shape, count, c.config, c.level, "yes" if c.verified else "no", c.provenance) for c, count in outcome.choices
    ]
    head = ("M x N x K", "layers", "tile", "level", "verified", "from")
    configs = tabulate(rows, head, disable_numparse=True)
    took = [
        ("load", f"{outcome.load_s:.2f} s"),
        ("encode and quantize", f"{outcome.prepare_s:.2f} s"),
        (f"{outcome.steps} steps", f"{outcome.denoise_s:.2f} s (median {outcome.step_ms:.0f} ms)"),
        ("decode", f"{outcome.decode_s:.2f} s"),
        ("peak memory", f"{outcome.peak_gib:.2f} GiB ({outcome.device})"),
    ]
    return f"{configs}\n\n{tabulate(took, disable_numparse=True)}"


def bench_tables(document: dict[str, Any]) -> str:
    """A benchmark's document: each shape's contestants, who did not run and why, and the ratios over the shapes."""
    conditions = document["conditions"]
    parts = [_bench_shape(document, shape) for shape in document["shapes"]]
    absent: dict[tuple[str, str, str], int] = {}
    for shape in document["shapes"]:
        for row in shape["absent"]:
            key = row["name"], row["kind"], row["reason"]
            absent[key] = absent.get(key, 0) + 1
    if absent:
        missing = [(*key, count) for key, count in absent.items()]
        parts.append(
            "did not run\n" + tabulate(missing, ("contestant", "kind", "reason", "shapes"), disable_numparse=True)
        )
    rows = [
        (s["of"], s["over"], s["kind"], s["shapes"], f"{s['geomean']:.3f}x", f"{s['min']:.3f}x", s["min_at"],
         f"{s['max']:.3f}x", s["max_at"], f"{s['faster']}/{s['ties']}/{s['slower']}", s["timed_differently"] or "")
        for s in document["summary"]
    ]  # fmt: skip
    head = ("speed of", "over", "kind", "shapes", "geometric mean", "min", "at", "max", "at", "faster/tie/slower",
            "timed otherwise")  # fmt: skip
    parts.append(tabulate(rows, head, disable_numparse=True, stralign="right"))
    health = f", {conditions['health_tflops']} bf16 TFLOP/s" if conditions["health_tflops"] else ""
    parts.append(
        f"{conditions['gpu']}{health}, torch {conditions['torch']}, CUDA {conditions['cuda']}, driver "
        f"{conditions['driver']}, Triton {conditions['triton']}; {conditions['rounds']} rounds\n"
        f"{conditions['policy']}\n{conditions['timed_by']}; a tie: p20 to p80 overlap"
    )
    return "\n\n".join(parts)


def _bench_shape(document: dict[str, Any], shape: dict[str, Any]) -> str:
    listed = {(c["name"], c["kind"]): c for c in document["contestants"]}
    ours = [row for row in shape["rows"] if listed[row["name"], row["kind"]]["ours"]]
    names = list(dict.fromkeys(row["name"] for row in ours))
    rows = []
    for row in sorted(shape["rows"], key=lambda r: (r["kind"], r["p50_us"])):
        own = {o["name"]: o for o in ours if o["kind"] == row["kind"]}
        exact = listed[row["name"], row["kind"]]["arithmetic"] == "int8"
        rows.append(
            (row["name"], row["kind"], f"{row['p20_us']:.1f}", f"{row['p50_us']:.1f}", f"{row['p80_us']:.1f}",
             f"{row['tops']:.0f}", f"{row['peak_share']:.1%}",
             *(f"{row['p50_us'] / own[n]['p50_us']:.3f}x" if n in own and own[n] is not row else "" for n in names),
             row["differs"] if exact else "-", row["timed_by"], row["note"])
        )  # fmt: skip
    head = ("contestant", "kind", "p20 us", "p50 us", "p80 us", "TOP/s", "of int8 peak",
            *(f"{name} is" for name in names), "differs", "timed by", "note")  # fmt: skip
    aligned = ("left", "left", *["right"] * (len(head) - 3), "left")
    card = shape["card"]
    state = f", {card['sm_mhz']} MHz, {card['power_w']} W, {', '.join(card['throttle'] or ['free'])}" if card else ""
    title = f"{shape['m']}x{shape['n']}x{shape['k']}{state}"
    return f"{title}\n{tabulate(rows, head, disable_numparse=True, colalign=aligned if rows else None)}"
