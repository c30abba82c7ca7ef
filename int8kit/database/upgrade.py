"""Conversion of database files of earlier formats: int8kit.tuning/1 to int8kit.tuning/2.

Format /2 has, compared with /1:

    entries  an operation and an id
    gpu      memory and L2 size
    kernels  named by their instruction: "mma_sync" was "ampere"
    stamps   the architecture of the compiled code and the numerics version

Stamps of format /1 are dropped: they covered the device code of a kernel, but not its launcher. The kernel hash of an
entry is translated if its device code is the one that /2 hashed first. Then the entry's times are still valid.
"""

from __future__ import annotations

from typing import Any

from int8kit import gpus
from int8kit.database.schema import FORMAT

OLD_FORMAT = "int8kit.tuning/1"
_KERNELS = {"pointer": "triton", "ampere": "mma_sync", "hopper": "wgmma"}
_TRITON, _MMA_SYNC, _WGMMA = "c65688858ada", "a3c48e6b0b14", "e0bec4d11928"
_WORD = ("card", "GPU")  # of earlier policy texts, and the word since
_SAME_SPEED = {
    # hashes of the device code, in format /1
    "6656f9177801": _TRITON,
    "b504fe8ad3d2": _MMA_SYNC,
    "e7d870ae1123": _WGMMA,
    # hashes before the kernels shared epilogue and L2 swizzle: docs/results/2026-11-26-h200-stamps.md
    "aa6c90e35953": _TRITON,
    "afffa3f2d6b0": _MMA_SYNC,
    "4427f21d0bd3": _WGMMA,
    # a wait that only SwiGLU in tiles of 64 columns needs; the code of every tuned configuration is the same
    "0530694a40e9": _WGMMA,
    # one more wait and arrival for each cooperative tile, of 36 steps or more in every tuned shape
    "fd4d3cd28e09": _WGMMA,
}
"""Earlier hashes of kernels, and the hash since. Times hold for both; proofs do not, and no stamp is translated."""


def with_present_names(document: dict[str, Any]) -> dict[str, Any]:
    """A document with the present hashes of kernels that have kept their speed, and the present words of policies."""
    policies = {number: text.replace(*_WORD) for number, text in document["policies"].items()}
    return {**document, "policies": policies, "entries": [_renamed(row) for row in document["entries"]]}


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    new = {**row, "kernel": _SAME_SPEED.get(row["kernel"], row["kernel"])}
    if row.get("runners_up") is not None:
        new["runners_up"] = [_renamed(one) for one in row["runners_up"]]
    return new


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A document of format /1, converted to the present format.

    Fields that are unknown in format /1 are kept, so that the present schema refuses them. Raises KeyError, TypeError
    or ValueError for a damaged document.
    """
    if not isinstance(document["entries"], list):
        raise TypeError("entries: expected a list")
    gpu = dict(document["gpu"])
    known = gpus.GPUS.get(gpu["alias"])
    if known is not None and (known.arch, known.sms, known.name) == (gpu["arch"], gpu["sms"], gpu["name"]):
        gpu |= {"memory_gib": known.memory_gib, "l2_bytes": known.l2_bytes}
    return {**document, "format": FORMAT, "gpu": gpu, "entries": [_entry(row) for row in document["entries"]]}


def dropped_stamps(document: dict[str, Any]) -> int:
    """Number of stamps in a document of format /1, which `upgraded` drops."""
    return sum(len(row.get("verified") or ()) for row in document["entries"])


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    new = {"operation": "gemm", **_kernel(row)}
    new.pop("verified", None)
    if "card_state" in new:
        new["gpu_state"] = new.pop("card_state")
    if new.get("runners_up") is not None:
        new["runners_up"] = [_kernel(one) for one in new["runners_up"]]
    return new


def _kernel(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a configuration and a kernel hash."""
    config = dict(row["config"])
    if "kernel" in config:
        config["kernel"] = _KERNELS.get(config["kernel"], config["kernel"])
    return {**row, "config": config, "kernel": _SAME_SPEED.get(row["kernel"], row["kernel"])}
