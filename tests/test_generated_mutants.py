"""verify/mutation/: mutants that rules generate, their sample, their verdicts, and the score."""

import ast
import json
import tempfile
from collections import Counter
from dataclasses import replace

import pytest

from int8kit import gpus
from int8kit.cli import main
from int8kit.errors import FileError, UnknownName
from int8kit.verify import executors, process_pool
from int8kit.verify.mutation import (
    equivalence,
    generate,
    generated_campaign,
    reach,
    sources,
    triage,
    verdict_journal,
)
from int8kit.verify.mutation.parsed import Parsed
from int8kit.verify.mutation.rules import RULES
from int8kit.verify.mutation.triage import Judgement
from int8kit.verify.mutation.verdict import GeneratedVerdict, score
from int8kit.verify.properties import registry

GPU = gpus.present() or gpus.get("rtx3090")
FUNCTION = '''
@triton.jit
def kernel(x_ptr, y_ptr, stride_xm, stride_om, M, N, K):
    """Docstring 1."""
    rows = tl.arange(0, 16)
    x = tl.load(x_ptr + rows * stride_xm, mask=rows < M, other=0.0)
    x = x.to(tl.float32)
    tl.debug_barrier()
    tl.store(y_ptr, x, mask=(rows < M) & (rows >= 0))
    if K > 7:
        raise ValueError(f"{K} > 7: expected 7 or less")
'''


@pytest.fixture(scope="module")
def mutants():
    return generate.sample(300, seed=0)


def replaced(rule, source=FUNCTION):
    """{(old, new)} of a rule in a source."""
    parsed = Parsed("kernels/gemm_triton.py", source)
    edits = (edit for node in parsed.mutable_nodes() for edit in RULES[rule](parsed, node))
    return {(parsed.between(edit.start, edit.end), edit.new) for edit in edits}


