"""Cross-entropy of a linear head without the logits [N, V] in memory: the loss of stage 1 (paper, eq. 6).

    loss[n] = -log_softmax(x[n] @ weight.T)[targets[n]]

x [N, d] bfloat16, float16 or float32; weight [V, d] in x's dtype; targets [N] int32 or int64; mask [N] bool or None,
False leaves a row out; loss [N] float32. It is the log-probability of `linear_logprob` at temperature 1 with its sign
changed: kernels, memory and gradients are described there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_logprob import forward_op


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch; the contract. In float64 it serves as the exact answer."""
    if mask is not None:
        x, targets = x.masked_fill(~mask[:, None], 0), targets.masked_fill(~mask, 0)
    logits = torch.nn.functional.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
    return loss if mask is None else loss.masked_fill(~mask, 0)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Losses float32 [N] of targets [N] under softmax(x @ weight.T): x [N, d], weight [V, d], mask [N] bool.

    Masked rows have loss 0 and no influence on any gradient, whatever they hold. Equation 6 for one head: the rows are
    the frames, the mask is the sequence mask, and the loss is `losses.sum() / mask.sum()`. Differentiable once, in x
    and weight. Errors are those of `linear_logprob`.
    """
    return -forward_op(x, weight, targets, mask, 1.0)[0]
