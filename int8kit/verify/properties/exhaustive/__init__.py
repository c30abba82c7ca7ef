"""Proofs that try every input of a finite domain."""

from __future__ import annotations

from int8kit.verify.properties.proof import Proof

PROOFS: tuple[Proof, ...] = ()
