"""What the training step does to rows between its matrix products, forward and backward, in few passes over memory.

Products take the compute type (bfloat16 under autocast), the residual stream stays in float32. On a CPU an operation
works through a few hundred rows at a time, so that what it needs in between stays in the cache. With `kernels` the
operations of siren.kernels take over where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .errors import BackendError, InputError, MissingDependencyError

CHUNK = 1 << 18  # numbers of the input that are worked on at a time on a CPU
LOSS_NUMBERS = 1 << 18  # logits that exist at a time on a CPU; 32 times as many on a GPU


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the first dimension, each of about CHUNK numbers; on a GPU everything at once."""
    rows = len(x)
    size = max(1, CHUNK * rows // x.numel()) if x.device.type == "cpu" and x.numel() else max(1, rows)
    return (slice(start, start + size) for start in range(0, rows, size))


def _wide(x: Tensor) -> Tensor:
    """Float32, or x itself where it is as wide."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raise an error of Siren's where siren.kernels cannot compute in this type on this device."""
    try:
        from .kernels.interpreter import INTERPRETED
    except ImportError as error:
        raise MissingDependencyError(
            "triton is not installed (or does not import): pip install 'siren[triton]'"
        ) from error
    if device.type != "cuda" and not INTERPRETED.value:
        raise BackendError(f"siren.kernels need a GPU, and the model is on {device}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"siren.kernels compute in float32 or bfloat16, not {dtype}")


def sum_rows(tables: Tensor, codes: Tensor, kernels: bool = False) -> Tensor:
    """Sum over codebooks of the codes' embeddings: tables [J, V, dim], codes [N, J] int64 -> [N, dim]."""
    if kernels:
        from .kernels.rvq_embed import rvq_embed

        return rvq_embed(tables.unsqueeze(0), codes.T.unsqueeze(0))[0, 0]
    count, size, dim = tables.shape
    offsets = torch.arange(count, device=codes.device) * size
    return functional.embedding_bag(codes + offsets, tables.view(-1, dim), mode="sum")


class _UnitNorm(torch.autograd.Function):
    """With s = 1 / sqrt(mean(x^2) + eps): y = s x and dx = s dy - x s^3 mean(x dy)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = (torch.linalg.vecdot(x, x) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, scale)
        return torch.mul(x, scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        dy = dy.to(x.dtype)
        mean = torch.linalg.vecdot(x, dy).unsqueeze(-1) / x.shape[-1]
        return (dy * scale).addcmul_(x, mean * scale**3, value=-1), None, None


def unit_norm(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm without its weight, [..., dim] -> [..., dim] in dtype. The weight goes into the matrix that follows."""
    if x.device.type != "cpu":
        return functional.rms_norm(x, x.shape[-1:], None, eps).to(dtype)
    return _UnitNorm.apply(x, eps, dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_value: Tensor) -> Tensor:
        ctx.save_for_backward(gate_value)
        hidden = gate_value.shape[-1] // 2
        out = gate_value.new_empty(*gate_value.shape[:-1], hidden)
        for part in _chunks(gate_value):
            gate, value = _wide(gate_value[part]).split(hidden, -1)
            torch.mul(functional.silu(gate), value, out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (gate_value,) = ctx.saved_tensors
        hidden = d_out.shape[-1]
        d_gate_value = torch.empty_like(gate_value)
        for part in _chunks(gate_value):
            gate, value = _wide(gate_value[part]).split(hidden, -1)
            d_gate, d_value = d_gate_value[part].split(hidden, -1)
            wide = _wide(d_out[part])
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            torch.mul(wide, silu, out=d_value)
            slope = silu.neg().add_(1).mul_(sigmoid).add_(silu)  # silu' = sigmoid (1 - silu) + silu
            torch.mul(slope.mul_(value), wide, out=d_gate)
        return d_gate_value


def swiglu(gate_value: Tensor, kernels: bool) -> Tensor:
    """silu(gate) * value: [..., 2 hidden] = [gate | value] -> [..., hidden]."""
    if kernels:
        from .kernels.swiglu import swiglu as kernel

        return kernel(gate_value)
    return _SwiGLU.apply(gate_value)


class _ShortAttention(torch.autograd.Function):
    """Position by position: its scores against the positions up to it, their softmax, and the mixture of the values.

    keep [S, S, N, KV, G], None without dropout: what a probability is multiplied by, 0 or 1 / (1 - dropout).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_heads: int, n_kv_heads: int, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(qkv, keep)
        ctx.heads = n_heads, n_kv_heads
        rows, positions, width = qkv.shape
        out = qkv.new_empty(rows, positions, width // (n_heads + 2 * n_kv_heads) * n_heads)
        for part in _chunks(qkv):
            q, k, v = _positions(qkv[part], n_heads, n_kv_heads)
            for s in range(positions):
                p = _probabilities(q, k, s)
                if keep is not None:
                    p = p * keep[s, : s + 1, part]
                out[part, s] = (p.unsqueeze(-1) * v[: s + 1]).sum(0).flatten(1)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, keep = ctx.saved_tensors
        d_qkv = torch.empty_like(qkv)
        for part in _chunks(qkv):
            q, k, v = _positions(qkv[part], *ctx.heads)
            d_mixed = _wide(d_out[part]).transpose(0, 1).contiguous().view(q.shape)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for s in range(len(q)):
                p = _probabilities(q, k, s)
                dp = (d_mixed[s] * v[: s + 1]).sum(-1)
                kept = p
                if keep is not None:
                    kept, dp = p * keep[s, : s + 1, part], dp * keep[s, : s + 1, part]
                dv[: s + 1] += _over_group(kept.unsqueeze(-1) * d_mixed[s])
                d_scores = (p * (dp - (p * dp).sum(0)) * q.shape[-1] ** -0.5).unsqueeze(-1)
                dk[: s + 1] += _over_group(d_scores * q[s])
                dq[s] = (d_scores * k[: s + 1]).sum(0)
            torch.cat([d.flatten(2).transpose(0, 1) for d in (dq, dk, dv)], -1, out=d_qkv[part])
        return d_qkv, None, None, None


def _positions(qkv: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [S, n, KV, G, head_dim] and k, v [S, n, KV, 1, head_dim] of qkv [n, S, width], contiguous."""
    head_dim = qkv.shape[-1] // (n_heads + 2 * n_kv_heads)
    sizes = [count * head_dim for count in (n_heads, n_kv_heads, n_kv_heads)]
    q, k, v = (_wide(x).transpose(0, 1).contiguous() for x in qkv.split(sizes, -1))
    q, k, v = (x.view(*x.shape[:2], n_kv_heads, -1, head_dim) for x in (q, k, v))
    return q, k, v


def _over_group(x: Tensor) -> Tensor:
    """[S, n, KV, G, head_dim] -> the sum over G, [S, n, KV, 1, head_dim]."""
    return x if x.shape[3] == 1 else x.sum(3, keepdim=True)


def _probabilities(q: Tensor, k: Tensor, s: int) -> Tensor:
    """Of position s to see positions 0..s: [s + 1, n, KV, G]."""
    return ((q[s] * k[: s + 1]).sum(-1) * q.shape[-1] ** -0.5).softmax(0)


def short_attention(qkv: Tensor, n_heads: int, n_kv_heads: int, dropout: float, kernels: bool) -> Tensor:
    """Causal attention within frames of a few positions: [N, S, [q | k | v]] -> [N, S, n_heads * head_dim].

    The kernel knows no dropout, nor more positions and wider heads than any preset has; there PyTorch computes.
    """
    rows, positions, width = qkv.shape
    if kernels and not dropout:
        from .kernels.short_attention import MAX_HEAD_DIM, MAX_POSITIONS
        from .kernels.short_attention import short_attention as kernel

        if positions <= MAX_POSITIONS and width <= (n_heads + 2 * n_kv_heads) * MAX_HEAD_DIM:
            return kernel(qkv, n_heads, n_kv_heads)
    if qkv.device.type != "cpu":
        heads = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1)).transpose(1, 2)
        q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), 1)
        grouped = n_kv_heads < n_heads
        mixed = functional.scaled_dot_product_attention(q, k, v, None, dropout, True, enable_gqa=grouped)
        return mixed.transpose(1, 2).flatten(2)
    shape = (positions, positions, rows, n_kv_heads, n_heads // n_kv_heads)
    keep = functional.dropout(torch.ones(shape), dropout) if dropout else None
    return _ShortAttention.apply(qkv, n_heads, n_kv_heads, keep)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made beside the loss, from logits still in the cache; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, gradients: bool) -> Tensor:
        need_x, need_weight = (gradients and need for need in ctx.needs_input_grad[:2])
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((), dtype=dtype)
        d_x = torch.empty_like(x) if need_x else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        size = max(1, (LOSS_NUMBERS if x.device.type == "cpu" else 32 * LOSS_NUMBERS) // len(weight))
        for start in range(0, len(x), size):
            rows, codes = x[start : start + size], targets[start : start + size, None]
            logprobs = functional.linear(rows, weight).to(dtype).log_softmax(1)
            total -= logprobs.gather(1, codes).sum()
            if need_x or need_weight:
                d_logits = logprobs.exp_()
                d_logits.scatter_add_(1, codes, d_logits.new_full((1, 1), -1.0).expand(codes.shape))
                d_logits = d_logits.to(x.dtype)
                if d_x is not None:
                    d_x[start : start + size] = d_logits @ weight
                if d_weight is not None:
                    d_weight += d_logits.T @ rows
        ctx.dtype = weight.dtype
        ctx.save_for_backward(d_x, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_x, d_weight = ctx.saved_tensors
        d_x = None if d_x is None else (d_x * d_total).to(d_x.dtype)
        return d_x, None if d_weight is None else (d_weight * d_total).to(ctx.dtype), None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, kernels: bool) -> Tensor:
    """Cross-entropy of a head, summed over rows, without the logits of all rows: a scalar in float32, or x's type.

    x [N, dim], weight [V, dim] of x's type, targets [N] int64. Differentiable once.
    """
    if kernels:
        from .kernels.linear_cross_entropy import linear_cross_entropy as kernel

        return kernel(x, weight, targets).sum()
    # Inside, grad mode is always off, and needs_input_grad does not know of no_grad.
    return _LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


def linear_logprob(x: Tensor, weight: Tensor, codes: Tensor, temperature: float, kernels: bool) -> Tensor:
    """Log-probability of codes [N] under softmax(x @ weight.T / temperature), [N] in float32, or x's type if wider.

    x [N, dim], weight [V, dim] of x's type. Only a part of the logits exists at a time, in the backward pass too.
    """
    if kernels:
        from .kernels.linear_logprob import linear_logprob as kernel

        return kernel(x, weight, codes, temperature=temperature)[0]
    size = max(1, (LOSS_NUMBERS if x.device.type == "cpu" else 32 * LOSS_NUMBERS) // len(weight))
    parts = zip(x.split(size), codes.split(size), strict=True)
    return torch.cat([checkpoint(_logprob, *part, weight, temperature, use_reentrant=False) for part in parts])


def _logprob(x: Tensor, codes: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = _wide(functional.linear(x, weight)) / temperature
    return logits.log_softmax(1).gather(1, codes.unsqueeze(1)).squeeze(1)
