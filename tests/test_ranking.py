"""ranking.py and database/borrow.py: configurations for shapes and GPUs that nobody has tuned for."""

import time
from dataclasses import replace

import pytest
from entries import GPU, A, B, C, entry

from int8kit import gpus
from int8kit.cost_model import Needs, assumed_needs, estimate, machine_of
from int8kit.database import borrow, store
from int8kit.database.database import Database
from int8kit.kernels import gemm
from int8kit.ranking import CLOSE, Evidence, Origin, Ranked, Ranking
from int8kit.spec import GemmShape, Kernel, Operation, Source, TileConfig, architecture_default, default_config
from int8kit.toolchain import ANY_TOOLCHAIN, PORTABLE_ARCHS

H200, H100 = gpus.get("h200"), gpus.get("h100")
TALL, WIDE, LOW = (
    TileConfig(*tile, 8, stages, kernel=Kernel.WGMMA)
    for *tile, stages in ((256, 128, 128, 4), (128, 128, 128, 6), (64, 64, 128, 10))
)
POOL = (TALL, WIDE, LOW)


def needs(config):
    return assumed_needs(config, 90)


def ranking(*, borrowed=False, **more):
    return Ranking(machine_of(H200), tuple(Ranked(c, needs(c), borrowed) for c in POOL), **more)


@pytest.mark.parametrize("shape", [(1, 4608, 4608), (100, 1000, 3008), (4296, 12288, 4608), (40000, 200, 640)])
def test_fastest_estimate_comes_first(shape):
    shape = GemmShape(*shape)
    found = ranking().estimates(shape)
    default = architecture_default(shape, 90, H200.shared_memory)
    assert {one.config for one in found} == {*POOL, default}
    least = min(estimate(shape, config, needs(config), H200) for config in POOL)
    assert found[0].us <= 1.02 * least
    assert [one.us for one in found if one.us > 1.02 * least] == sorted(
        one.us for one in found if one.us > 1.02 * least
    )
    assert {one.origin for one in found} <= {Origin.OWN, Origin.DEFAULT}


def test_kernels_that_do_not_support_a_shape_are_left_out():
    for shape, operation in (
        (GemmShape(900, 512, 1000), Operation.GEMM),
        (GemmShape(900, 1004, 1024), Operation.GEMM),
        (GemmShape(900, 1000, 1024), Operation.SWIGLU),
    ):
        [only] = ranking().estimates(shape, operation)
        assert (only.config, only.origin) == (default_config(shape), Origin.DEFAULT)


def test_configurations_that_do_not_fit_are_left_out():
    large = Ranking(machine_of(replace(H200, shared_memory_sm=102400)), (Ranked(WIDE, needs(WIDE)),))
    assert {one.config for one in large.estimates(GemmShape(900, 512, 1024))}.isdisjoint({WIDE, TALL})


def test_the_first_of_equal_estimates_serves():
    shape = GemmShape(4296, 12288, 4608)
    swizzled = [replace(WIDE, group_m=width) for width in (4, 8, 12)]  # the model hardly distinguishes them
    for order in (swizzled, swizzled[::-1]):
        one = Ranking(machine_of(H200), tuple(Ranked(c, needs(c)) for c in order))
        assert one.estimates(shape)[0].config == order[0]


def test_entry_of_the_lender_wins_where_the_model_errs():
    """On a GPU of equal figures, at a shape that is close to the entry's, and not beyond."""
    shape = GemmShape(4296, 12288, 4608)
    assert ranking(borrowed=True).estimates(shape)[0].config != LOW  # by the model alone
    lent = ranking(borrowed=True, lender=machine_of(H100), evidence=(Evidence(shape, LOW),))
    close, beyond = (replace(shape, m=int(shape.m * factor)) for factor in (CLOSE, 1.2))
    for one in (shape, close):
        first = lent.estimates(one)[0]
        assert (first.config, first.origin) == (LOW, Origin.BORROWED)
    assert lent.estimates(beyond)[0].config != LOW


def test_swiglu_writes_half():
    shape, slow = GemmShape(8192, 8192, 128), replace(H200, dram_gb_s=100)
    plain, swiglu = (estimate(shape, WIDE, needs(WIDE), slow, operation) for operation in Operation)
    assert swiglu == pytest.approx(plain / 2, rel=0.05)


def test_nearest_database_of_the_architecture_lends():
    def lender(gpu, entries=()):
        return borrow.lender_of(Database(gpu, entries), ANY_TOOLCHAIN, store._readable)

    def made_up(arch, like, **figures):
        return replace(gpus.get(like), alias="gpu", arch=arch, **figures)

    assert lender(H100).gpu.alias == "h200"
    assert lender(made_up(86, "rtx3060")).gpu.alias == "rtx3090"  # the only one of sm_86 that was timed
    assert lender(made_up(89, "l40s", sms=128, clock_mhz=2520)).gpu.alias in ("rtx4090", "l40s")
    assert lender(made_up(87, "rtx3060", sms=16)).gpu.alias == "rtx3090"  # no file of sm_87
    assert lender(made_up(121, "rtx5090", sms=48)).gpu.alias == "rtx5090"
    assert lender(made_up(100, "h200")) is None  # nothing of this family
    assert lender(gpus.get("h200"), store.load(store.find("h200")).entries) is None  # it has enough
    assert set(PORTABLE_ARCHS) < set(borrow._FAMILIES[0])


def test_borrowed_configurations_fit_the_borrower():
    lender = store.load(store.find("h200"))
    own = Database(replace(lender.gpu, alias="small", shared_memory=190000), lender=lender)
    lent = own.ranking(GemmShape(1, 4608, 4608), ANY_TOOLCHAIN).kernels
    assert 0 < len(lent) < len(lender.kernels(ANY_TOOLCHAIN))
    assert all(one.needs.shared_bytes <= 190000 and one.borrowed for one in lent)


def test_own_entries_come_before_borrowed_ones():
    lender = Database(GPU).merged([entry(config=A), entry(m=9000, config=B, source=Source.PROXY, time_us=9.0)])
    own = Database(replace(GPU, alias="mine"), lender=lender).merged([entry(config=C)])
    assert own.resolve(GemmShape(4096, 4608, 4608), ANY_TOOLCHAIN).level == "exact"
    kernels = own.ranking(GemmShape(1, 4608, 4608), ANY_TOOLCHAIN).kernels
    assert [(one.config, one.borrowed) for one in kernels] == [(C, False), (A, True), (B, True)]
    assert own.ranking(GemmShape(1, 4608, 4608), ANY_TOOLCHAIN).evidence == (Evidence(GemmShape(9000, 4608, 4608), B),)


@pytest.mark.parametrize("alias", ["h200", "h100", "rtx3090"])
def test_a_weight_and_a_call_take_a_millisecond(alias):
    """The quickest of several, since other processes share the machine."""
    base, _ = store.merged_view(gpus.get(alias), gemm.toolchain())
    base.plan(64, 64, gemm.toolchain())  # sorts the entries

    def quickest(calls):
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    plan = base.plan(12288, 4608, gemm.toolchain())
    assert quickest([lambda n=n: base.plan(n, 4608, gemm.toolchain()) for n in range(9000, 16000, 500)]) < 1e-3
    assert quickest([lambda m=m: plan.choose(GemmShape(m, 12288, 4608)) for m in range(700, 2000, 100)]) < 1e-3


def test_assumed_resources_are_those_of_the_default():
    assert assumed_needs(TileConfig(128, 128, 64, 8, 4), 86) == Needs(128, 0, 49152)
