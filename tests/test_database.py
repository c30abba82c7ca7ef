"""database.py: lookup, merge and verification stamps of a database in memory."""

from dataclasses import replace
from statistics import geometric_mean

import pytest
from entries import GPU, A, B, C, entry, stamped

from int8kit import files
from int8kit.cost_model import Needs, estimate
from int8kit.database import database, store
from int8kit.database.database import Database
from int8kit.lookup import Candidate
from int8kit.spec import GemmShape, Kernel, Source, TileConfig, architecture_default, default_config, why_illegal
from int8kit.toolchain import ANY_TOOLCHAIN, Toolchain

NEEDS = Needs(100, 0, 32768)  # of `entry`


def test_levels():
    base = Database(GPU).merged([entry(m=1000), entry(m=4000, config=B), entry(n=12288, config=C)])
    assert base.resolve(GemmShape(1000, 4608, 4608), ANY_TOOLCHAIN).level == "exact"
    near = base.resolve(GemmShape(3900, 4608, 4608), ANY_TOOLCHAIN)
    assert (near.level, near.config) == ("nearest-m", B)
    assert base.resolve(GemmShape(1100, 4608, 4608), ANY_TOOLCHAIN).config == A
    other = base.resolve(GemmShape(4096, 12000, 4608), ANY_TOOLCHAIN)
    assert (other.level, other.config) == ("nearest", C)
    for far in (GemmShape(17000, 4608, 4608), GemmShape(249, 4608, 4608), GemmShape(4096, 1000, 4608)):
        default = architecture_default(far, 86, GPU.shared_memory)  # estimated to be faster than A, B and C
        assert default.kernel is Kernel.MMA_SYNC
        assert (base.resolve(far, ANY_TOOLCHAIN).config, base.resolve(far, ANY_TOOLCHAIN).level) == (default, "default")
        unaligned = replace(far, k=4600)  # which the mma_sync kernel cannot copy
        us = {config: estimate(unaligned, config, NEEDS, GPU) for config in (default_config(far), A, B, C)}
        chosen = base.resolve(unaligned, ANY_TOOLCHAIN).config
        assert us[chosen] < 1.05 * min(us.values())
    assert Database(GPU).resolve(GemmShape(3, 3, 3), ANY_TOOLCHAIN).config == default_config(GemmShape(3, 3, 3))


def test_provenance_names_another_toolchain():
    base = Database(GPU).merged([entry(config=A, triton="3.6.0"), entry(config=B, triton="3.9.0", kernel="k0")])
    shape = GemmShape(4096, 4608, 4608)
    assert base.resolve(shape, Toolchain("3.6.1", {})).config == A
    assert base.resolve(shape, Toolchain("3.9.2", {})).config == B
    k1 = {Kernel.TRITON: "k1"}
    assert base.resolve(shape, Toolchain("3.7.1", k1)).provenance == "modelled for 4096x4608x4608"
    old = Database(GPU).merged([entry(triton="3.6.0")]).resolve(shape, Toolchain("3.8.0", k1))
    assert old.config == A
    assert old.provenance == "modelled for 4096x4608x4608; tuned with Triton 3.6.0, running 3.8.0"
    assert "another kernel source" in base.resolve(shape, Toolchain("3.9.0", k1)).provenance
    other = Toolchain("3.9.0", {Kernel.MMA_SYNC: "k1"})  # of another kernel than the entry's
    assert "another kernel source" not in base.resolve(shape, other).provenance


def test_illegal_entry_never_serves():
    big = TileConfig(128, 256, 128, 8, 4)
    assert why_illegal(big, arch=86, shared_memory=GPU.shared_memory)
    base = Database(GPU).merged([entry(config=big)])
    assert base.resolve(GemmShape(4096, 4608, 4608), ANY_TOOLCHAIN).level == "default"


def test_merge_keeps_the_stronger_source():
    base = Database(GPU).merged([entry(config=A, source=Source.PROXY)])
    assert base.merged([entry(config=B, source=Source.MODELLED)]).entries[0].config == A
    assert base.merged([entry(config=B, source=Source.MEASURED)]).entries[0].config == B
    assert base.merged([entry(config=B, source=Source.PROXY)]).entries[0].config == B
    stale = base.merged([entry(config=B, source=Source.MODELLED, kernel="k2")])
    assert stale.entries[0].config == B
    hopper = replace(B, kernel=Kernel.WGMMA)  # the hash of another kernel cannot be compared
    assert base.merged([entry(config=hopper, source=Source.MODELLED, kernel="k2")]).entries[0].config == A
    assert base.merged([entry(config=B, triton="3.6.0")]).entries[0].config == A  # 3.6 and 3.7 compile the same code
    assert len(base.merged([entry(triton="3.9.0")]).entries) == 2


