"""Attention over runs of rows, by the fastest of torch's back ends for the GPU.

    with backend(device):
        out = attend(q, k, v, lengths, heads)

A run attends to itself, so no row is masked. cuDNN leads on Hopper. FlashAttention leads elsewhere: heads of 256
elements leave no other choice on consumer GPUs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_ORDER = {
    9: (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    0: (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
}
"""Back ends in the order of preference, by the major compute capability; 0 for all others."""


@contextlib.contextmanager
def backend(device: torch.device) -> Iterator[None]:
    """Let torch's attention on `device` use the first back end of its order that accepts the operands."""
    if device.type != "cuda":
        yield
        return
    _settle_default(device)
    with sdpa_kernel(list(_order(device)), set_priority=True):
        yield


@functools.cache
def _settle_default(device: torch.device) -> None:
    """Let torch choose its own order of back ends for this process.

    torch does so at its first attention, and on Hopper puts cuDNN first. If that is inside `sdpa_kernel`, the end of
    the context brings back the order before the choice. Then every other model of the process has a slower attention:
    on an H200 a step of stock diffusers took 745 ms instead of 604.
    """
    q = torch.zeros(1, 1, 16, 64, dtype=torch.bfloat16, device=device)
    torch.nn.functional.scaled_dot_product_attention(q, q, q)


def name_of(device: torch.device) -> str:
    """The preferred back end on `device`, as text."""
    if device.type != "cuda":
        return "torch on the CPU"
    return _order(device)[0].name.removesuffix("_ATTENTION").lower()


def _order(device: torch.device) -> tuple[SDPBackend, ...]:
    return _ORDER.get(torch.cuda.get_device_capability(device)[0], _ORDER[0])


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], heads: int, masked: int = 0
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v within each run. q, k, v [M, H D], with any row stride -> [M, H D].

    lengths: rows of each run, M in all. Runs of one length are one batch. masked: the number of equal parts of the M
    rows that are problems with a mask, as the stock model has it; 0: no mask.
    """
    if masked:
        runs = torch.repeat_interleave(torch.tensor(lengths, device=q.device)).unflatten(0, (masked, -1))
        return _batch(q, k, v, masked, heads, (runs[:, :, None] == runs[:, None])[:, None])
    if len(set(lengths)) == 1:
        return _batch(q, k, v, len(lengths), heads)
    runs_of = (t.split(list(lengths)) for t in (q, k, v))
    return torch.cat([_batch(q, k, v, 1, heads) for q, k, v in zip(*runs_of, strict=True)])


def _batch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: int, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    rows, width = q.shape
    q, k, v = (t.unflatten(0, (batch, -1)).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(rows, width)
