"""Shared parts of the kernel tests: device, executor, operands of the row kernels, bitwise comparison."""

import torch
from hypothesis import HealthCheck, settings

from int8kit import gpus, reference
from int8kit.verify import executors
from int8kit.verify.compare import bitwise_diff
from int8kit.verify.properties import row_kernels
from int8kit.verify.properties.row_kernels import RowExample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXECUTOR = executors.available(gpus.get("rtx3090"))[-1]
# `quiet_interpreter` is a fixture of each test, and every example may share it
# `verify` draws more, and tries all fixed examples: tests/test_cli.py runs it
MANY = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def example(name, m, k, *, kind="normal", dtype=torch.bfloat16, images=1, padding=0, heads=1, seed=0):
    """An example of a row kernel: m rows in `images` images. k: row width, F of SwiGLU, or width of a head."""
    return RowExample(name, images, m // images, k, kind, seed, dtype, dtype, padding, heads)


def operands(name, m, k, *, device=DEVICE, **more):
    """The arguments of a row kernel and of its reference, for the example with these parameters."""
    return row_kernels.operands(example(name, m, k, **more), device)


def assert_equal(got, want):
    """Assert that two tuples of tensors have the same dtypes and the same bits; any NaN equals any other."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert bitwise_diff(a, b) is None


def assert_equals_reference(name, *args, **more):
    """Assert that a row kernel gives the bits of its reference. more: its tile."""
    assert_equal(row_kernels.KERNELS[name](*args, **more), getattr(reference, name)(*args))
