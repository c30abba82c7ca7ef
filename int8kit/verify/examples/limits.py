"""Limits of the kernels as numbers, written here a second time.

The examples reach these limits. If they took the kernels' own constants, a limit that is too narrow would narrow the
examples too, and nothing would try the operands that are refused then. A test compares the two.
"""

from __future__ import annotations

K_MAX = 131071
"""The largest K of a GEMM."""

K_MAX_HELD = 16384
"""The longest row of a row kernel other than `quantize`."""

CHUNKS = (256, 512, 1024, 2048, 4096)
"""The chunks of a row tile."""

WARPS = (1, 2, 4, 8, 16)
"""The numbers of warps of a row tile and of a head tile."""

BLOCK = 2048
"""Elements of a block of the mean of squares: the largest chunk of a kernel with a norm."""

HEAD_DIMS = (16, 32, 64, 128, 256)
"""The widths of a head."""