@pytest.mark.parametrize(
    ("rule", "found", "absent"),
    [
        ("constant", {("16", "17"), ("16", "15"), ("0.0", "1.0")}, {("1", "2")}),
        ("comparison", {("<", "<="), ("<", ">="), (">", ">=")}, {("<", "==")}),
        ("arithmetic", {("+", "-"), ("*", "+"), ("&", "|")}, {("@", "*")}),
        ("removal", {("tl.debug_barrier()", "pass"), ("x = x.to(tl.float32)", "pass")},
         {("rows = tl.arange(0, 16)", "pass")}),
        ("mask", {(", mask=rows < M, other=0.0", ""), ("(rows < M) & (rows >= 0)", "(rows < M)")},
         {("rows < M", "True")}),
        ("exchange", {("stride_xm", "stride_om"), ("M", "N"), ("x_ptr", "y_ptr"), ("0, 16", "16, 0")}, {("K", "rows")}),
        ("cast", {("x.to(tl.float32)", "x")}, {("tl.load", "x")}),
        ("order", {("tl.debug_barrier()\n    tl.store(y_ptr, x, mask=(rows < M) & (rows >= 0))",
                    "tl.store(y_ptr, x, mask=(rows < M) & (rows >= 0))\n    tl.debug_barrier()")}, {("a", "b")}),
        ("keyword", set(), {(", mask=rows < M", "")}),
        ("condition", {("K > 7", "True"), ("K > 7", "False")}, {("rows < M", "True")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_rule(rule, found, absent):
    edits = replaced(rule)
    assert found <= edits
    assert not absent & edits


def test_keywords_are_dropped_and_flags_turned():
    edits = replaced("keyword", "def f(x):\n    return g(x, flag=True, maxsize=3)\n")
    assert edits == {(", flag=True", ""), ("True", "False")}


def test_stores_in_a_row_keep_their_order():
    text = "@triton.jit\ndef f(s):\n    a_buffer.store(s)\n    if s:\n        b_buffer.store(s)\n    tl.store(c, s)\n"
    assert replaced("order", text) == set()
    barrier = text.replace("tl.store(c, s)", "barrier()")
    assert [new for _, new in replaced("order", barrier)] == ["barrier()\n    if s:\n        b_buffer.store(s)"]


def test_parts_that_decide_nothing_are_left_out():
    lines = FUNCTION.splitlines()
    places = {m.context for m in generate.places("kernels/gemm_triton.py", FUNCTION)}
    assert '"""Docstring 1."""' not in places
    assert not any(
        m.old == "7" and "expected" in m.context for m in generate.places("kernels/gemm_triton.py", FUNCTION)
    )
    assert lines[-1].strip() in places  # the statement itself can be removed
    named = {m.function for m in generate.every()}
    assert {"_gemm_triton", "launch", "Operands.key", "Plan.choose"} <= named
    assert not {"source", "divisibility", "default_tile", "RowTile", "kernel_hash"} & named
    assert all(m.old != "group_m" for m in generate.every())


def test_sample_is_deterministic_and_has_no_duplicates(mutants):
    assert generate.sample(300, seed=0) == mutants
    assert len({(m.file, m.start, m.end, m.new) for m in mutants}) == len({m.name for m in mutants}) == 300
    other = generate.sample(300, seed=1)
    assert len(set(other) & set(mutants)) < 150


def test_every_rule_and_file_has_ten_mutants(mutants):
    by_file, by_rule = generate.counts(mutants)
    able_by_file, able_by_rule = generate.counts(generate.every())
    assert set(by_file) == set(sources.FILES)
    assert set(by_rule) == set(RULES)
    for found, able in ((by_file, able_by_file), (by_rule, able_by_rule)):
        assert all(count >= min(10, able[name]) for name, count in found.items())


def test_a_mutant_is_one_replacement_that_python_accepts(mutants):
    for mutant in mutants[::10]:
        text = generate.read(mutant.file)
        changed = mutant.applied(text)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
        before, after = mutant.diff(text)
        assert mutant.context.split()[0] in before
        assert before != after
        assert generate.find(mutant.name) == mutant


def test_parts_are_disjoint_and_complete(mutants):
    parts = [generate.part(mutants, number, 4) for number in (1, 2, 3, 4)]
    assert Counter(m for one in parts for m in one) == Counter(mutants)
    assert {len(one) for one in parts} == {75}


def test_kernel_and_rule_restrict_the_sample():
    found = generate.sample(20, 0, kernels=["epilogue", "ops"], rules=["exchange", "cast"])
    assert {m.stem for m in found} == {"epilogue", "ops"}
    assert {m.rule for m in found} == {"exchange", "cast"}
    for wrong in ({"kernels": ["pointer"]}, {"rules": ["delete"]}):
        with pytest.raises(UnknownName):
            generate.sample(5, 0, **wrong)
    with pytest.raises(UnknownName, match="gemm_triton"):
        generate.find("pointer:1:1:mask")
    with pytest.raises(UnknownName, match="unknown mutant"):
        generate.find("gemm_triton:1:1:mask")


def test_what_no_cpu_executes_needs_a_gpu(mutants):
    alone = {m.function for m in mutants if m.gpu_alone}
    assert {m.stem for m in generate.every() if m.stem in ("gemm_mma_sync", "stream_k") and not m.gpu_alone} == set()
    assert "launch_cached" in alone
    assert "quotient" in {m.function for m in generate.every() if m.gpu_alone}
    assert not {"clamped_quotient", "_scaled_mm_cpu", "l2_swizzle"} & alone


def test_every_file_has_properties_that_reach_it():
    for file in sources.FILES:
        names = reach.properties_of(file)
        assert len(set(names)) == len(names)
        assert set(names) <= {*registry.PROPERTIES, *registry.PROOFS}
    assert reach.properties_of("kernels/quantize.py")[0] == "quantize"
    assert "quantize" not in reach.properties_of("kernels/gemm_triton.py")


def test_judgements_match_a_place_and_are_few(mutants):
    rows = triage.judgements()
    assert len({row[:4] for row in rows}) == len(rows)
    listed = list(generate.every())
    for row in rows:
        assert any(row.matches(mutant) for mutant in listed), row
        assert len(row.reason) > 20
        assert not row.reason.endswith(".")
    judged = [mutant for mutant in mutants if triage.reason(mutant) is not None]
    assert len(judged) <= triage.MOST * len(mutants)


def test_a_judgement_is_about_one_text(mutants):
    row = Judgement(mutants[0].file, mutants[0].old, mutants[0].new, mutants[0].context, "it changes no bit")
    assert triage.reason(mutants[0], [row]) == "it changes no bit"
    assert triage.reason(replace(mutants[0], new="another"), [row]) is None


def verdict(mutant, ending, **more):
    return GeneratedVerdict(mutant.name, mutant.file, mutant.line, mutant.rule, "before", "after", ending, **more)


def test_journal_survives_a_kill(tmp_path, mutants):
    output = tmp_path / "score.json"
    journal = verdict_journal.VerdictJournal(output, {"source": "a"})
    journal.add_sound("output")
    journal.add(verdict(mutants[0], "survived"))
    journal.add(verdict(mutants[0], "equivalent"))
    with journal.path.open("a") as file:
        file.write('{"verdict": {"name": "half a l')  # the kill
    again = verdict_journal.VerdictJournal(output, {"source": "a"})
    assert again.path == tmp_path / "score.json.journal"
    assert (again.sound, [v.ending for v in again.verdicts.values()]) == ({"output"}, ["equivalent"])
    again.add(verdict(mutants[1], "killed", by="output"))
    assert len(verdict_journal.VerdictJournal(output, {"source": "a"}).verdicts) == 2
    assert verdict_journal.VerdictJournal(output, {"source": "b"}).verdicts == {}
    again.path.write_text(again.path.read_text() + "[1]\n")
    with pytest.raises(FileError, match="damaged in line 2"):
        verdict_journal.VerdictJournal(output, {"source": "b"})


def test_journal_without_an_output_is_in_the_cache_folder():
    one, two = (verdict_journal.VerdictJournal(None, {"source": name}) for name in "ab")
    assert one.path.parent == two.path.parent
    assert one.path != two.path


def test_score_counts_what_ran(mutants):
    endings = ["killed", "killed", "killed", "survived", "equivalent", "triaged", "needs a GPU"]
    found = score(verdict(mutant, ending) for mutant, ending in zip(mutants, endings, strict=False))
    assert (found["killed"], found["survived"], found["score"]) == (3, 1, 0.75)
    assert sum(counts["killed"] for counts in found["by_file"].values()) == 3
    assert sum(counts["needs a GPU"] for counts in found["by_rule"].values()) == 1
    assert score([])["score"] is None


@pytest.mark.slow
@pytest.mark.process
def test_a_weak_verifier_lets_a_mutant_survive(monkeypatch, tmp_path, capfd, verb):
    """One file has its property, another one a property that does not reach it; the second run takes the journal."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(reach, "properties_of", lambda file: ("zero rows" if "ops" in file else "quantize",))
    monkeypatch.setattr(generated_campaign._Campaign, "_sound", lambda *_: [])
    places = [m for m in generate.every() if m.function in ("_linear_cpu", "quantize") and not m.gpu_alone]
    caught = next(m for m in places if m.context.startswith("_quantize if held") and m.old == "0")
    missed = next(m for m in places if m.function == "_linear_cpu")
    monkeypatch.setattr(generate, "sample", lambda *_, **__: (caught, missed))
    output = tmp_path / "score.json"
    _, err = verb("verify", "mutate", "--generate", "2", "-o", output, status=1)
    assert "1 of 2 mutants survived: a score of 50.0%, expected 95% or more" in err
    document = json.loads(output.read_text())
    by_name = {row["name"]: row for row in document["mutants"]}
    assert (by_name[caught.name]["by"], by_name[caught.name]["how"]) == ("quantize", "differs")
    assert by_name[missed.name]["tried"]["zero rows"] >= 10
    monkeypatch.setattr(process_pool, "run_all", lambda *_, **__: pytest.fail("a verdict was lost"))
    out, err = verb("verify", "mutate", "--generate", "2", "--at-least", "0.5", "-o", output)
    assert f"2 of 2 verdicts are in {output}.journal" in err
    assert f"survived: int8kit/ops.py:{missed.line}" in out
    assert f"to repeat it:\n  int8kit verify mutate --only {missed.name}" in out
    assert not list(tmp_path.glob("int8kit-*"))


@pytest.mark.slow
@pytest.mark.process
def test_equivalent_mutants_compile_to_the_same_code(monkeypatch, tmp_path):
    file = "kernels/swiglu_quantize.py"
    same = next(m for m in generate.places(file, generate.read(file)) if m.function == "_swiglu_quantize")
    text = generate.read(file)
    at = len(text[: text.index("for c in tl.static_range(len(pairs))")].encode())
    equal = replace(same, start=at, end=at + 3, old="for", new="if True:\n        pass\n    for")
    other = next(
        m for m in generate.places(file, text) if m.old == "g, u" or m.new == "u, g" or "silu(g) * u" in m.context
    )
    executor = executors.Executor("interpreter", "cpu", "a CPU")
    campaign = generated_campaign._Campaign([equal, replace(other, name="other")], [executor], None,
                                            lambda *_: None, lambda _: None)  # fmt: skip
    campaign.verdicts = {m.name: verdict(m, "survived") for m in campaign.mutants}
    monkeypatch.setattr(equivalence, "groups_of", lambda stem: ("swiglu_quantize",))
    with campaign.copies(tmp_path):
        campaign.compare_survivors(120, most=1)
    assert campaign.verdicts[equal.name].ending == "equivalent"
    assert campaign.verdicts["other"].ending == "survived"
    assert campaign.verdicts["other"].compared


def test_stripped_code_has_no_names_of_files():
    ptx = '// made by\n.version 8\n\n.loc 1 2 3\nadd.s32 %r1; // x.py:7\n.file 1 "x.py"\n.section .debug\nmore\n'
    assert equivalence.stripped(ptx) == ".version 8\nadd.s32 %r1;"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--part", "1/2"), ["--part without --generate"]),
        (("--generate", "9", "--part", "3/2"), ["--part 3/2", "2/4"]),
        (("--generate", "0"), ["--generate 0", "1 or more"]),
        (("--generate", "9", "--only", "scales-joined"), ["--only with --generate"]),
        (("--generate", "9", "--kernel", "pointer"), ["pointer", "gemm_triton"]),
        (("--generate", "9", "--rule", "x"), ["'x'", "constant"]),
        (("--generate", "9", "--at-least", "95"), ["--at-least 95", "0 to 1"]),
        (("--generate", "9", "--examples", "5"), ["--examples"]),
        (("--only", "scales-joined", "--only", "ops:1:1:mask"), ["not both"]),
        (("--only", "ops:1:1:mask"), ["unknown mutant"]),
    ],
    ids=" ".join,
)
def test_usage_errors(capfd, args, words):
    with pytest.raises(SystemExit) as exit_:
        main.main(["verify", "mutate", *args])
    _, err = capfd.readouterr()
    assert exit_.value.code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
