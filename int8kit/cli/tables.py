"""Tables for people: the results that the verbs print on stdout. `layout` makes them fit the screen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from int8kit.cli.layout import broken, count, fit, screen_width, wrapped
from int8kit.database.database import Choice, Database
from int8kit.database.schema import Entry
from int8kit.toolchain import Toolchain

if TYPE_CHECKING:  # a verb needs only the packages of its stage
    from int8kit.doctor import Finding
    from int8kit.runtime.generate import GeneratedImages
    from int8kit.runtime.layer_errors import Branch
    from int8kit.verify.compare_implementations import Column
    from int8kit.verify.mutation.campaign import Verdict
    from int8kit.verify.mutation.verdict import GeneratedVerdict
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
            f"{count(case['slots'], 'text slot')}, {count(case['tokens'], 'token')}: "
            f"{case['gemm_flops'] / 1e12:.4g} TFLOP in GEMMs, {case['attention_flops'] / 1e12:.4g} in attention"
        )
        table = fit(rows, head, drop=("GFLOP", "bias", "runs in", "count"), wrap="layers", left="layers")
        parts.append(f"{wrapped(title)}\n{table}")
    return "\n\n".join(parts)


def _some(layers: list[str]) -> str:
    return layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"


def _ratio(other: float | None, own: float | None) -> str:
    """How many times as fast as another one."""
    return f"{other / own:.2f}x" if other and own else ""


def tuning_table(entries: Iterable[Entry]) -> str:
    """Entries of a tuning run: each shape's configuration, its resources and its time."""
    rows, gpus = [], set()
    for e in entries:
        gpus.add(e.measured_on or "the cost model; no GPU was timed")
        us = e.time_us or e.model_us or 0.0
        rows.append(
            (e.tuned, e.config, e.source, e.tried, e.resources.registers, e.resources.shared_bytes // 1024,
             f"{us:.0f}", f"{e.shape.flops / us / 1e6:.0f}" if us else "", _ratio(e.default_us, e.time_us),
             _ratio(e.bf16_us, e.time_us))
        )  # fmt: skip
    head = ["M x N x K", "tile", "source", "tried", "regs", "KiB", "us", "TOP/s", "vs default", "vs bf16"]
    while rows and not any(row[len(head) - 1] for row in rows):  # nothing was timed: no ratios to show
        head.pop()
    drop = [name for name in ("source", "tried", "regs", "KiB", "TOP/s", "vs bf16", "vs default") if name in head]
    table = fit([row[: len(head)] for row in rows], head, drop=drop)
    return f"{table}\n{wrapped('times by ' + ', '.join(sorted(gpus)))}"


def database_table(database: Database, toolchain: Toolchain) -> str:
    """Entries of a database: source, time, gain, and whether the present kernel and Triton prove them."""
    rows, proofs = [], set()
    for e in database.entries:
        us = e.time_us or e.model_us
        proven = proven_by(e, toolchain, database.gpu.arch)
        proofs |= {proven} - {"no"}
        rows.append(
            (e.tuned, e.config, e.source, f"{us:.0f}" if us else "", f"{e.shape.flops / us / 1e6:.0f}" if us else "",
             _ratio(e.default_us, e.time_us), _ratio(e.bf16_us, e.time_us), e.triton,
             "no" if proven == "no" else "yes", "changed" if e.is_stale(toolchain) else "present")
        )  # fmt: skip
    head = ("M x N x K", "tile", "source", "us", "TOP/s", "vs default", "vs bf16", "Triton", "proven", "kernel")
    drop = ("kernel", "source", "vs bf16", "vs default", "TOP/s", "us", "Triton")
    table = fit(rows, head, drop=drop)
    return f"{table}\n{wrapped('proven: ' + '; '.join(sorted(proofs)))}" if proofs else table


