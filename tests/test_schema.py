"""schema.py and toolchain.py: proofs, and the Triton generations that share compiled code."""

import pytest
from entries import GPU, B, entry, stamped
from pydantic import ValidationError

from int8kit.database.database import Database
from int8kit.database.schema import Entry
from int8kit.errors import InputError
from int8kit.spec import Kernel, Operation
from int8kit.toolchain import Toolchain, generation, release


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.6.0", "3.6"), ("3.7.1", "3.6"), ("3.8.0", "3.8"), ("3.9.0+git1", "3.8"), ("3.12.0", "3.8"), ("3.5.1", "3.6")],
)
def test_generations_of_triton(version, expected):
    assert generation(version) == expected


def test_malformed_triton_version():
    with pytest.raises(InputError, match=r"Triton .main.: expected a version such as 3\.7\.1"):
        release("main")


def test_equal_toolchains_hash_alike():
    first, second = ({Kernel.TRITON: "a", Kernel.WGMMA: "b"}, {Kernel.WGMMA: "b", Kernel.TRITON: "a"})
    assert hash(Toolchain("3.7.1", first)) == hash(Toolchain("3.7.1", second))
    assert Toolchain("3.7.1", first) == Toolchain("3.7.1", second)


def test_stamp_proves_one_configuration_kernel_triton_and_numerics():
    here = Toolchain("3.7.1", {Kernel.TRITON: "k1"})
    base = stamped(Database(GPU).merged([entry()]))
    (proven,) = base.entries
    assert len(proven.proofs(here, 86)) == 1
    for other in (
        Toolchain("3.7.0", here.kernel_hashes),
        Toolchain("3.6.0", here.kernel_hashes),
        Toolchain("3.7.1+git1", here.kernel_hashes),
        Toolchain("3.7.1", {Kernel.TRITON: "k2"}),
        Toolchain("3.7.1", here.kernel_hashes, numerics=2),
    ):
        assert proven.proofs(other, 86) == []
    for edit in ({"config": B}, {"m": 4097}, {"n": 4609}, {"operation": Operation.SWIGLU}):
        assert proven.model_copy(update=edit).proofs(here, 86) == []
    for change in ({"kernel": "k2"}, {"triton": "3.6.0"}, {"numerics": 2}):
        assert stamped(Database(GPU).merged([entry()]), **change).entries[0].proofs(here, 86) == []
    assert proven.proofs(here, 89) == []
    (only,) = stamped(Database(GPU).merged([entry()]), "interpreter", arch=None).entries
    assert only.proofs(here, 86) == []  # nothing was compiled
    assert len(only.stamps(here)) == 1


@pytest.mark.parametrize(
    "row",
    [{"m": 0}, {"host": "pc"}, {"time_us": float("nan")}, {"time_us": 0.0}, {"tried": -1}, {"triton": "main"}],
)
def test_entry_refuses_values_outside_the_schema(row):
    good = entry().model_dump()
    assert Entry.model_validate(good) == entry()
    with pytest.raises(ValidationError, match=next(iter(row))):
        Entry.model_validate(good | row)
