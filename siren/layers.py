"""The layers of an expert: RMSNorm, SwiGLU, self- and cross-attention, and the two kinds of block.

Attention is split into its projections and its product so that the teacher-forced forward (expert.py) and the cached
decoder (reference.py) share the weights and the arithmetic. Shapes: x [B, L, dim]; q, k, v [B, heads, L, head_dim].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import SirenConfig
from .packed import Packing
from .packed import attend as attend_rows
from .row_operations import short_attention, swiglu, unit_norm


@dataclass(frozen=True)
class Paths:
    """How a block computes on rows: the type of its products, the backbone's attention (siren.packed), and whether
    siren.kernels computes what stands between the products."""

    dtype: torch.dtype
    attention: str = "sdpa"
    kernels: bool = False


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The norm of x and the linear map behind it, in dtype: the norm's weight goes into the matrix."""
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(unit_norm(x, self.eps, dtype), (weight * self.weight).to(dtype), bias)


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

    def packed(self, x: Tensor, norm: RMSNorm, paths: Paths) -> Tensor:
        """x + forward(norm(x)) for rows of any shape [..., dim]."""
        gate_value = norm.linear(x, self.gate_value.weight, None, paths.dtype)
        return x + self.dropout(_linear(swiglu(gate_value, paths.kernels), self.down))


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in x's type."""
    return nn.functional.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


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

    def packed(self, x: Tensor, norm: RMSNorm, frames: Packing, paths: Paths) -> Tensor:
        """x + forward(norm(x)) for the rows x [N, dim] of `frames`, causal within each sequence."""
        heads = norm.linear(x, self.qkv.weight, None, paths.dtype).unflatten(1, (-1, self.head_dim))
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        dropout = self.dropout if self.training else 0.0
        return x + _linear(attend_rows(q, k, v, frames, frames, True, dropout, paths.attention).flatten(1), self.output)

    def packed_short(self, x: Tensor, norm: RMSNorm, paths: Paths, first: int) -> Tensor:
        """x + forward(norm(x)) for frames of a few positions, from position `first` on: [N, S, dim] -> fewer."""
        qkv = norm.linear(x, self.qkv.weight, None, paths.dtype)
        dropout = self.dropout if self.training else 0.0
        mixed = short_attention(qkv, self.n_heads, self.n_kv_heads, dropout, paths.kernels)
        return x[:, first:] + _linear(mixed[:, first:], self.output)


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

    def packed(
        self, x: Tensor, norm: RMSNorm, prompt: Tensor, frames: Packing, tokens: Packing, paths: Paths
    ) -> Tensor:
        """x + forward(norm(x), prompt) for the rows x [N, dim] of `frames` and prompt [M, prompt_dim] of `tokens`."""
        q = norm.linear(x, self.query.weight, self.query.bias, paths.dtype).unflatten(1, (-1, self.head_dim))
        k, v = _linear(prompt, self.key_value).unflatten(1, (-1, self.head_dim)).chunk(2, dim=1)
        dropout = self.dropout if self.training else 0.0
        return x + _linear(
            attend_rows(q, k, v, frames, tokens, False, dropout, paths.attention).flatten(1), self.output
        )


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

    def packed(self, x: Tensor, prompt: Tensor, frames: Packing, tokens: Packing, paths: Paths) -> Tensor:
        """`forward` for rows: x [N, dim] of `frames`, prompt [M, prompt_dim] of `tokens`, in the products' type."""
        x = self.cross_attention.packed(x, self.cross_norm, prompt, frames, tokens, paths)
        x = self.self_attention.packed(x, self.self_norm, frames, paths)
        return self.feed_forward.packed(x, self.ffn_norm, paths)


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

    def packed(self, x: Tensor, paths: Paths, first: int = 0) -> Tensor:
        """`forward` for all frames at once, positions from `first` on: x [N, S, dim] -> [N, S - first, dim]."""
        x = self.attention.packed_short(x, self.attention_norm, paths, first)
        return self.feed_forward.packed(x, self.ffn_norm, paths)


def sinusoidal_positions(length: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Position vectors [length, dim], float32: sines in the even columns, cosines in the odd; dim may be odd."""
    position = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = position * frequency
    table = torch.empty(length, dim, device=device, dtype=torch.float32)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle[:, : dim // 2].cos()
    return table
