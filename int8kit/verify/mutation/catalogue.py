"""The catalogue of seeded faults that the verifier must catch: replacements of text in one source file each.

    Mutant("k-tail-dropped", "kernels/gemm_triton.py",
           old="for k in range(0, K, BLOCK_K):", new="for k in range(0, K - BLOCK_K + 1, BLOCK_K):",
           fault="the last, partial step of K is left out", expected="accumulator")

`old` occurs exactly once in its file, and a test checks it, so that the catalogue cannot go stale unseen. A person who
writes such kernels makes these faults. `generate` makes other faults by rules, and nobody lists them.

The catalogue has no fault that changes no bit by definition, such as reading past M or N, which the mask of the store
drops anyway.
"""

from __future__ import annotations

from collections.abc import Iterable

from int8kit.errors import UnknownName
from int8kit.verify.mutation import faults_gluon, faults_operators, faults_rows, faults_triton
from int8kit.verify.mutation.mutant import Mutant

CATALOGUE: tuple[Mutant, ...] = (
    *faults_triton.FAULTS,
    *faults_rows.ACTIVATION_FAULTS,
    *faults_rows.ROW_FAULTS,
    *faults_rows.FUSED_FAULTS,
    *faults_gluon.MMA_SYNC_FAULTS,
    *faults_gluon.WGMMA_FAULTS,
    *faults_operators.FAULTS,
)
"""Every fault that `int8kit verify mutate` seeds."""


def find(names: Iterable[str]) -> tuple[Mutant, ...]:
    """The mutants of these names; all mutants if there are none. Raises UnknownName with the list."""
    listed = {mutant.name: mutant for mutant in CATALOGUE}
    for name in names:
        if name not in listed:
            raise UnknownName("fault", name, listed)
    return tuple(dict.fromkeys(listed[name] for name in names)) or CATALOGUE
