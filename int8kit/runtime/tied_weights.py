"""One weight in the memory of several linears, so that a joined GEMM costs no second copy.

    side_by_side([q, k, v])  ->  [3 N, K], whose parts are the weights of the three
    in_turn(gate, up)        ->  [2 F, K], whose row 2 j is row j of the gate, and row 2 j + 1 row j of the up

The linears stay as they are: names, state dicts and adapters see no change. Their weights become views of one tensor.
`Module.to` parts them again, and the next call joins them again. Of each call, one weight exists twice for a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def are_distinct(linears: Sequence[torch.nn.Module]) -> bool:
    """Whether no two of `linears` share a weight: a shared one cannot be in two places of a joined weight."""
    return len({id(linear.weight) for linear in linears}) == len(linears)


def side_by_side(linears: Sequence[torch.nn.Module], name: str = "weight") -> torch.Tensor:
    """The joined tensor [sum of N, ...] of tensors [N, ...] of `linears`, of one dtype and on one device."""
    parts: list[torch.Tensor] = [getattr(linear, name) for linear in linears]
    if not _are_adjacent(parts):
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat([part.detach() for part in parts])
            for tensor, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                tensor.data = rows
    first = parts[0].detach()
    joined: torch.Tensor = first.as_strided(
        (sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset()
    )
    return joined


def in_turn(gate: Any, up: Any) -> torch.Tensor:
    """The joined weight [2 F, K] of two linears with weights [F, K], whose rows alternate."""
    weights = [gate.weight, up.weight]
    rows, width = gate.weight.shape
    if not _alternate(weights):
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.stack([weight.detach() for weight in weights], 1)
            for index, weight in enumerate(weights):
                weight.data = whole[:, index]
    first = gate.weight.detach()
    joined: torch.Tensor = first.as_strided((2 * rows, width), (width, 1), first.storage_offset())
    return joined


def _are_adjacent(weights: Sequence[torch.Tensor]) -> bool:
    """Whether each tensor begins in memory where the one before ends."""
    end = weights[0].storage_offset()
    memory = weights[0].untyped_storage().data_ptr()
    for weight in weights:
        if (
            weight.untyped_storage().data_ptr() != memory
            or weight.storage_offset() != end
            or not weight.is_contiguous()
        ):
            return False
        end += weight.numel()
    return True


def _alternate(weights: Sequence[torch.Tensor]) -> bool:
    """Whether the rows of two weights alternate in memory."""
    first, second = weights
    width = first.shape[1]
    return (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.stride() == second.stride() == (2 * width, 1)
        and second.storage_offset() == first.storage_offset() + width
    )


def part(modules: Sequence[torch.nn.Module]) -> None:
    """Give each linear among `modules` whose rows are not adjacent a weight of its own again."""
    for module in modules:
        weight = module._parameters.get("weight")
        if weight is not None and not weight.is_contiguous():
            with torch.inference_mode(False), torch.no_grad():
                weight.data = weight.detach().contiguous()
