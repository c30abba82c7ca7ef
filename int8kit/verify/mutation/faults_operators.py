"""Faults of the torch operators, of the launch cache's key and of the stamps."""

from __future__ import annotations

from int8kit.verify.mutation.mutant import Mutant

FAULTS = (
    Mutant(
        "fake-linear-in-bfloat16", "ops.py",
        "return x.new_empty((*x.shape[:-1], wq.shape[0] // (1 + swiglu)))",
        "return x.new_empty((*x.shape[:-1], wq.shape[0] // (1 + swiglu)), dtype=torch.bfloat16)",
        "torch.compile takes the output of a linear for bfloat16, of whatever dtype x is", "operators",
    ),
    Mutant(
        "bias-rounded-on-a-cpu", "ops.py",
        "    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)\n",
        "    bias = None if bias is None else bias.to(out_dtype)\n"
        "    return product(xq, wq, sx, sw, bias, out_dtype=out_dtype)\n",
        "the CPU operator rounds the bias to the dtype of the output", "operators",
    ),
    Mutant(
        "stamp-of-any-kernel", "database/schema.py",
        "if s.of == own and toolchain.proves(", "if s.of == own or toolchain.proves(",
        "a stamp proves an entry under another kernel source", "stamps",
    ),
    Mutant(
        "key-without-n", "kernels/operands.py",
        "integers = self.n, self.k, *(matrix", "integers = self.k, self.k, *(matrix",
        "a kernel that was compiled for N a multiple of 16 is launched for another N", "launch cache",
        "the interpreter has no cache of compiled kernels",
    ),
)  # fmt: skip
