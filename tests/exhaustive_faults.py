"""Faults that only a proof of 2**29 inputs or more is sure to notice, and the check of one in a copy of the package."""

import tempfile
from pathlib import Path

from int8kit.spec import Kernel
from int8kit.verify.executors import Executor
from int8kit.verify.mutation import campaign, child
from int8kit.verify.mutation.mutant import Mutant
from int8kit.verify.process_pool import Call, run_all

ROWS, EPILOGUE, ACTIVATIONS = (f"kernels/{name}.py" for name in ("row_primitives", "epilogue", "activations"))
TRITON, MMA_SYNC, WGMMA = (f"kernels/gemm_{kernel}.py" for kernel in Kernel)


def _fault(name: str, file: str, old: str, new: str, expected: str) -> Mutant:
    return Mutant(name, file, old, new, name.replace("-", " "), expected)


FAULTS = (
    _fault("quotient-without-its-correction", ROWS, "q = tl.fma(tl.fma(-s, q, y), r, q) + ROUNDER", "q = q + ROUNDER",
           "quantize, every pair"),
    _fault("quotient-off-at-one-pair", ROWS, "q = tl.fma(tl.fma(-s, q, y), r, q) + ROUNDER",
           "q = tl.fma(tl.fma(-s, q, y), r, q) + ROUNDER + tl.where((y == 1.1015625) & (s > 0.5) & (s < 0.505), 1, 0)",
           "quantize, every pair"),
    # a quotient beyond 127 needs an amax below 2**-135, and the least 16-bit number is 2**-133
    _fault("subnormal-scales-not-clamped", ROWS, "1.0)), -127.0), 127.0)", "1.0)), -128.0), 127.0)",
           "row scale of fp32"),
    _fault("scale-wrong-at-one-number", ROWS, "tl.where(bits < 0x7F800000,",
           "tl.where((bits < 0x7F800000) & (bits != 0x40490FDB),", "row scale of fp32"),
    _fault("conversion-drops-one-bit", TRITON, "y.to(out_ptr.dtype.element_ty), mask",
           "tl.where(y == 3.1415927410125732, 3.0, y).to(out_ptr.dtype.element_ty), mask", "epilogue conversion"),
    _fault("conversion-flushes-subnormals", MMA_SYNC, "gl.store(ptrs, y.to(out_ptr.dtype.element_ty)",
           "gl.store(ptrs, gl.where((y < 1.1e-38) & (y > -1.1e-38), y * 0.0, y).to(out_ptr.dtype.element_ty)",
           "epilogue conversion"),
    _fault("staged-conversion-flushes-subnormals", WGMMA, "buffer.store(y.to(out_desc.dtype))",
           "buffer.store(gl.where((y < 1.1e-38) & (y > -1.1e-38), y * 0.0, y).to(out_desc.dtype))",
           "epilogue conversion"),
    _fault("accumulator-of-30-bits", EPILOGUE, "acc.to(tl.float32) * sx", "(acc << 1 >> 1).to(tl.float32) * sx",
           "accumulator conversion"),
    _fault("reciprocal-not-refined", ACTIVATIONS, "fma.rn.f32 $0, e, r, r; }", "mov.f32 $0, r; }", "silu of fp32"),
    _fault("silu-of-half-a-unit-less", ACTIVATIONS, "return h * (a * reciprocal(a + b))",
           "return h * (a * reciprocal(a + b)) * tl.where(h == 0.12345679104328156, 0.9999999, 1.0)", "silu of fp32"),
    _fault("gate-of-one-number", EPILOGUE, "return silu(gate) * up",
           "return silu(tl.where(gate == 0.12345679104328156, 0.0, gate)) * up", "swiglu epilogue"),
)  # fmt: skip


def verdict(mutant: Mutant | None, name: str, kernel: Kernel, executor: Executor) -> campaign.Verdict:
    """The verdict of one proof on a copy of the package, with a fault or without."""
    trial = campaign.Trial(mutant, kernel, (name,), executor)
    with tempfile.TemporaryDirectory() as root:
        [ending] = run_all(
            [Call(child.check, trial.request(None, 0))],
            open_place=lambda index: campaign._copy(mutant, Path(root).resolve()),
        )
    return campaign._verdict(trial, ending)
