"""All that a step of Ideogram 4 depends on beside its latents: the prompts of a batch, and the time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from int8kit.runtime.packed_rows import Rows

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Prompt:
    """All that the prompts of a batch contribute to each step.

    hidden [M, W]: the text rows after projection and embedding; image rows are filled at each step. cos, sin [M, D]:
    tables of RoPE.
    """

    rows: Rows
    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True)
class Modulation:
    """Scales and gates of all blocks, and the factor of the last norm: table [S, 4 L + 1, W] for L blocks.

    A block has scale, gate, scale, gate. S: one row for all samples, or one for each sample; before `at`, one row for
    each step.
    """

    table: torch.Tensor

    @property
    def blocks(self) -> tuple[Tensors, ...]:
        """For each block its scale, gate, scale and gate, each [S, W]."""
        rows = self.table.unbind(1)
        return tuple(tuple(rows[i : i + 4]) for i in range(0, len(rows) - 1, 4))

    @property
    def final(self) -> torch.Tensor:
        """[S, W]."""
        return self.table[:, -1]

    def at(self, row: int) -> Modulation:
        """The modulation of one row."""
        return Modulation(self.table[row : row + 1])