def proven_by(entry: Entry, toolchain: Toolchain, arch: int) -> str:
    """The proofs of an entry as code of `arch`, such as "native on NVIDIA H200"; "no" without a proof."""
    proofs = dict.fromkeys(f"{s.executor} on {s.device}" for s in entry.proofs(toolchain, arch))
    return ", ".join(proofs) or "no"


_NOT_FOUND = {
    "model": "none of the database's configurations is estimated to be the fastest",
    "borrowed": "nothing borrowed is estimated to be the fastest",
}


def levels_table(levels: Iterable[tuple[str, Choice | None, Entry | None]]) -> str:
    """The configuration that each level of the lookup finds; an arrow marks the one that serves."""
    rows, served = [], False
    for level, choice, _ in levels:
        if choice is None:
            rows.append(("", level, "", _NOT_FOUND.get(level, "no entry")))
        else:
            rows.append(("" if served else "->", level, str(choice.config), choice.provenance))
            served = True
    return fit(rows, ("", "level", "tile", "why"), wrap="why", left="*")


def verify_table(results: Iterable[Result], markdown: bool = False) -> str:
    """The verdict on each property."""

    def verdict(r: Result) -> str:
        if r.failure:
            return "differs"
        need = f"{r.skipped} {'needs' if r.skipped == 1 else 'need'} a GPU"
        if r.skipped:
            return f"holds; {need}" if r.examples else f"not run: {need}"
        return "holds"

    rows = [(r.name, r.on, r.examples, r.evidence, verdict(r)) for r in results]
    head = ("property", "executed by", "examples", "evidence", "verdict")
    return _report(rows, head, markdown, drop=("executed by", "evidence"), left="property,executed by,evidence,verdict")


def implementations_table(columns: Iterable[Column], markdown: bool = False) -> str:
    """A row for each property and a column for each implementation; below, why a property does not apply."""
    columns = list(columns)
    reasons = []
    for c in columns:
        if why := dict.fromkeys(r.reason for r in c.results if r.reason):
            reasons.append(wrapped(f"n/a for {c.implementation}: {'; '.join(why)}"))

    def cell(r: Result) -> str:
        return "n/a" if r.reason else "fails" if r.failure else f"holds ({r.examples})"

    names = [r.name for r in columns[0].results] if columns else []
    groups = [columns] if markdown else _side_by_side(columns)
    tables = []
    for group in groups:
        rows = [(name, *(cell(c.results[at]) for c in group)) for at, name in enumerate(names)]
        tables.append(_report(rows, ("property", *(c.implementation for c in group)), markdown, left="*"))
    return "\n".join(["\n\n".join(tables), "", *reasons])


def _side_by_side(found: list[Column]) -> list[list[Column]]:
    """Groups of columns that fit beside the names of the properties."""
    groups: list[list[Column]] = [[]]
    room = start = screen_width() - 24  # the longest name of a property
    for column in found:
        need = max(len(column.implementation), len("holds (1500)")) + 2
        if groups[-1] and need > room:
            groups.append([])
            room = start
        groups[-1].append(column)
        room -= need
    return groups


def layers_table(branches: Iterable[Branch], markdown: bool = False, most: int = 12) -> str:
    """Each branch's output, and the `most` layers with the largest errors."""
    parts = []
    for b in branches:
        rows = [
            (one.name, f"{one.n}x{one.k}", f"{one.error.sqnr_db:.1f}", f"{one.error.cosine:.6f}",
             f"{one.error.max_error:.2%}", f"{one.saturated:.3%}") for one in b.layers[:most]
        ]  # fmt: skip
        head = ("layer", "N x K", "SQNR dB", "cosine", "max error", "saturated")
        table = _report(rows, head, markdown, drop=("saturated", "cosine", "N x K"), left="layer")
        out = b.output
        title = (
            f"{b.name}: output {out.sqnr_db:.1f} dB, cosine {out.cosine:.6f}, max error {out.max_error:.2%}; "
            f"the {len(rows)} of {count(len(b.layers), 'layer')} with the largest errors"
        )
        parts.append(f"{wrapped(title)}\n{table}")
    return "\n\n".join(parts)


