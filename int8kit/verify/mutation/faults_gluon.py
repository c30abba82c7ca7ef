"""Faults of the Gluon GEMM kernels (mma.sync and wgmma) and of their tile scheduler."""

from __future__ import annotations

from int8kit.verify.mutation.mutant import Mutant


def _mma_sync(name: str, old: str, new: str, fault: str, expected: str = "accumulator") -> Mutant:
    return Mutant(name, "kernels/gemm_mma_sync.py", old, new, fault, expected)


def _scheduler(name: str, old: str, new: str, fault: str) -> Mutant:
    return Mutant(name, "kernels/tile_scheduler.py", old, new, fault, "accumulator")


def _wgmma(name: str, old: str, new: str, fault: str, expected: str = "accumulator") -> Mutant:
    return Mutant(name, "kernels/gemm_wgmma.py", old, new, fault, expected)


MMA_SYNC_FAULTS = (
    _mma_sync("ampere-copy-past-k", "mask=ks + k < end)", "mask=ks + k < end + 16)",
            "16 bytes past the end of K are copied"),
    _mma_sync("ampere-dropped-wait",
            "STEPS * BLOCK_K):\n        async_copy.wait_group(STAGES - 2)\n", "STEPS * BLOCK_K):\n",
            "the first fragments of a pass are read before their copy is known to be complete"),
    _mma_sync("ampere-dropped-steps", "if rest + i * BLOCK_K < end:", "if rest + (i + 1) * BLOCK_K < end:",
            "the last step of K that fills no pass is left out"),
    _mma_sync("ampere-columns-exchanged", "+ i // 2 % 4) + 2 * j + i % 2", "+ i // 2 % 4) + 2 * (RUN - 1 - j) + i % 2",
            "a thread's columns come in another order than they are stored"),
    _mma_sync("ampere-scales-joined", "y = acc.to(gl.float32) * gl.expand_dims(sx, 1) * gl.expand_dims(sw, 0)",
            "y = acc.to(gl.float32) * (gl.expand_dims(sx, 1) * gl.expand_dims(sw, 0))",
            "the two scales are multiplied with each other first", "output"),
    _mma_sync("ampere-missing-reduction", "if k1 - k0 < steps:", "if k1 - k0 < 0:",
            "each part of a stream-K tile is stored as if it were the whole sum"),
    _scheduler("naive-owner", "return gl.cdiv((step + 1) * workers, total) - 1", "return step * workers // total",
              "the share's inverse is off where shares are uneven: a part's sums are missed"),
    _scheduler("stale-slot", "slot = 2 * other + index - start // steps", "slot = 2 * other",
              "a worker's first slot is read for its second tile too"),
    _scheduler("reduction-short-of-one", "owner(index * steps + steps - 1, total, workers) + 1)",
              "owner(index * steps + steps - 1, total, workers))",
              "the last worker of a stream-K tile is left out of its sum"),
    _scheduler("own-part-twice", "if other != worker and share", "if share",
              "the worker that completes a tile adds its own part twice"),
    _scheduler("counters-not-zeroed", "torch.zeros(max(leftover, 1)", "torch.ones(max(leftover, 1)",
              "the counts of finished steps do not start at zero"),
)  # fmt: skip

WGMMA_FAULTS = (
    _wgmma("hopper-wrong-phase", "mbarrier.wait(full.index(slot), step // STAGES & 1)",
            "mbarrier.wait(full.index(slot), step // STAGES & 1 ^ 1)",
            "a slot is read in the phase before it is full"),
    _wgmma("hopper-deadlock", "mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)",
            "mbarrier.wait(empty.index(slot), step // STAGES & 1)",
            "the loader waits for a first slot that nobody will empty"),
    _wgmma("hopper-same-half", "x = x.slice(ME * ROWS, ROWS, dim=0)", "x = x.slice(0, ROWS, dim=0)",
            "the second multiplier of a shared tile takes the first one's rows"),
    _wgmma("hopper-half-tiles", "waves * programs + pid // 2)", "waves * programs + pid)",
            "the halves of the last wave's tiles are taken for tiles"),
    _wgmma("hopper-racy-store", "buffer = staging.index(2 * ME + i % 2)", "buffer = staging.index(i % 2)",
            "the two multipliers stage their stores in the same buffers", "output"),
    _wgmma("hopper-partial-box", "gl.minimum(gl.cdiv(M - row, ROWS), BOXES)",
            "gl.minimum(gl.maximum((M - row) // ROWS, 1), BOXES)",
            "the last rows of x, which fill no box, are not copied"),
    _wgmma("hopper-store-column", "[row, col + i * WIDTH], buffer)", "[row, col], buffer)",
            "every chunk of a tile is stored over the first"),
    _wgmma("hopper-bias-over-scale", "bias_buffer = vectors.index(2 * ME + 1)", "bias_buffer = vectors.index(2 * ME)",
            "the bias overwrites the column scales in shared memory", "output"),
    _wgmma("hopper-no-wait", "gdc_wait()  #", "pass  #",
            "a launch that begins early reads what the kernel before it has yet to write", "order"),
)  # fmt: skip
