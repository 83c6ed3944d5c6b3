"""The naive arm of train.py: one expert trained as the official stage-1 code does it, in plain PyTorch.

Written from what that code computes, on purpose without what siren.packed saves: every frame's twelve codes are looked
up and go through both of their projections one by one; RMSNorm is five operations; masks are built in each attention
and keys repeated for grouped heads; padding is computed and then weighted with zero; the residual decoder is attention
over B * T sequences of three positions, all of them in every block; the logits of all frames stay until the backward
pass; AdamW is PyTorch's default. Weights have the names of siren.expert, whose state_dict it loads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from siren import SirenConfig
from siren.layers import sinusoidal_positions


class Norm(nn.Module):
    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().square().mean(-1, keepdim=True)
        return (x.float() * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight


class FeedForward(nn.Module):
    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.gate_value = nn.Linear(config.dim, 2 * config.ffn_hidden, bias=False)
        self.down = nn.Linear(config.ffn_hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_value(x).chunk(2, -1)
        return self.dropout(self.down(silu(gate) * value))


class SelfAttention(nn.Module):
    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = config.n_heads, config.n_kv_heads, config.dropout
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * config.head_dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        parts = self.qkv(x).view(batch, length, self.heads + 2 * self.kv_heads, -1).transpose(1, 2)
        q, k, v = parts.split((self.heads, self.kv_heads, self.kv_heads), 1)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 1) for part in (k, v))
        mask = None
        if valid is not None:
            mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() & valid[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, dim))


class CrossAttention(nn.Module):
    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.n_heads, config.dropout
        self.query = nn.Linear(config.dim, config.dim)
        self.key_value = nn.Linear(config.prompt_dim, 2 * config.dim)
        self.output = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, prompt: Tensor, valid: Tensor) -> Tensor:
        q = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        both = self.key_value(prompt).chunk(2, -1)
        k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in both)
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, valid[:, None, None, :], dropout)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))


class BackboneBlock(nn.Module):
    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.cross_norm, self.self_norm, self.ffn_norm = Norm(config), Norm(config), Norm(config)
        self.cross_attention, self.self_attention = CrossAttention(config), SelfAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, prompt: Tensor, prompt_mask: Tensor, valid: Tensor) -> Tensor:
        x = x + self.cross_attention(self.cross_norm(x), prompt, prompt_mask)
        x = x + self.self_attention(self.self_norm(x), valid)
        return x + self.feed_forward(self.ffn_norm(x))


class DecoderBlock(nn.Module):
    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(config), Norm(config)
        self.attention, self.feed_forward = SelfAttention(config), FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class CodeEmbedding(nn.Module):
    def __init__(self, config: SirenConfig) -> None:
        super().__init__()
        self.codebook = nn.Embedding(config.codebook_size, config.dac_code_dim)
        self.dac_out = nn.Linear(config.dac_code_dim, config.dac_feature_dim)
        self.projector = nn.Linear(config.dac_feature_dim, config.dim)
        self.codebook.requires_grad_(False)
        self.dac_out.requires_grad_(False)

    def forward(self, codes: Tensor) -> Tensor:
        return self.projector(self.dac_out(self.codebook(codes)))


class NaiveExpert(nn.Module):
    """Two codes an expert, accumulated conditioning, a decoder that starts from the prompt: the official model."""

    def __init__(self, config: SirenConfig, start_codebook: int) -> None:
        super().__init__()
        self.config, self.start_codebook = config, start_codebook
        self.codebooks = nn.Module()
        self.codebooks.layers = nn.ModuleList(CodeEmbedding(config) for _ in range(config.num_codebooks))
        self.sos = nn.Parameter(torch.empty(1, 1, config.dim))
        self.prompt_summary = nn.Linear(config.prompt_dim, config.dim)
        self.spatial_blocks = nn.ModuleList(BackboneBlock(config) for _ in range(config.spatial_layers))
        self.factorized_blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.factorized_layers))
        self.spatial_norm, self.factorized_norm = Norm(config), Norm(config)
        self.heads = nn.ModuleList(nn.Linear(config.dim, config.codebook_size, bias=False) for _ in range(2))

    def forward(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor, valid: Tensor) -> list[Tensor]:
        """Logits [B, T, V] of both codebooks."""
        (batch, _, frames), dim = codes.shape, self.config.dim
        embedded = [layer(codes[:, j]) for j, layer in enumerate(self.codebooks.layers)]
        x = torch.cat((self.sos.expand(batch, -1, -1), torch.stack(embedded).sum(0)[:, :-1]), 1)
        positions = sinusoidal_positions(frames, dim, x.device).to(x.dtype)
        for block in self.spatial_blocks:
            x = block(x + positions, prompt, prompt_mask, valid)
        hidden = self.spatial_norm(x)
        weights = prompt_mask.to(prompt.dtype).unsqueeze(-1)
        before = self.prompt_summary((prompt * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True))
        before = before.expand(-1, frames, -1)
        if self.start_codebook:
            before = before + torch.stack(embedded[: self.start_codebook]).sum(0)
        after = before + embedded[self.start_codebook]
        y = torch.cat([part.reshape(batch * frames, 1, dim) for part in (hidden, before, after)], 1)
        positions = sinusoidal_positions(3, dim, y.device).to(y.dtype)
        for block in self.factorized_blocks:
            y = block(y + positions)
        y = self.factorized_norm(y).view(batch, frames, 3, dim)
        return [head(y[:, :, 1 + i]) for i, head in enumerate(self.heads)]


def naive_loss(model: nn.Module, start: int, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The mean of both codebooks' cross-entropies over the valid frames."""
    codes, _, _, valid = batch
    total = torch.zeros((), device=codes.device)
    logits = model(*batch)
    for i, values in enumerate(logits):
        targets = codes[:, start + i]
        losses = cross_entropy(values.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        total = total + (losses * valid).sum() / valid.sum()
    return total / len(logits)
