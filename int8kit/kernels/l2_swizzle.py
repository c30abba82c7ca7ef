"""L2 swizzle: the order of output tiles that keeps the operands of concurrent programs in L2.

Tiles are numbered down the columns of groups of `group_m` tile rows, as in Triton's matrix multiplication tutorial.
With group_m = 2 and three tile rows and columns:

    0 2 4
    1 3 5
    6 7 8

A plain Triton function that Gluon kernels call too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_corner(tile, M, N, group_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of the upper left element of tile number `tile`."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = group_m * tl.cdiv(N, BLOCK_N)
    first = tile // group * group_m
    height = tl.minimum(tiles_m - first, group_m)
    return (first + tile % group % height) * BLOCK_M, tile % group // height * BLOCK_N
