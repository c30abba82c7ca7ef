"""The blocks of Ideogram 4 in a chain of int8kit's kernels, with int8 between them.

norm, modulate, quantize | q, k, v in one GEMM | QK norm, RoPE | attention | output projection
| gate, residual, norm, modulate, quantize | w1, w3 and SwiGLU in one GEMM | w2
| gate, residual, and the next block's norm, modulate, quantize
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from int8kit import ops
from int8kit.runtime import attention, joined
from int8kit.runtime.conditioning import Modulation, Prompt
from int8kit.runtime.joined import Inputs, Plans


def run(
    layers: Sequence[Any],
    x: torch.Tensor,
    prompt: Prompt,
    modulation: Modulation,
    *,
    plans: Plans,
    masked: int,
    join: bool,
) -> torch.Tensor:
    """The residual stream [M, W] after all blocks. x: the stream before them.

    masked: see `attention.attend`. join: one GEMM for q, k and v, and one for w1 and w3.
    """
    blocks = modulation.blocks
    first = layers[0].attention_norm1
    q, s = ops.rms_norm_quantize(x, first.weight, blocks[0][0], first.eps)
    for index, (layer, (scale, gate, ffn_scale, ffn_gate)) in enumerate(zip(layers, blocks, strict=True)):
        given = Inputs(x, layer.attention_norm1, scale, q, s)
        branch = _attention(layer.attention, given, prompt, plans, masked, join)
        norm = layer.attention_norm2
        x, q, s = ops.residual_norm_quantize(x, branch, norm.weight, gate, layer.ffn_norm1.weight, ffn_scale, norm.eps)
        given = Inputs(x, layer.ffn_norm1, ffn_scale, q, s)
        branch = _feed_forward(layer.feed_forward, given, plans, join)
        # the last block has no next norm: its own serves, and nobody reads the quantized rows
        after = min(index + 1, len(layers) - 1)
        x, q, s = ops.residual_norm_quantize(
            x, branch, layer.ffn_norm2.weight, ffn_gate, layers[after].attention_norm1.weight, blocks[after][0],
            layer.ffn_norm2.eps,
        )  # fmt: skip
    return x


def _attention(module: Any, given: Inputs, prompt: Prompt, plans: Plans, masked: int, join: bool) -> torch.Tensor:
    parts = (module.to_q, module.to_k, module.to_v)
    if join:
        qkv = joined.side_by_side(parts, given, plans)
    else:
        qkv = torch.cat([joined.side_by_side((part,), given, plans) for part in parts], -1)
    q, k = ops.qk_norm_rope(
        qkv, module.norm_q.weight, module.norm_k.weight, prompt.cos, prompt.sin, module.num_heads, module.norm_q.eps
    )
    v = qkv[:, 2 * q.shape[1] :]
    out: torch.Tensor = module.to_out[0](attention.attend(q, k, v, prompt.rows.lengths, module.num_heads, masked))
    return out


def _feed_forward(module: Any, given: Inputs, plans: Plans, join: bool) -> torch.Tensor:
    if join:
        hidden = joined.gated(module.w1, module.w3, given, plans)
    else:
        first, third = (joined.side_by_side((part,), given, plans) for part in (module.w1, module.w3))
        hidden = torch.nn.functional.silu(first) * third
    out: torch.Tensor = module.w2(hidden)
    return out
