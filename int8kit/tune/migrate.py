"""Migration of database entries to the Triton of this process.

migrate(database)  ->  ([Entry, ...] for this Triton, {GemmShape: the reason why its entry was left})
"""

from __future__ import annotations

from int8kit.cost_model import blocks_per_sm
from int8kit.database.database import Database
from int8kit.database.schema import Entry, Resources
from int8kit.gpus import Gpu
from int8kit.spec import GemmShape
from int8kit.toolchain import generation
from int8kit.tune import space, workers


def migrate(database: Database) -> tuple[list[Entry], dict[GemmShape, str]]:
    """Copies of the entries of other Triton generations for this one, and the reason for each shape that is left.

    Compiles the entries' kernels. Writes nothing.
    """
    import triton

    here = generation(triton.__version__)
    serving = {entry.tuned: entry for entry in database.entries if generation(entry.triton) == here}
    others = [entry for entry in database.entries if generation(entry.triton) != here]
    variants = {e.key: space.variant_of(e.config, e.tuned) for e in others if supersedes(e, serving.get(e.tuned))}
    if not variants:
        return [], {}
    with workers.Workers() as pool:
        compiled = pool.compile_all(database.gpu.arch, sorted(set(variants.values())))
    new: list[Entry] = []
    left: dict[GemmShape, str] = {}
    for entry in others:
        if entry.key in variants:
            result = migrated(entry, compiled[variants[entry.key]], database.gpu)
            if isinstance(result, str):
                left[entry.tuned] = result
            else:
                new.append(result)
    return new, left


def supersedes(entry: Entry, serving: Entry | None) -> bool:
    """Whether `entry` is to be migrated over `serving`, the entry that serves its shape under the present Triton.

    True if there is none, or if it is a migrated copy of an earlier state of `entry`.
    """
    if serving is None:
        return True
    same = (serving.config, serving.kernel, serving.time_us) == (entry.config, entry.kernel, entry.time_us)
    return serving.timed_with is not None and not same


def migrated(entry: Entry, here: Resources | str, gpu: Gpu) -> Entry | str:
    """`entry` for the present Triton, or why its time would not hold.

    here: resources of its kernel under the present Triton, or why it does not compile.
    """
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
        return f"{blocks} blocks per multiprocessor, {then} under Triton {entry.triton}"
    timed_with = entry.timed_with or entry.triton
    new = {"triton": triton.__version__, "timed_with": timed_with, "resources": here, "verified": None,
           "runners_up": None}  # fmt: skip
    return entry.model_copy(update=new)