def _report(
    rows: Sequence[Sequence[Any]], head: Sequence[str], markdown: bool, *, drop: Sequence[str] = (), wrap: str = "",
    left: str = "",
) -> str:  # fmt: skip
    """A table within the width, or with every column in Markdown."""
    if markdown:
        return tabulate(rows, head, tablefmt="pipe", disable_numparse=True)
    return fit(rows, head, drop=drop, wrap=wrap, left=left)


def mutation_table(verdicts: Iterable[Verdict], score: dict[str, Any], markdown: bool = False) -> str:
    """The verdict on each seeded fault, the score, and the examples that each survivor passed."""

    def verdict(v: Verdict) -> str:
        if v.ending == "killed":
            return f"caught by {v.by}" + ("" if v.how == "differs" else f" ({v.how})")
        return v.ending if v.ending == "survived" else f"{v.ending}: {v.evidence}"

    rows, survivors = [], []
    for v in verdicts:
        rows.append((v.name, v.file, v.fault, verdict(v), f"{v.seconds:.1f}" if v.seconds else ""))
        if v.ending == "survived":
            tried = ", ".join(f"{number} examples of {name}" for name, number in v.tried.items())
            survivors.append(wrapped(f"survived: {v.name} ({v.fault}); tried {tried}"))
    head = ("fault", "file", "change", "verdict", "seconds")
    table = _report(rows, head, markdown, drop=("seconds", "file", "change"), wrap="verdict",
                    left="fault,file,change,verdict")  # fmt: skip
    share = f" ({score['score']:.0%})" if score["ran"] else ""
    idle = {"needs a GPU": "need a GPU", "not applicable": "not applicable here"}
    counts = [f"{score['killed']} of {score['ran']} caught{share}"]
    counts += [f"{score['idle'][ending]} {text}" for ending, text in idle.items() if ending in score["idle"]]
    return "\n".join([table, "", ", ".join(counts), *survivors])


def generated_table(verdicts: Collection[GeneratedVerdict], score: dict[str, Any], markdown: bool = False) -> str:
    """The score of generated mutants by file and by rule, and each survivor with the command that runs it alone."""

    def row(name: str, counts: dict[str, Any]) -> tuple[Any, ...]:
        share = "" if counts["score"] is None else f"{counts['score']:.0%}"
        return (name, *(counts[ending] or "" for ending in endings), share)

    endings = ("killed", "survived", "equivalent", "triaged", "needs a GPU", "not applicable")
    rows = [row(file, counts) for file, counts in score["by_file"].items()]
    rows += [row(f"rule {rule}", counts) for rule, counts in score["by_rule"].items()]
    head = ("file or rule", *endings, "score")
    table = _report([*rows, row("all", score)], head, markdown, drop=("not applicable", "triaged"), wrap="file or rule",
                    left="file or rule")  # fmt: skip
    lines = [table]
    for v in verdicts:
        if v.ending == "survived":
            tried = ", ".join(f"{number} examples of {name}" for name, number in v.tried.items())
            lines += [f"\nsurvived: int8kit/{v.file}:{v.line}", f"  - {v.before}", f"  + {v.after}"]
            lines += [wrapped(f"tried {tried}"), f"to repeat it:\n  {v.command}"]
    if len(verdicts) == 1 and not any(v.ending == "survived" for v in verdicts):
        (v,) = verdicts
        by = f" by {v.by} ({v.how})" if v.by else ""
        lines += [f"\nint8kit/{v.file}:{v.line}", f"  - {v.before}", f"  + {v.after}", f"{v.ending}{by}: {v.evidence}"]
    return "\n".join(lines)


