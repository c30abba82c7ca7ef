"""Upgrade of database files of earlier formats: /1 to /2.

    /2 of format /1: operations, ids of entries, the memory and L2 of the GPU, kernels by their instruction ("ampere" is
    "mma_sync"), stamps that say which code was compiled and which numerics was proven

A stamp of format /1 covered a kernel's device code and not its launcher, so none is taken over. An entry's own kernel
hash is translated where the device code is the one that /2 first hashed: its times still hold.
"""

from __future__ import annotations

from typing import Any

from int8kit import gpus
from int8kit.database.schema import FORMAT

OLD_FORMAT = "int8kit.tuning/1"
_KERNELS = {"pointer": "triton", "ampere": "mma_sync", "hopper": "wgmma"}
_SAME_CODE = {  # /1's hash of the device code, and /2's hash of the same kernel
    "6656f9177801": "aa6c90e35953",
    "b504fe8ad3d2": "afffa3f2d6b0",
    "e7d870ae1123": "4427f21d0bd3",
}


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A document of format /1 in the present format. Raises KeyError, TypeError or ValueError for a damaged one.

    Fields that format /1 did not have are left as they are, so that the present schema refuses them.
    """
    if not isinstance(document["entries"], list):
        raise TypeError("entries: expected a list")
    gpu = dict(document["gpu"])
    known = gpus.GPUS.get(gpu["alias"])
    if known is not None and (known.arch, known.sms, known.name) == (gpu["arch"], gpu["sms"], gpu["name"]):
        gpu |= {"memory_gib": known.memory_gib, "l2_bytes": known.l2_bytes}
    return {**document, "format": FORMAT, "gpu": gpu, "entries": [_entry(row) for row in document["entries"]]}


def dropped_stamps(document: dict[str, Any]) -> int:
    """How many stamps of a document of format /1 are not taken over."""
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
    return {**row, "config": config, "kernel": _SAME_CODE.get(row["kernel"], row["kernel"])}
