"""The blocks of Ideogram 4 by the stock model's own operations, on rows in runs.

    x = run(layers, x, prompt, modulation, masked=..., join=..., compiled=...)

All variants without fused row kernels take this way: bf16, fp8, nf4, fake-quant, and unfused INT8. Each operation and
its order are the stock block's, so a difference comes from a GEMM or an attention of another size.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from int8kit.runtime import attention, tied_weights
from int8kit.runtime.conditioning import Modulation, Prompt, Tensors
from int8kit.runtime.joined import scaled


def run(
    layers: Sequence[Any],
    x: torch.Tensor,
    prompt: Prompt,
    modulation: Modulation,
    *,
    masked: int,
    join: bool,
    compiled: bool,
) -> torch.Tensor:
    """The residual stream [M, W] after all blocks. x: the stream before them.

    masked: see `attention.attend`. join: plain linears that read the same input run as one GEMM. compiled: the block
    runs through torch.compile.
    """
    step = _compiled(_kinds(layers[0])) if compiled else block
    for layer, values in zip(layers, modulation.blocks, strict=True):
        weights = _joined_weights(layer) if join else (None, None)
        x = step(layer, x, values, prompt.cos, prompt.sin, prompt.rows.lengths, weights, masked)
    return x


def block(
    layer: Any,
    x: torch.Tensor,
    modulation: Tensors,
    cos: torch.Tensor,
    sin: torch.Tensor,
    lengths: tuple[int, ...],
    weights: tuple[torch.Tensor | None, torch.Tensor | None],
    masked: int,
) -> torch.Tensor:
    """One block: [M, W] -> [M, W]. weights: the joined ones of q, k, v and of w1, w3; None: each linear by itself."""
    scale, gate, ffn_scale, ffn_gate = modulation
    module, feed_forward = layer.attention, layer.feed_forward
    h = scaled(layer.attention_norm1(x), 1.0 + scale)
    if weights[0] is None:
        q, k, v = module.to_q(h), module.to_k(h), module.to_v(h)
    else:
        q, k, v = torch.nn.functional.linear(h, weights[0]).chunk(3, -1)
    q, k = (
        _rotated(norm(part.unflatten(-1, (module.num_heads, -1))), cos, sin)
        for norm, part in ((module.norm_q, q), (module.norm_k, k))
    )
    h = module.to_out[0](attention.attend(q, k, v, lengths, module.num_heads, masked))
    x = x + scaled(layer.attention_norm2(h), gate)
    h = scaled(layer.ffn_norm1(x), 1.0 + ffn_scale)
    if weights[1] is None:
        first, third = feed_forward.w1(h), feed_forward.w3(h)
    else:
        first, third = torch.nn.functional.linear(h, weights[1]).chunk(2, -1)
    h = feed_forward.w2(torch.nn.functional.silu(first) * third)
    return x + scaled(layer.ffn_norm2(h), ffn_gate)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of heads x [M, H, D] by tables [M, D] -> [M, H D]."""
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return ((x * cos[:, None]) + (turned * sin[:, None])).flatten(-2)


def _joined_weights(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The joined weights of q, k, v and of w1, w3, if all of them are plain linears without a bias."""
    first, second = (
        [layer.attention.to_q, layer.attention.to_k, layer.attention.to_v],
        [layer.feed_forward.w1, layer.feed_forward.w3],
    )
    return _joined(first), _joined(second)


def _joined(linears: Sequence[Any]) -> torch.Tensor | None:
    plain = all(type(linear) is torch.nn.Linear and linear.bias is None for linear in linears)
    if plain and tied_weights.are_distinct(linears):
        return tied_weights.side_by_side(linears)
    return None


def _kinds(layer: Any) -> tuple[str, ...]:
    """The kinds of the linears of a block."""
    return tuple(type(part).__name__ for part in layer.modules() if isinstance(part, torch.nn.Linear))


@functools.cache
def _compiled(kinds: tuple[str, ...]) -> Callable[..., torch.Tensor]:
    """`block` by torch.compile, for any number of rows, and for blocks with linears of these kinds.

    torch limits the variants of one code object, and runs it uncompiled beyond. So each kind has a code object.
    """
    own = types.FunctionType(block.__code__.replace(co_name=f"block_{len(kinds)}"), block.__globals__, block.__name__)
    return torch.compile(own, dynamic=True)
