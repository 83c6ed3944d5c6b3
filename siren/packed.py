"""What a training step computes of a padded batch: only its valid frames, packed into rows [N, dim].

Everything but attention treats frames one by one, so padding is left out of it. Attention gets a sequence's frames
side by side, the valid ones first: causal attention then needs no mask, because what a valid frame may see is exactly
the valid frames before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LOSS_ROWS = 1024  # rows whose logits exist at a time


@dataclass(frozen=True)
class Packing:
    """Which frames of a batch [B, T] are rows, and where each stands among its sequence's own.

    frames [N]: index of the row's frame in the flat batch, b * T + t. slots [N]: b * length + its rank among the
    sequence's valid frames, or None where that is `frames` itself.
    """

    batch: int
    length: int  # most valid frames of a sequence
    time: Tensor  # [N], t
    sequence: Tensor  # [N], b
    slots: Tensor | None

    @classmethod
    def of(cls, batch: int, frames: int, mask: Tensor | None, device: torch.device) -> Packing:
        """mask [batch, frames] bool, True = valid; None: all are. Waits for the device, since sizes depend on it."""
        if mask is None:
            every = torch.arange(batch * frames, device=device)
            return cls(batch, frames, every % frames, every // frames, None)
        sequence, time = mask.nonzero(as_tuple=True)
        rank = mask.cumsum(1) - 1
        length = int(rank[:, -1].max()) + 1
        if length * batch == time.numel():
            return cls(batch, length, time, sequence, None)
        return cls(batch, length, time, sequence, sequence * length + rank[sequence, time])

    def pad(self, rows: Tensor) -> Tensor:
        """[N, width] -> [B, length, width], zeros where a sequence is shorter."""
        if self.slots is not None:
            rows = rows.new_zeros(self.batch * self.length, rows.shape[1]).index_copy(0, self.slots, rows)
        return rows.view(self.batch, self.length, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        """[B, length, width] -> [N, width]."""
        rows = padded.flatten(0, 1)
        return rows if self.slots is None else rows.index_select(0, self.slots)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log_softmax(x @ weight.T)[target], LOSS_ROWS rows of logits at a time.

    The gradients are made in the same pass, from logits that are still in the cache; the backward pass scales them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        exact = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((), dtype=exact)
        need_x, need_weight, _ = ctx.needs_input_grad
        d_x = torch.empty_like(x) if need_x else None
        d_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        for start in range(0, x.shape[0], LOSS_ROWS):
            rows, codes = x[start : start + LOSS_ROWS], targets[start : start + LOSS_ROWS, None]
            logprobs = F.linear(rows, weight).to(exact).log_softmax(1)
            total -= logprobs.gather(1, codes).sum()
            if need_x or need_weight:
                d_logits = logprobs.exp_()
                d_logits.scatter_add_(1, codes, d_logits.new_full((), -1.0).expand(codes.shape))
                d_logits = d_logits.to(x.dtype)
                if d_x is not None:
                    torch.mm(d_logits, weight, out=d_x[start : start + LOSS_ROWS])
                if d_weight is not None:
                    d_weight += d_logits.T @ rows
        ctx.dtypes = x.dtype, weight.dtype
        ctx.save_for_backward(d_x, d_weight)
        return total

    @staticmethod
    def backward(ctx, d_total: Tensor):  # type: ignore[override]
        d_x, d_weight = ctx.saved_tensors
        d_x = None if d_x is None else d_x * d_total.to(d_x.dtype)
        d_weight = None if d_weight is None else (d_weight * d_total).to(ctx.dtypes[1])
        return d_x, d_weight, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a head, summed over rows: x [N, dim], weight [V, dim], targets [N] int64 -> scalar, float32 or
    x's type if that is wider. Differentiable once."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return LinearCrossEntropy.apply(x, weight, targets)
