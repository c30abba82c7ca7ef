"""The committed digests on a GPU: the reference in torch's GPU kernels, and int8kit's operators."""

import golden
import torch

from int8kit import ops, reference
from int8kit.spec import NUMERICS_VERSION

COMMITTED = golden.known()[str(NUMERICS_VERSION)]


def test_reference_gives_the_committed_digests():
    assert golden.digests(reference, "cuda") == COMMITTED


def test_kernels_give_the_committed_digests():
    gemm = golden.digests(ops, "cuda", {"quantize", "scaled_mm", "scaled_mm_swiglu"})
    rows = golden.digests(
        ops, "cuda", {"rms_norm_quantize", "residual_norm_quantize", "swiglu_quantize", "qk_norm_rope"}
    )
    assert len(gemm) == 18
    assert len(rows) == 21
    assert gemm | rows == {name: COMMITTED[name] for name in gemm | rows}


def test_layer_operators_give_the_committed_digests():
    functions = {"linear": "int8_linear", "linear_swiglu": "int8_linear_swiglu"}
    for name, (function, args, _) in golden.cases().items():
        if function in functions:
            on = [value.cuda() if isinstance(value, torch.Tensor) else value for value in args]
            assert golden.digest(getattr(ops, functions[function])(*on)) == COMMITTED[name]
