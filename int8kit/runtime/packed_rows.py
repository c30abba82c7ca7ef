"""The rows of packed sequences, in runs that attend to themselves alone.

Ideogram 4 packs each sample as [padding | text | image] and masks by segments: a token attends to the tokens of its own
segment. `pack` reads the runs from a packed input, and `tight` makes them for prompts without padding. Then attention
needs no mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from int8kit.models import IMAGE, IMAGE_POSITION_OFFSET, PAD, TEXT


@dataclass(frozen=True)
class Rows:
    """Rows of all samples, run after run.

    places [M]: the row's index in the flattened [B L] input. images, texts: the rows of that kind. lengths: rows of
    each run. samples: the sample of each run.
    """

    places: torch.Tensor
    images: torch.Tensor
    texts: torch.Tensor
    lengths: tuple[int, ...]
    samples: tuple[int, ...]

    @property
    def count(self) -> int:
        """M, the rows of all runs."""
        return sum(self.lengths)

    @property
    def equal_parts(self) -> int:
        """The number of samples if all have as many rows, else 1."""
        totals = Counter[int]()
        for sample, length in zip(self.samples, self.lengths, strict=True):
            totals[sample] += length
        return len(totals) if len(set(totals.values())) == 1 else 1


def pack(segments: torch.Tensor, indicator: torch.Tensor, *, trim: bool = True) -> Rows:
    """The rows of a packed input. segments, indicator: [B, L] integers on any device.

    trim: only the segments with an image. Reads both on the CPU, which waits for the GPU: call it once per prompt.
    """
    kinds, ids = indicator.cpu(), segments.cpu()
    length = kinds.shape[1]
    places, lengths, samples = [], [], []
    for sample in range(len(kinds)):
        wanted = ids[sample][kinds[sample] == IMAGE] if trim else ids[sample]
        for segment in wanted.unique().tolist():
            own = (ids[sample] == segment).nonzero().flatten()
            places.append(own + sample * length)
            lengths.append(len(own))
            samples.append(sample)
    every = torch.cat(places) if places else torch.empty(0, dtype=torch.long)
    return _rows(every, kinds.flatten()[every], lengths, samples, indicator.device)


def tight(texts: Sequence[int], images: int, device: torch.device, slots: int = 0) -> Rows:
    """The rows of samples in order: for each, padding up to `slots`, `texts` text rows, and `images` image rows.

    The padding of a sample is a run of its own. With slots = 0 there is none.
    """
    kinds, lengths, samples = [], [], []
    for sample, n in enumerate(texts):
        padding = max(slots - n, 0)
        kinds += [torch.full((padding,), PAD), torch.full((n,), TEXT), torch.full((images,), IMAGE)]
        for length in (padding, n + images):
            if length:
                lengths.append(length)
                samples.append(sample)
    every = torch.cat(kinds)
    return _rows(torch.arange(len(every)), every, lengths, samples, device)


def positions(texts: Sequence[int], height: int, width: int, slots: int = 0) -> torch.Tensor:
    """Positions [M, 3] of the rows of `tight` on the CPU: (i, i, i) for text, (0, y, x) with an offset for an image.

    height, width: of the image, in image tokens. Padding has position 0.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1) + IMAGE_POSITION_OFFSET
    parts = []
    for n in texts:
        padding = torch.zeros(max(slots - n, 0), 3, dtype=torch.long)
        parts += [padding, torch.arange(n)[:, None].expand(n, 3), image]
    return torch.cat(parts)


def _rows(
    places: torch.Tensor, kinds: torch.Tensor, lengths: Sequence[int], samples: Sequence[int], device: torch.device
) -> Rows:
    images, texts = ((kinds == one).nonzero().flatten().to(device) for one in (IMAGE, TEXT))
    return Rows(places.to(device), images, texts, tuple(lengths), tuple(samples))
