"""problems.py: findings of `db check` in databases that were edited, merged or copied by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from int8kit import files, gpus
from int8kit.database import store
from int8kit.database.problems import problems
from int8kit.database.schema import stamp
from int8kit.spec import GemmShape, default_config
from int8kit.toolchain import Toolchain

SHIPPED = files.shipped("tuning_db")
TIMED = next(e for e in store.load(SHIPPED / "rtx3090.json").entries if (e.m, e.n, e.k) == (4296, 12288, 4608))
HERE = Toolchain(TIMED.triton, {TIMED.config.kernel: TIMED.kernel})


@pytest.fixture
def document():
    """A database of two timed, proven entries of an RTX 3090, as JSON."""
    base = store.load(SHIPPED / "rtx3090.json")
    entries = [e for e in base.entries if e.m in (4096, 4296) and (e.n, e.k) == (12288, 4608)]
    entries = [e.model_copy(update={"verified": None}) for e in entries if e.triton == TIMED.triton]
    assert len(entries) == 2
    proofs = {
        e.key: [stamp("cross_arch", device="NVIDIA H200", arch=86, entry=e, kernel=e.kernel, triton=e.triton)]
        for e in entries
    }
    return json.loads(replace(base, entries=tuple(entries)).stamped(proofs).dumps())


def found(document, tmp_path, toolchain=HERE):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    return problems(store.load(path), toolchain)


def first(document):
    return document["entries"][0]


def runner(document):
    return first(document)["runners_up"][0]


def test_sound_database_has_no_problems(document, tmp_path):
    assert found(document, tmp_path) == []


def copy_stamps(document):
    first(document)["verified"] = document["entries"][1]["verified"]


def become_default(document):
    row = first(document)
    config = default_config(GemmShape(row["m"], row["n"], row["k"]))
    row["config"] = {**vars(config)}
    row["id"] = None


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda d: first(d).update(source="measured"), "marked measured, but timed on NVIDIA H200"),
        (lambda d: first(d).update(measured_on="NVIDIA GeForce RTX 3090"), "marked proxy, but timed on NVIDIA GeForce"),
        (lambda d: first(d).update(measured_on=None), "marked proxy, but timed on no GPU"),
        (lambda d: first(d).update(source="modelled"), "marked modelled, but it has times"),
        (lambda d: first(d).update(policy=None), "has times, but no measurement policy"),
        (lambda d: first(d).update(policy=9), "unknown policy 9; expected one of 1, 2, 3"),
        (lambda d: first(d).update(time_us=1.0, p20_us=1.0, p80_us=1.0), "1.0 us is impossible; NVIDIA H200 needs"),
        (lambda d: first(d).update(bf16_us=1.0), "bf16 in 1.0 us is impossible; NVIDIA H200 needs"),
        (lambda d: first(d).update(p20_us=1e6), "the median .* lies outside its quantiles"),
        (lambda d: first(d).update(p80_us=None), "one quantile without the other"),
        (lambda d: first(d).update(default_us=first(d)["time_us"] / 2), "slower than the default"),
        (lambda d: runner(d).update(time_us=first(d)["time_us"] * 0.9, p20_us=None, p80_us=None),
         "a runner-up is faster"),
        (lambda d: runner(d).update(p20_us=1e6), "lies outside its quantiles"),
        (lambda d: runner(d).update(config=first(d)["config"]), "a configuration occurs twice"),
        (lambda d: first(d).update(tried=0), "0 configurations tried"),
        (lambda d: first(d)["resources"].update(registers=0), "no resources"),
        (lambda d: runner(d)["resources"].update(shared_bytes=0), "no resources"),
        (lambda d: first(d)["resources"].update(registers=256), "256 registers per thread; expected at most 255"),
        (lambda d: first(d)["resources"].update(shared_bytes=200000), "200000 bytes .* at most 101376 per block"),
        (become_default, "is the default configuration, but time_us"),
        (copy_stamps, "its stamp belongs to 4296x12288x4608: copied"),
        (lambda d: first(d).update(id="0" * 12), "edited since it was written"),
        (lambda d: first(d)["config"].update(group_m=3), "edited since it was written"),
        (lambda d: first(d)["config"].update(group_m=3), "changed since it was proven; run `int8kit verify"),
        (lambda d: first(d)["verified"][0].update(of="0" * 12), "changed since it was proven"),
        (lambda d: first(d)["verified"][0].update(arch=89), "a stamp for sm_89 code in a file for sm_86: copied"),
        (lambda d: first(d)["verified"][0].update(executor="native", arch=86), "native stamp .* H200, which is sm_90"),
        (lambda d: first(d)["verified"][0].update(triton="3.9.0"), "not proven under Triton .* as sm_86 code"),
        (lambda d: first(d)["verified"][0].update(kernel="0" * 12), "not proven under Triton .* as sm_86 code"),
        (lambda d: first(d)["verified"][0].update(numerics=2), "not proven under Triton .* as sm_86 code"),
        (lambda d: first(d)["verified"][0].update(executor="interpreter", arch=None), "only in the interpreter"),
        (lambda d: first(d).update(verified=None), "not proven under Triton .* as sm_86 code"),
        (lambda d: d["gpu"].update(sms=84), "header: sms 84, but 82 in the record of rtx3090"),
        (lambda d: d["gpu"].update(memory_gib=8), "header: memory_gib 8"),
        (lambda d: d["gpu"].update(l2_bytes=1), "header: l2_bytes 1"),
        (lambda d: d["gpu"].update(name="NVIDIA GeForce RTX 3090 Ti"), "header: name 'NVIDIA GeForce RTX 3090 Ti'"),
        (lambda d: d["policies"].update({"3": "stopwatch"}), "header: policy 3 has another text"),
        (lambda d: d["policies"].clear(), "header: no text for policy 3, which entries name"),
        (lambda d: d["policies"].update(abc=""), "header: policy 'abc': expected a number"),
        (lambda d: first(d).update(triton="2.1.0"), "tuned with Triton 2.1.0; the kernels need 3.6"),
        (lambda d: first(d).update(timed_with="3.7.0"), "migrated from Triton 3.7.0 to 3.6.0"),
        (lambda d: first(d).update(model_us=1e9), "estimate and time differ by a factor of"),
        (lambda d: first(d).update(model_us=1e308), r"estimate and time differ by a factor of \S{4,9}$"),
        (lambda d: first(d)["resources"].update(spill_bytes=8), "8 bytes of spills"),
        (lambda d: runner(d).update(kernel="0" * 12), "winner and runner-up have different hashes of one kernel"),
        (lambda d: first(d)["runners_up"].reverse(), "runners-up are not sorted by time"),
    ],
)  # fmt: skip
def test_edit_is_reported(document, tmp_path, edit, reason):
    edit(document)
    lines = found(document, tmp_path)
    assert [line for line in lines if re.search(reason, line)], lines


def test_proof_depends_on_the_toolchain(document, tmp_path):
    [line] = found(document, tmp_path, Toolchain("3.7.1", {}))
    assert "and 1 more: not proven under Triton 3.7.1 as sm_86 code with the present kernel" in line
    assert line.endswith("; run `int8kit verify --gpu rtx3090` on a GPU")
    [line] = found(document, tmp_path, Toolchain(TIMED.triton, {TIMED.config.kernel: "another"}))
    assert "the mma_sync kernel has changed since; tune and verify again" in line
    [line] = found(document, tmp_path, Toolchain("3.9.0", {}))
    assert "not proven under Triton 3.9.0 as sm_86 code" in line


def test_modelled_entry_needs_a_possible_estimate(document, tmp_path):
    document = json.loads((SHIPPED / "rtx3060.json").read_text())
    document["entries"] = document["entries"][:1]
    for us, reason in ((0.01, "0.01 us is impossible; NVIDIA GeForce RTX 3060 needs"), (None, "it has no estimate")):
        first(document)["model_us"] = us
        assert any(reason in line for line in found(document, tmp_path))


def test_tie_is_no_problem(document, tmp_path):
    """The tuner may keep a configuration that is within 1 % of the fastest."""
    runner(document).update(time_us=first(document)["time_us"] * 0.995, p20_us=None, p80_us=None)
    assert found(document, tmp_path) == []


def test_policy_of_a_later_version_stays_in_the_file(document, tmp_path):
    document["policies"]["99"] = "another clock"
    first(document)["policy"] = 99
    assert any("unknown policy 99" in line for line in found(document, tmp_path))
    path = tmp_path / "t.json"
    store.update(path, gpus.get("rtx3090"), [TIMED.model_copy(update={"m": 5000})])
    assert json.loads(Path(path).read_text())["policies"]["99"] == "another clock"


def test_shipped_entries_pass_every_check_but_the_proof():
    """The proof depends on the toolchain of the process."""
    for path in SHIPPED.glob("*.json"):
        lines = problems(store.load(path), Toolchain("3.6.0", {}))
        assert [line for line in lines if "not proven under" not in line] == []
