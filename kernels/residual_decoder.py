"""The residual decoder, teacher forced, for training: N = B * T frames, each a sequence of S = m + 1 positions.

    for every block:  x = x + positions[:S]
                      x = x + output(attention(norm(x)))
                      x = x + down(silu(gate) * value),  [gate | value] = gate_value(norm(x))
    out = norm(x)                                             (paper, section 4.1, eq. 4 and 5)

x, out  [N, S, d]   float32 or bfloat16; position 0 is the backbone's hidden state, and the caller drops its output

PyTorch spends this part on sequences of three positions in attention made for thousands, and on passes over [N, S, d]
that do one addition each. Here the four matrix products a block are torch's, and between them are three kernels, each
an operation of its own with a backward: rms_norm (adds what came before, then normalises), short_attention and swiglu.
Adding positions, both residual additions and the norms together are two passes a block.

Left out: dropout (a config with dropout above 0 trains through siren.layers), biases (the model has none here),
recomputation of activations, mixed types as under autocast, fusing the matrix products with what stands between them,
and skipping the last block's feed-forward for position 0, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from .rms_norm import rms_norm, rms_norm_reference
from .short_attention import short_attention, short_attention_reference
from .swiglu import swiglu, swiglu_reference


class Block(NamedTuple):
    """Weights of one block, as in siren.layers.DecoderBlock; h is the width of the SwiGLU."""

    attention_norm: torch.Tensor  # [d]
    qkv: torch.Tensor  # [(n_heads + 2 n_kv_heads) * head_dim, d], rows [q | k | v]
    output: torch.Tensor  # [d, n_heads * head_dim]
    ffn_norm: torch.Tensor  # [d]
    gate_value: torch.Tensor  # [2h, d], rows [gate | value]
    down: torch.Tensor  # [d, h]


def residual_decoder_reference(
    x: torch.Tensor,
    blocks: Sequence[Block],
    final_norm: torch.Tensor,
    positions: torch.Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> torch.Tensor:
    """The same in plain PyTorch; the contract."""
    for block in blocks:
        x, normed = rms_norm_reference(x, block.attention_norm, eps, positions=positions)
        x = x + linear(short_attention_reference(linear(normed, block.qkv), n_heads, n_kv_heads), block.output)
        normed = torch.nn.functional.rms_norm(x, block.ffn_norm.shape, block.ffn_norm, eps)
        x = x + linear(swiglu_reference(linear(normed, block.gate_value)), block.down)
    return torch.nn.functional.rms_norm(x, final_norm.shape, final_norm, eps)


def residual_decoder(
    x: torch.Tensor,
    blocks: Sequence[Block],
    final_norm: torch.Tensor,
    positions: torch.Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> torch.Tensor:
    """x [N, S, d] -> [N, S, d] after all blocks and the final norm; differentiable once in x and all weights.

    final_norm [d]; positions [>= S, d], a constant. S is at most 16 and head_dim at most 128. Everything has x's type
    and is contiguous. Wrong arguments raise ValueError or TypeError naming the argument and what it should be.
    """
    _check(x, blocks, n_heads, n_kv_heads)
    delta = None  # what the block before adds to x: its addition is left to the next norm
    for block in blocks:
        x, normed = rms_norm(x, block.attention_norm, eps, delta, positions)
        mixed = short_attention(linear(normed, block.qkv), n_heads, n_kv_heads)
        x, normed = rms_norm(x, block.ffn_norm, eps, delta=linear(mixed, block.output))
        delta = linear(swiglu(linear(normed, block.gate_value)), block.down)
    return rms_norm(x, final_norm, eps, delta=delta)[1]


def _check(x: torch.Tensor, blocks: Sequence[Block], n_heads: int, n_kv_heads: int) -> None:
    """What the operations would not notice or not name; they check the rest."""
    if x.ndim != 3:
        raise ValueError(f"x must be [N, S, d], not {list(x.shape)}")
    if not blocks:
        raise ValueError("blocks must hold at least one block: without any the heads read the backbone")
    d = x.shape[2]
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads or d % n_heads:
        raise ValueError(
            f"n_heads must divide d = {d} and be a multiple of n_kv_heads, not {n_heads} with n_kv_heads {n_kv_heads}"
        )
    width = (n_heads + 2 * n_kv_heads) * (d // n_heads)
    for index, block in enumerate(blocks):
        h = block.down.shape[-1]
        shapes = {"qkv": (width, d), "output": (d, d), "gate_value": (2 * h, d), "down": (d, h)}
        for name, shape in shapes.items():
            weight = getattr(block, name)
            if weight.shape != shape:
                raise ValueError(f"{name} of block {index} must be {list(shape)}, not {list(weight.shape)}")
            if weight.dtype != x.dtype or weight.device != x.device:
                raise ValueError(
                    f"{name} of block {index} must be {x.dtype} on {x.device} as x is, not {weight.dtype} on "
                    f"{weight.device}"
                )
