"""Invented database entries of one GPU, for tests."""

from int8kit import gpus
from int8kit.database.schema import Entry, Resources, stamp
from int8kit.spec import Source, TileConfig

GPU = gpus.get("rtx3090")
A, B, C = TileConfig(64, 64, 64, 4, 3), TileConfig(128, 128, 64, 8, 3), TileConfig(128, 64, 64, 4, 4)


def entry(m=4096, n=4608, k=4608, config=A, source=Source.MODELLED, triton="3.7.1", kernel="k1", **more):
    resources = Resources(registers=100, spill_bytes=0, shared_bytes=32768)
    return Entry(
        m=m, n=n, k=k, config=config, source=source, triton=triton, kernel=kernel, resources=resources, tried=9, **more
    )


def stamped(base, executor="native", **change):
    """`base` with a stamp of its only entry."""
    (one,) = base.entries
    about = {"device": "RTX", "arch": 86, "kernel": one.kernel, "triton": one.triton, **change}
    numerics = about.pop("numerics", 1)
    new = stamp(executor, entry=one, **about).model_copy(update={"numerics": numerics})
    return base.stamped({one.key: [new]})
