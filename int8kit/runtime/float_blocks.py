"""The blocks of Ideogram 4 by the stock model's own operations, on rows in runs.

    x = run(layers, x, prompt, modulation, masked=..., join=..., compiled=...)

All variants without fused row kernels take this way: bf16, fp8, nf4, fake-quant, and unfused INT8. Each operation and
its order are the stock block's, so a difference comes from a GEMM or an attention of another size. The attention is
never compiled: its runs of rows are numbers of the prompts, and each new one would compile all blocks again.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from int8kit.runtime import attention, tied_weights
from int8kit.runtime.conditioning import Modulation, Prompt
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

    masked: see `attention.attend`. join: plain linears that read the same input run as one GEMM. compiled: all but the
    attention runs through torch.compile.
    """
    before, after = _compiled(_kinds(layers[0])) if compiled else (_before_attention, _after_attention)
    for layer, values in zip(layers, modulation.blocks, strict=True):
        qkv, w13 = _joined_weights(layer) if join else (None, None)
        scales = torch.stack(values)
        if compiled:
            _any_rows(x, prompt.cos, prompt.sin)
        q, k, v = before(layer, x, scales, prompt.cos, prompt.sin, qkv)
        h = attention.attend(q, k, v, prompt.rows.lengths, layer.attention.num_heads, masked)
        if compiled:
            _any_rows(h)
        x = after(layer, x, h, scales, w13)
    return x


def _before_attention(
    layer: Any,
    x: torch.Tensor,
    scales: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v [M, H D] of a block. scales: [4, S, W]. weight: the joined one of q, k, v, or None."""
    module = layer.attention
    h = scaled(layer.attention_norm1(x), 1.0 + scales[0])
    if weight is None:
        q, k, v = module.to_q(h), module.to_k(h), module.to_v(h)
    else:
        q, k, v = torch.nn.functional.linear(h, weight).chunk(3, -1)
    q, k = (
        _rotated(norm(part.unflatten(-1, (module.num_heads, -1))), cos, sin)
        for norm, part in ((module.norm_q, q), (module.norm_k, k))
    )
    return q, k, v


def _after_attention(
    layer: Any, x: torch.Tensor, h: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    """The residual stream after a block. h: its attention; weight: the joined one of w1, w3, or None."""
    feed_forward, (_, gate, ffn_scale, ffn_gate) = layer.feed_forward, scales.unbind()
    x = x + scaled(layer.attention_norm2(layer.attention.to_out[0](h)), gate)
    h = scaled(layer.ffn_norm1(x), 1.0 + ffn_scale)
    if weight is None:
        first, third = feed_forward.w1(h), feed_forward.w3(h)
    else:
        first, third = torch.nn.functional.linear(h, weight).chunk(2, -1)
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


def _any_rows(*tensors: torch.Tensor) -> None:
    """Tell torch.compile that the number of rows may differ from call to call."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


@functools.cache
def _compiled(kinds: tuple[str, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both parts of a block by torch.compile, for any number of rows, and for blocks with linears of these kinds.

    torch limits the variants of one code object, and runs it uncompiled beyond. So each kind has code objects.
    """
    before, after = (
        torch.compile(
            types.FunctionType(part.__code__.replace(co_name=f"{part.__name__}_{len(kinds)}"), part.__globals__)
        )
        for part in (_before_attention, _after_attention)
    )
    return before, after
