"""reference.py: committed digests of its results. Only a new numerics version may change them."""

import inspect

import golden
import pytest
import torch

from int8kit import ops, reference
from int8kit.spec import NUMERICS_VERSION


def test_reference_gives_the_committed_digests():
    committed = golden.known()
    assert str(NUMERICS_VERSION) in committed, "run `python tests/golden.py`, which adds this version's digests"
    now = golden.digests()
    changed = [name for name, one in committed[str(NUMERICS_VERSION)].items() if now.get(name) != one]
    assert not changed, f"the results changed for {changed}: raise NUMERICS_VERSION, then run tests/golden.py"
    assert set(now) == set(committed[str(NUMERICS_VERSION)])


def test_operators_give_the_committed_digests():
    names = {"quantize", "scaled_mm", "scaled_mm_swiglu"}
    committed = golden.known()[str(NUMERICS_VERSION)]
    now = golden.digests(ops, names=names)
    assert len(now) == 18
    assert now == {name: committed[name] for name in now}


def test_every_function_of_the_reference_has_a_digest():
    public = {name for name, value in vars(reference).items() if inspect.isfunction(value) and not name.startswith("_")}
    covered = {function for function, _, _ in golden.cases().values()}
    assert public - covered == {"dequantize", "rms_norm"}  # parts of `scaled_mm` and of `rms_norm_quantize`


def quantize_with_truncation(x):
    s = x.float().abs().amax(1) / 127
    return (x.float() / s[:, None]).nan_to_num(0, 0, 0).trunc().clamp(-127, 127).to(torch.int8), s


def dequantize_with_joined_scales(acc, sx, sw, bias, out_dtype):
    y = acc.float() * (sx[:, None] * sw)
    return (y if bias is None else y + bias.float()).to(out_dtype)


@pytest.mark.parametrize(
    ("name", "change", "functions"),
    [
        ("quantize", quantize_with_truncation, {"quantize", "linear"}),
        ("dequantize", dequantize_with_joined_scales, {"linear", "scaled_mm"}),
        ("silu", torch.nn.functional.silu, {"silu", "swiglu_quantize"}),
        ("mean_square", lambda x: (x * x).mean(-1), {"mean_square", "rms_norm_quantize"}),
    ],
)
def test_change_of_the_reference_changes_digests(monkeypatch, name, change, functions):
    committed = golden.known()[str(NUMERICS_VERSION)]
    monkeypatch.setattr(reference, name, change)
    changed = {case.split()[0].rstrip(",") for case, one in golden.digests().items() if committed[case] != one}
    assert functions <= changed


def test_digests_depend_on_bits_shape_and_dtype():
    zero = torch.zeros(3)
    assert golden.digest(zero) != golden.digest(-zero)
    assert golden.digest(zero) != golden.digest(zero.view(3, 1))
    assert golden.digest(zero) != golden.digest(zero.int())
    nan = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    assert golden.digest(nan) == golden.digest(torch.full((2,), torch.nan))


def test_inputs_cover_ordinary_and_special_values():
    """Digests of a narrow range of inputs would miss most changes."""
    values = golden.patterns("bits", 96, 3, torch.bfloat16)
    assert values.isnan().any()
    assert values.isinf().any()
    finite = golden.numbers("quantize", 17, 300, torch.bfloat16).float()
    assert finite.isfinite().all()
    assert finite.abs().amax(1).unique().numel() > 8