def test_stamps_belong_to_a_kernel_and_a_configuration():
    base = Database(GPU).merged([entry()])
    native = stamped(base)
    assert len(native.entries[0].verified) == 1
    assert stamped(stamped(base, "interpreter", arch=None)) == native
    assert stamped(native, "interpreter", arch=None) == native
    assert len(stamped(native, "interpreter", arch=None, triton="3.6.0").entries[0].verified) == 2
    both = stamped(native, "cross_arch", device="H200")
    assert {s.executor for s in both.entries[0].verified} == {"native", "cross_arch"}
    assert len(stamped(native, triton="3.6.0").entries[0].verified) == 2  # each Triton version needs its own proof
    newer = stamped(native, "interpreter", arch=None, kernel="k2")
    assert [s.kernel for s in newer.entries[0].verified] == ["k2"]
    assert native.merged([entry()]).entries[0].verified == native.entries[0].verified
    assert native.merged([entry(config=B)]).entries[0].verified is None


def test_choices_for_shapes_without_an_entry():
    base = Database(GPU).merged([entry(m=1000)])
    far = GemmShape(9, 64, 64)
    more = base.choices_without_entry([GemmShape(1000, 4608, 4608), GemmShape(1100, 4608, 4608), far], ANY_TOOLCHAIN)
    default = architecture_default(far, 86, GPU.shared_memory)
    assert [(choice.shape.m, choice.config) for choice in more] == [(9, default), (1100, A)]
    assert base.choices_without_entry([], ANY_TOOLCHAIN) == []


def test_entries_of_the_running_triton_generation_serve_first():
    here, there = entry(triton="3.7.1"), entry(triton="3.9.0")
    other = entry(m=100, triton="3.9.0")
    base = Database(GPU, (here, there, other))
    assert base.usable_entries(Toolchain("3.6.0", {})) == [here, other]
    assert base.usable_entries(Toolchain("3.8.0", {})) == [there, other]
    assert base.resolve(here.shape, Toolchain("3.8.0", {})).provenance.startswith("modelled")


def test_candidates_are_ranked_once_per_toolchain(monkeypatch):
    """`run` and `verify` resolve many shapes. A merge and another toolchain give other candidates."""
    ranked = []
    monkeypatch.setattr(database, "why_illegal", lambda config, **gpu: ranked.append(config))
    base = Database(GPU, (entry(config=A), entry(config=B, triton="3.9.0")))
    old, new = Toolchain("3.7.1", {}), Toolchain("3.9.0", {})
    for _ in range(3):
        for m in (100, 4000, 4096):
            assert base.resolve(GemmShape(m, 4608, 4608), old).config in (A, default_config(GemmShape(m, 4608, 4608)))
        assert base.resolve(GemmShape(4096, 4608, 4608), Toolchain("3.9.0", {})).config == B
    assert ranked == [A, B]
    merged = base.merged([entry(config=C, triton="3.7.1", source=Source.MEASURED)])
    assert merged.resolve(GemmShape(4096, 4608, 4608), old).config == C
    assert [c for c, _ in base.candidates(old)] == [Candidate(GemmShape(4096, 4608, 4608), A)]
    assert [c for c, _ in base.candidates(new)] == [Candidate(GemmShape(4096, 4608, 4608), B)]


@pytest.mark.parametrize(("alias", "mean"), [("h200", 0.97), ("rtx3090", 0.96)])
def test_choice_for_an_unknown_shape_is_fast(alias, mean):
    """Each timed entry is left out in turn. The choice is compared with the entry where it was a finalist there.

    The times of rtx3090 are those of its code on an H200, with other multiprocessors than it is ranked for.
    """
    base = store.load(files.shipped("tuning_db") / f"{alias}.json")
    timed = [e for e in base.entries if e.time_us and e.triton == "3.6.0"]
    ratios, levels = [], set()
    for e in timed:
        others = replace(base, entries=tuple(o for o in base.entries if o.shape != e.shape))
        choice = others.resolve(e.shape, ANY_TOOLCHAIN, e.operation)
        levels.add(choice.level)
        known = [(r.config, r.time_us) for r in (e, *(e.runners_up or ()))]  # group_m does not change the kernel
        same = [us for config, us in known if replace(config, group_m=choice.config.group_m) == choice.config]
        assert choice.level != "default" or choice.config.kernel is not Kernel.TRITON
        ratios += [e.time_us / max(same)] if same else []
    assert levels >= {"nearest-m", "model"}
    assert len(ratios) > 0.5 * len(timed)
    assert min(ratios) > 0.8
    assert geometric_mean(ratios) > mean
