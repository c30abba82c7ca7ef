"""The torch operators of the row kernels on the CPU: values, schema, fake kernels, torch.compile."""

import pytest
import torch

from int8kit import ops, reference


def _operands():
    g = torch.Generator().manual_seed(0)
    x, branch = torch.randn(2, 6, 64, generator=g).bfloat16()
    w = torch.randn(2, 64, generator=g).bfloat16()
    gate, modulation = torch.randn(2, 3, 64, generator=g).bfloat16()
    qkv, (cos, sin) = torch.randn(6, 3 * 2 * 32, generator=g).bfloat16(), torch.randn(2, 3, 32, generator=g).bfloat16()
    return {
        "rms_norm_quantize": [(x, w[0], modulation, 1e-5), (x, None, None, 1e-5)],
        "residual_norm_quantize": [(x, branch, w[0], gate, w[1], modulation, 1e-5)],
        "swiglu_quantize": [(x,)],
        "qk_norm_rope": [(qkv, w[0, :32], w[1, :32], cos, sin, 2, 1e-5)],
    }


CASES = [(name, args) for name, calls in _operands().items() for args in calls]


@pytest.mark.parametrize(("name", "args"), CASES)
def test_operator_equals_the_reference(name, args):
    for got, want in zip(getattr(ops, name)(*args), getattr(reference, name)(*args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "args"), CASES)
def test_schema_and_fake_kernels(name, args):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.int8kit, name).default, args, test_utils=checks)


@pytest.mark.parametrize(("name", "args"), CASES)
def test_compiles_without_a_graph_break(name, args):
    call = getattr(ops, name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), call(*args), strict=True):
        assert torch.equal(got, want)
