"""Proofs that read the compiled code of the kernels."""

from __future__ import annotations

from int8kit.verify.properties.proof import Proof

PROOFS: tuple[Proof, ...] = ()
"""The rows of this module in `registry.PROOFS`."""