def doctor_table(findings: Iterable[Finding]) -> str:
    """A line for each finding, and its remedy below it."""
    findings = list(findings)
    width = max(len(finding.name) for finding in findings)
    lines = []
    for one in findings:
        for label, text in ((f"{one.status:6}  {one.name:{width}}", one.found), (" " * (width + 8), one.remedy)):
            if text:
                indent = f"{label}  " + ("-> " if text is one.remedy else "")
                room = max(screen_width() - len(indent), 20)
                first, *rest = broken(text, room).split("\n")
                lines += [indent + first, *(" " * len(indent) + line for line in rest)]
    return "\n".join(lines)


def run_tables(outcome: GeneratedImages) -> str:
    """The configurations of an image, and the time and memory that it took."""
    rows = [(c.shape, n, c.config, c.level, "yes" if c.is_verified else "no", c.provenance) for c, n in outcome.choices]
    head = ("M x N x K", "layers", "tile", "level", "proven", "why")
    configs = fit(rows, head, drop=("why",), wrap="why", left="tile,level,proven,why")
    blocks = ("fused" if outcome.fused else "unfused") + (", CUDA graphs" if outcome.graphs else "")
    took = [
        ("start and imports", f"{outcome.start_s:.2f} s"),
        ("load", f"{outcome.load_s:.2f} s"),
        ("encode the prompts", f"{outcome.encode_s:.2f} s"),
        (f"prepare the linears, {outcome.request.variant}", f"{outcome.prepare_s:.2f} s"),
        ("text projection, adaLN, noise", f"{outcome.ahead_s:.2f} s"),
        ("first step", f"{outcome.first_step_s:.2f} s, {outcome.until_first_step_s:.2f} s from the start"),
        (count(outcome.steps, "step"), f"{outcome.denoise_s:.2f} s (median after the first {outcome.step_ms:.0f} ms)"),
        ("decode", f"{outcome.decode_s:.2f} s"),
        ("blocks, attention", f"{blocks}, {outcome.attention}"),
        ("peak memory", f"{outcome.peak_gib:.2f} GiB ({outcome.device})"),
    ]
    return f"{configs}\n\n{tabulate(took, disable_numparse=True)}"


def bench_fused_table(document: dict[str, Any]) -> str:
    """A document of `bench fused`: each kernel's variants, fastest first."""
    rows = [
        (r["kernel"], r["m"], r["variant"], f"{r['p50']:.2f}", f"{r['tb_s']:.3f}", f"{r['of_copy']:.3f}")
        for r in sorted(document["rows"], key=lambda r: (r["kernel"], r["m"], r["p50"]))
    ]
    return fit(rows, ("kernel", "M", "variant", "us", "TB/s", "of a copy"), left="kernel,variant")


def bench_model_table(document: dict[str, Any]) -> str:
    """A document of `bench model`: each contestant's time, and its parts if they were profiled."""
    rows: list[tuple[str, ...]] = [
        (
            r["name"],
            f"{r['p20']:.1f}",
            f"{r['p50']:.1f}",
            f"{r['p80']:.1f}",
            f"{r['of_stock']:.2f}",
            f"{r['first_ms']:.0f}",
        )
        for r in document["rows"]
    ]
    names = ["contestant", "p20 ms", "p50 ms", "p80 ms", "times stock", "first call ms"]
    if all("activations_gib" in r for r in document["rows"]):
        names.append("activations GiB")
        rows = [(*row, f"{r['activations_gib']:.2f}") for row, r in zip(rows, document["rows"], strict=True)]
    text = fit(rows, names, left="contestant")
    profiles = document["details"].get("profile", {})
    if not profiles:
        return text
    parts = list(next(iter(profiles.values()))["ms"])
    head = ("contestant, ms", *parts, "wall clock", "sum / wall")
    found = [
        (name, *(f"{one['ms'][part]:.2f}" for part in parts), f"{one['wall_ms']:.2f}", f"{one['sum_over_wall']:.3f}")
        for name, one in profiles.items()
    ]
    return f"{text}\n\n{fit(found, head, left='contestant, ms')}"


