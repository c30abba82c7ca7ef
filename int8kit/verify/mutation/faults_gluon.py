"""Faults of the Gluon GEMM kernels (mma.sync and wgmma) and of their tile scheduler."""

from __future__ import annotations

from int8kit.verify.mutation.mutant import Mutant


def _mma_sync(name: str, old: str, new: str, fault: str, expected: str = "accumulator") -> Mutant:
    return Mutant(name, "kernels/gemm_mma_sync.py", old, new, fault, expected)


def _scheduler(name: str, old: str, new: str, fault: str, expected: str = "tile scheduler") -> Mutant:
    return Mutant(name, "kernels/stream_k.py", old, new, fault, expected)


def _wgmma(
    name: str, old: str, new: str, fault: str, expected: str = "accumulator", more: tuple[tuple[str, str], ...] = ()
) -> Mutant:
    return Mutant(name, "kernels/gemm_wgmma.py", old, new, fault, expected, more=more)


MMA_SYNC_FAULTS = (
    _mma_sync("mma-sync-copy-past-k", "mask=ks + k < end)", "mask=ks + k < end + 16)",
              "16 bytes past the end of K are copied"),
    _mma_sync("mma-sync-dropped-wait",
              "UNROLL * BLOCK_K):\n        async_copy.wait_group(STAGES - 2)\n", "UNROLL * BLOCK_K):\n",
              "the first fragments of a pass are read before their copy is complete"),
    _mma_sync("mma-sync-dropped-steps", "if rest + i * BLOCK_K < end:", "if rest + (i + 1) * BLOCK_K < end:",
              "the last k-step, which fills no pass, is left out"),
    _mma_sync("mma-sync-columns-exchanged", "+ i // 2 % 4) + 2 * j + i % 2",
              "+ i // 2 % 4) + 2 * (PAIRS - 1 - j) + i % 2",
              "a thread's columns are stored in another order"),
    _mma_sync("mma-sync-scales-joined", "y = dequantize(acc, gl.expand_dims(sx, 1), gl.expand_dims(sw, 0))",
              "y = acc.to(gl.float32) * (gl.expand_dims(sx, 1) * gl.expand_dims(sw, 0))",
              "the two scales are multiplied with each other first", "output"),
    _mma_sync("mma-sync-missing-reduction", "if k1 - k0 < steps:", "if k1 - k0 < 0:",
              "each segment of a stream-K tile is stored as if it were the whole sum"),
    _scheduler("naive-owner", "return gl.cdiv((step + 1) * workers, total) - 1", "return step * workers // total",
               "the inverse of the k-range is wrong for uneven ranges, so the fix-up misses a segment"),
    _scheduler("stale-workspace-slot", "slot = 2 * other + index - start // steps", "slot = 2 * other",
               "a worker's first workspace slot is also read for its second tile"),
    _scheduler("fix-up-short-of-one", "in range(first, last + 1):",
               "in range(first, last):",
               "the fix-up of a stream-K tile leaves out the last worker"),
    _scheduler("own-segment-twice", "if other != worker and range_start", "if range_start",
               "the worker that completes a tile adds its own segment twice"),
    _mma_sync("mma-sync-tile-offset-of-32-bits", "x_ptr + row.to(gl.int64) * stride_xm", "x_ptr + row * stride_xm",
              "offsets of the tiles of x overflow beyond 2**31 bytes"),
    _mma_sync("mma-sync-store-offset-of-32-bits", "gl.expand_dims(rows.to(gl.int64) * stride_om, 1)",
              "gl.expand_dims((rows * stride_om).to(gl.int64), 1)",
              "offsets of the rows of the output overflow beyond 2**31 elements", "mma_sync code"),
    _scheduler("fix-up-without-barrier", "    barrier()  # all threads", "    pass  # all threads",
               "one thread counts a segment that other threads are still storing"),
    _scheduler("counters-not-zeroed", "torch.zeros(max(leftover, 1)", "torch.ones(max(leftover, 1)",
               "the counts of finished steps do not start at zero"),
)  # fmt: skip

