"""Part of the property `modules`: the default policy and its variants choose the linears that their rules name.

The rules of `quantization.Policy` are written here a second time, with their numbers. The linears are on meta.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from int8kit.quantization import Policy, chosen
from int8kit.verify.executors import Executor
from int8kit.verify.implementations import Implementation
from int8kit.verify.properties import modules
from int8kit.verify.properties.modules import ModuleCase

SMALLEST, MULTIPLE = 256, 16
FEW_ROWS = ("time_embed", "norm1", "adaLN", "ada_ln", "img_mod", "mod", "modulation", "guidance_in", "Timestep")
MANY_ROWS = ("to_q", "proj", "mode", "model", "remod1", "w1", "adapter")
EXTENTS = (16, 240, 255, 256, 257, 264, 272, 4096)
_POLICIES = {
    "default": Policy(), "skip": Policy(skip=["*"]), "force": Policy(skip=["*"], force=["*"]),
    "small": Policy(smallest=16, multiple=8), "any name": Policy(few_rows=None), "everywhere": Policy(inner_only=False),
}  # fmt: skip


@dataclass(frozen=True)
class ChoiceCase:
    """One linear [n, k] with a name, inside of repeated blocks, beside them, or in a module without blocks."""

    n: int
    k: int
    name: str = MANY_ROWS[0]
    policy: str = "default"  # of _POLICIES
    place: str = "inside"  # or "beside" or "no blocks"

    def __str__(self) -> str:
        return f"the {self.policy} policy for {self.name!r} [{self.n}, {self.k}], {self.place}"


def check(c: ChoiceCase | ModuleCase, on: Executor | Implementation) -> str | None:
    """The check of either class of the property `modules`."""
    return modules.check(c, on) if isinstance(c, ModuleCase) else check_choice(c)


def check_choice(c: ChoiceCase) -> str | None:
    """Whether the policy leaves a linear that its rules choose, or the opposite, as text, or None."""
    with torch.device("meta"):
        linear = torch.nn.Linear(c.k, c.n)
        others = [
            {c.name: linear} if c.place == "inside" else {"other": torch.nn.Linear(1, 1)},
            {"other": torch.nn.Linear(1, 1)},
        ]
        blocks = [torch.nn.ModuleDict(one) for one in others]
        parts: dict[str, torch.nn.Module] = {} if c.place == "no blocks" else {"blocks": torch.nn.ModuleList(blocks)}
        root = torch.nn.ModuleDict(parts if c.place == "inside" else {**parts, c.name: linear})
    path = f"blocks.0.{c.name}" if c.place == "inside" else c.name
    is_chosen = path in chosen(root, _POLICIES[c.policy])
    if is_chosen is _expected(c):
        return None
    return f"it is {'chosen' if is_chosen else 'left'}, expected the opposite"


def _expected(c: ChoiceCase) -> bool:
    if c.policy in ("skip", "force"):
        return c.policy == "force"
    smallest, multiple = (16, 8) if c.policy == "small" else (SMALLEST, MULTIPLE)
    large = c.n >= smallest and c.k >= smallest and c.n % multiple == 0 and c.k % multiple == 0
    many = c.name in MANY_ROWS or c.policy == "any name"
    return large and many and (c.place != "beside" or c.policy == "everywhere")


def always() -> Iterator[ChoiceCase | ModuleCase]:
    """Each extent around the limits, each name and each place, under each policy."""
    yield from modules.always()
    for policy in _POLICIES:
        yield from (ChoiceCase(n, k, policy=policy) for n, k in product(EXTENTS, EXTENTS))
        yield from (ChoiceCase(272, 256, name, policy) for name in (*MANY_ROWS[1:], *FEW_ROWS))
        yield from (ChoiceCase(272, 256, policy=policy, place=place) for place in ("beside", "no blocks"))