def bench_tables(document: dict[str, Any]) -> str:
    """A benchmark's document: each shape's contestants, who did not run and why, and the ratios over the shapes."""
    details, versions = document["details"], document["versions"]
    parts = [_bench_shape(document, number) for number in range(len(details["shapes"]))]
    absent: dict[tuple[str, str, str], int] = {}
    for shape in details["shapes"]:
        for row in shape["absent"]:
            key = row["name"], row["kind"], row["reason"]
            absent[key] = absent.get(key, 0) + 1
    if absent:
        missing = [(name, kind, shapes, reason) for (name, kind, reason), shapes in absent.items()]
        head = ("contestant", "kind", "shapes", "reason")
        parts.append("did not run\n" + fit(missing, head, wrap="reason", left="contestant,kind,reason"))
    rows = [
        (s["of"], s["over"], s["kind"], s["shapes"], f"{s['geomean']:.3f}x", f"{s['min']:.3f}x", s["min_at"],
         f"{s['max']:.3f}x", s["max_at"], f"{s['faster']}/{s['ties']}/{s['slower']}", s["timed_differently"] or "")
        for s in details["summary"]
    ]  # fmt: skip
    names = ("speed of", "over", "kind", "shapes", "geometric mean", "min", "min at", "max", "max at", "win/tie/loss",
             "timed otherwise")  # fmt: skip
    drop = ("timed otherwise", "max at", "min at", "speed of", "kind", "shapes")
    parts.append(fit(rows, names, drop=drop, left="speed of,over,kind"))
    health = f", {details['health_tflops']} bf16 TFLOP/s" if details["health_tflops"] else ""
    parts.append(
        wrapped(
            f"{details['gpu']}{health}, torch {versions['torch']}, CUDA {versions['cuda']}, driver "
            f"{versions['driver']}, Triton {versions['triton']}; {details['rounds']} rounds\n"
            f"{document['policy']['timing']}\n{details['timed_by']}; a tie: p20 to p80 overlap"
        )
    )
    return "\n\n".join(parts)


def _bench_shape(document: dict[str, Any], number: int) -> str:
    shape = document["details"]["shapes"][number]
    timed = [row for row in document["rows"] if row["shape"] == number]
    listed = {(c["name"], c["kind"]): c for c in document["details"]["contestants"]}
    ours = [row for row in timed if listed[row["name"], row["kind"]]["ours"]]
    names = list(dict.fromkeys(row["name"] for row in ours))
    rows = []
    for row in sorted(timed, key=lambda r: (r["kind"], r["p50"])):
        own = {o["name"]: o for o in ours if o["kind"] == row["kind"]}
        exact = listed[row["name"], row["kind"]]["arithmetic"] == "int8"
        rows.append(
            (row["name"], row["kind"], f"{row['p20']:.1f}", f"{row['p50']:.1f}", f"{row['p80']:.1f}",
             f"{row['tops']:.0f}", f"{row['peak_share']:.1%}",
             *(f"{row['p50'] / own[n]['p50']:.3f}x" if n in own and own[n] is not row else "" for n in names),
             row["differs"] if exact else "-", row["timed_by"], row["note"])
        )  # fmt: skip
    ratios = [f"{name} is" for name in names]
    head = (
        "contestant",
        "kind",
        "p20 us",
        "p50 us",
        "p80 us",
        "TOP/s",
        "of int8 peak",
        *ratios,
        "differs",
        "by",
        "note",
    )
    state = ""
    if gpu := shape["gpu_state"]:
        state = f", {gpu['sm_mhz']} MHz, {gpu['power_w']} W, {', '.join(gpu['throttle'] or ['not throttled'])}"
    drop = ("by", "note", "p20 us", "p80 us", "of int8 peak", "TOP/s")
    table = fit(rows, head, drop=drop, left="contestant,kind,note")
    title = f"{shape['m']}x{shape['n']}x{shape['k']}{state}"
    return f"{wrapped(title)}\n{table}"