WGMMA_FAULTS = (
    _wgmma("wgmma-wrong-phase", "mbarrier.wait(full.index(slot), step // STAGES & 1)",
           "mbarrier.wait(full.index(slot), step // STAGES & 1 ^ 1)",
           "a buffer is read in the phase before it is full", "barriers"),
    _wgmma("wgmma-deadlock", "mbarrier.wait(empty.index(slot), step // STAGES & 1 ^ 1)",
           "mbarrier.wait(empty.index(slot), step // STAGES & 1)",
           "the producer warp waits for a first buffer that no consumer will release", "barriers"),
    _wgmma("wgmma-two-tiles-ahead", "    mbarrier.wait(order.index(CONSUMER), parity)\n",
           "    if CONSUMER == 1 or not COOPERATIVE:\n        mbarrier.wait(order.index(CONSUMER), parity)\n",
           "a consumer gets two tiles ahead of the other one, which then waits for ever", "barriers"),
    _wgmma("wgmma-same-half", "x = x.slice(CONSUMER * ROWS, ROWS, dim=0)", "x = x.slice(0, ROWS, dim=0)",
           "the second consumer of a cooperative tile takes the rows of the first"),
    _wgmma("wgmma-half-tiles", "whole_tiles * programs + pid // 2)", "whole_tiles * programs + pid)",
           "half tiles of the last wave are treated as whole tiles"),
    _wgmma("wgmma-racy-store", "buffer = staging.index(2 * CONSUMER + i % 2)", "buffer = staging.index(i % 2)",
           "the two consumers stage their stores in the same buffers", "output"),
    _wgmma("wgmma-partial-box", "gl.minimum(gl.cdiv(M - row, ROWS), BOXES)",
           "gl.minimum(gl.maximum((M - row) // ROWS, 1), BOXES)",
           "the last rows of x, which fill no box, are not copied"),
    _wgmma("wgmma-store-column", "[row, col + i * WIDTH], buffer)", "[row, col], buffer)",
           "every chunk of a tile is stored over the first chunk"),
    _wgmma("wgmma-bias-over-scale",
           "bias_buffer = vectors.index(2 * CONSUMER + 1)", "bias_buffer = vectors.index(2 * CONSUMER)",
           "the bias overwrites the column scales in shared memory", "output"),
    _wgmma("wgmma-no-wait", "gdc_wait()  #", "pass  #",
           "a launch that starts early reads operands that the kernel ahead has yet to write", "order"),
    _wgmma("wgmma-no-wait-with-swiglu", "    gdc_wait()  #", "    if not SWIGLU:\n        gdc_wait()  #",
           "the SwiGLU kernel reads operands that the kernel ahead has yet to write", "order"),
    _wgmma("wgmma-producer-waits-alone", "    gdc_wait()  #", "    pass  #",
           "consumers read scales and bias that the kernel ahead has yet to write", "order",
           (("    step = 0\n", "    step = 0\n    gdc_wait()\n"),)),
    _wgmma("wgmma-unaligned-output", '("w", operands.wq), ("out", operands.out)):', '("w", operands.wq)):',
           "an output whose rows TMA cannot address is an error, not handed to the Triton kernel", "launch cache"),
    _wgmma("wgmma-epilogue-too-early",
           "acc = hopper.warpgroup_mma_wait(0, deps=(acc,))", "acc = hopper.warpgroup_mma_wait(1, deps=(acc,))",
           "the epilogue reads sums while the last wgmma is in flight", "wgmma code"),
    _wgmma("wgmma-one-buffer-in-flight", "tma.store_wait(0 if len(chunks) == 1 else 1)", "tma.store_wait(1)",
           "a tile of one chunk overwrites its staging buffer while the last tile's store reads it", "wgmma code"),
    _wgmma("wgmma-store-past-n", "if operands.out.shape[1] * operands.out.itemsize % 16:", "if False:",
           "rows of an output that end inside 16 bytes are stored past their end", "launch cache"),
    _wgmma("wgmma-end-of-8-bytes", "if operands.out.shape[1] * operands.out.itemsize % 16:",
           "if operands.out.shape[1] * operands.out.itemsize % 8:",
           "TMA stores 8 bytes past the last column of the output", "fallback"),
)  # fmt: skip
