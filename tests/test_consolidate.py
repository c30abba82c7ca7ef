"""tune/consolidate.py: the greedy choice of few kernels keeps every shape within the slack of its best time."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from int8kit.database.schema import Entry, Resources, RunnerUp, Stamp
from int8kit.spec import Kernel, Source, TileConfig
from int8kit.tune import consolidate

FREE = Resources(registers=128, spill_bytes=0, shared_bytes=49152)
A, B, C = (TileConfig(128, 128, 128, 4, stages, kernel=Kernel.MMA_SYNC) for stages in (2, 3, 4))


def entry(m, *timed, default=None, **over):
    """An entry whose winner is the first of `timed`, pairs of a configuration and its microseconds."""
    first, *others = [RunnerUp(config=c, kernel=f"hash-{c.num_stages}", resources=FREE, time_us=us) for c, us in timed]
    return Entry(
        m=m, n=4608, k=4608, source=Source.PROXY, triton="3.6.0", tried=3, runners_up=tuple(others),
        **{**{name: getattr(first, name) for name in RunnerUp.model_fields}, **over},
    )  # fmt: skip


def test_shapes_share_a_kernel_within_the_slack():
    entries = [
        entry(1, (A, 100.0), (B, 100.9), (C, 110.0)),
        entry(2, (B, 200.0), (C, 201.0)),
        entry(3, (C, 300.0), (B, 302.9)),
        entry(4, (C, 400.0), (B, 405.0)),  # B is 1.25 % behind
    ]
    reduced = consolidate.reduce(entries)
    assert [e.config for e in reduced] == [A, C, C, C]  # B would serve as many shapes at a higher cost
    swapped = reduced[1]
    assert (swapped.time_us, swapped.kernel) == (201.0, "hash-4")
    assert [(o.config, o.time_us, o.kernel) for o in swapped.runners_up] == [(B, 200.0, "hash-3")]
    assert [reduced[i] for i in (0, 2, 3)] == [entries[i] for i in (0, 2, 3)]


def test_swizzle_widths_share_a_kernel():
    wide = replace(A, group_m=16)
    entries = [entry(1, (A, 100.0), (wide, 100.5)), entry(2, (wide, 100.0), (A, 100.5))]
    assert consolidate.reduce(entries) == entries
    assert len(consolidate.variants(entries)) == 1


def test_untimed_entries_stay_and_a_swap_voids_the_stamp():
    stamp = Stamp(executor="cross_arch", device="d", of="0" * 12, kernel="k", triton="3.6.0", numerics=1)
    modelled = entry(1, (A, 1.0)).model_copy(update={"time_us": None, "source": Source.MODELLED})
    entries = [modelled, entry(2, (A, 100.0), (B, 100.5), verified=(stamp,)), entry(3, (B, 9.0)), entry(4, (B, 9.0))]
    reduced = consolidate.reduce(entries)
    assert reduced[0] == modelled
    assert (reduced[1].config, reduced[1].verified) == (B, None)
    assert consolidate.reduce([]) == []


TILES = st.sampled_from([A, B, C, replace(A, group_m=4), replace(B, block_k=64)])
TIMES = st.lists(st.dictionaries(TILES, st.floats(90, 110), min_size=1), min_size=1, max_size=12)


@given(TIMES, st.floats(0, 0.2))
def test_no_entry_exceeds_the_slack_and_no_kernel_is_added(times, slack):
    entries = [entry(i + 1, *sorted(row.items(), key=lambda item: item[1])) for i, row in enumerate(times)]
    reduced = consolidate.reduce(entries, slack)
    for old, new, row in zip(entries, reduced, times, strict=True):
        assert new.time_us == row[new.config] <= old.time_us * (1 + slack)
        found = {new.config, *(o.config for o in new.runners_up)}
        assert found == set(row)  # no finalist is lost
    assert len(consolidate.variants(reduced)) <= len(consolidate.variants(entries))
