"""Migration of database entries to the Triton of this process."""

from __future__ import annotations

from int8kit.cost_model import blocks_per_sm
from int8kit.database.schema import Entry, Resources
from int8kit.gpus import Gpu


def supersedes(entry: Entry, copy: Entry | None) -> bool:
    """Whether `entry` is to be carried where `copy` is what serves its shape: a copy of what it was before, or none."""
    if copy is None:
        return True
    same = (copy.config, copy.kernel, copy.time_us) == (entry.config, entry.kernel, entry.time_us)
    return copy.timed_with is not None and not same


def migrated(entry: Entry, here: Resources | str, gpu: Gpu) -> Entry | str:
    """`entry` for the Triton that is here, or why its time would be another with what its kernel takes `here`."""
    import triton

    from int8kit.kernels import gemm

    if isinstance(here, str):
        return here
    if entry.kernel != gemm.kernel_hash(entry.config.kernel):
        return f"the {entry.config.kernel} kernel has changed since; tune again"
    if here.spill_bytes > entry.resources.spill_bytes:
        return f"{here.spill_bytes} bytes of spills, {entry.resources.spill_bytes} under Triton {entry.triton}"
    blocks, then = (blocks_per_sm(entry.config, r, gpu) for r in (here, entry.resources))
    if blocks < then:
        return f"{blocks} blocks a multiprocessor, {then} under Triton {entry.triton}"
    timed_with = entry.timed_with or entry.triton
    new = {"triton": triton.__version__, "timed_with": timed_with, "resources": here, "verified": None,
           "runners_up": None}  # fmt: skip
    return entry.model_copy(update=new)
