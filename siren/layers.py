"""The layers of an expert: RMSNorm, SwiGLU, self- and cross-attention, and the two kinds of block.

Attention is split into its projections and its product so that the teacher-forced forward (expert.py) and the cached
decoder (reference.py) share the weights and the arithmetic. Shapes: x [B, L, dim]; q, k, v [B, heads, L, head_dim].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import SirenConfig
from .packed import Packing


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate) * value), gate and value from one matrix."""

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.gate_value = nn.Linear(config.dim, 2 * config.ffn_hidden, bias=False)
        self.down = nn.Linear(config.ffn_hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        return self.dropout(self.down(nn.functional.silu(gate) * value))


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention in k's dtype -> [B, L, dim] in q's dtype. `mask` True = may be attended.

    k and v may have fewer heads than q (grouped-query attention).
    """
    grouped = k.shape[1] < q.shape[1]
    mixed = nn.functional.scaled_dot_product_attention(q.to(k.dtype), k, v, mask, dropout, causal, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(2).to(q.dtype)


class SelfAttention(nn.Module):
    """Grouped-query self-attention without biases. The weight's rows are [q | k | v]."""

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = config.dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, dim] -> q [B, n_heads, L, head_dim], k and v [B, n_kv_heads, L, head_dim]."""
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(*self.project(x), mask=mask, dropout=dropout, causal=mask is None))


class CrossAttention(nn.Module):
    """Attention to the prompt tokens, with biases and all heads. The weight's rows are [k | v]."""

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.query = nn.Linear(config.dim, config.dim)
        self.key_value = nn.Linear(config.prompt_dim, 2 * config.dim)
        self.output = nn.Linear(config.dim, config.dim)
        self.dropout = config.dropout

    def queries(self, x: Tensor) -> Tensor:
        """x [B, L, dim] -> q [B, n_heads, L, head_dim]."""
        batch, length, _ = x.shape
        return self.query(x).view(batch, length, self.n_heads, self.head_dim).transpose(1, 2)

    def keys_values(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """prompt [B, P, prompt_dim] -> k and v [B, n_heads, P, head_dim]."""
        batch, length, _ = prompt.shape
        heads = self.key_value(prompt).view(batch, length, 2 * self.n_heads, self.head_dim).transpose(1, 2)
        k, v = heads.chunk(2, dim=1)
        return k, v

    def forward(self, x: Tensor, prompt: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(self.queries(x), *self.keys_values(prompt), mask=mask, dropout=dropout))


class BackboneBlock(nn.Module):
    """Cross-attention, causal self-attention, SwiGLU; each after its own RMSNorm, each added to its input."""

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.cross_norm = RMSNorm(config.dim, config.norm_eps)
        self.cross_attention = CrossAttention(config)
        self.self_norm = RMSNorm(config.dim, config.norm_eps)
        self.self_attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config)

    def forward(self, x: Tensor, prompt: Tensor, prompt_mask: Tensor | None, causal_mask: Tensor | None) -> Tensor:
        x = x + self.cross_attention(self.cross_norm(x), prompt, prompt_mask)
        x = x + self.self_attention(self.self_norm(x), causal_mask)
        return x + self.feed_forward(self.ffn_norm(x))

    def packed(self, x: Tensor, packing: Packing, prompt: Tensor, prompt_mask: Tensor | None) -> Tensor:
        """`forward` for the valid frames of a batch alone: x [N, dim] -> [N, dim]."""
        mixed = self.cross_attention(packing.pad(self.cross_norm(x)), prompt, prompt_mask)
        x = x + packing.unpad(mixed)
        x = x + packing.unpad(self.self_attention(packing.pad(self.self_norm(x))))
        return x + self.feed_forward(self.ffn_norm(x))


class DecoderBlock(nn.Module):
    """A residual decoder's block: causal self-attention and SwiGLU."""

    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))

    packed = forward


def sinusoidal_positions(length: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Position vectors [length, dim], float32: sines in the even columns, cosines in the odd; dim may be odd."""
    position = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = position * frequency
    table = torch.empty(length, dim, device=device, dtype=torch.float32)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle[:, : dim // 2].cos()
    return table
