"""The clipped policy objective of stage 2 on a linear head, its log-probabilities in the same pass (paper, eq. 10, 11).

    r[n]    = exp(logprob[n] - old_logprobs[n])                  logprob as in `linear_logprob`
    loss[n] = -min(r[n] * A[n], clip(r[n], 1 - epsilon, 1 + epsilon_high) * A[n])

x, weight, codes (targets there), mask and temperature are those of `linear_logprob`; old_logprobs [N] float32 is what
the sampler reported when it drew the codes, advantages [N] float32 is A. loss and logprob [N] are float32.

A row is one code: the ratio, its clip and the minimum are its own. Kernels, memory and the backward pass are those of
`linear_logprob`; the loss and its slope d loss / d logprob are the epilogue of the forward pass' second kernel, so the
backward pass only multiplies. Where the objective has a kink the slope is what autograd of torch.clamp and torch.min
gives: the full one for a ratio at a bound, half of it where two different ratios give the same product after rounding.
Where the clipped side is smaller it is 0, even for an infinite ratio (autograd: NaN).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, library

from .linear_logprob import backward_op, check_rows, check_values, forward, linear_logprob_reference


def policy_loss_reference(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch; the contract. In float64 it serves as the exact answer."""
    logprobs, _ = linear_logprob_reference(x, weight, codes, mask, temperature)
    if mask is not None:
        old_logprobs, advantages = old_logprobs.masked_fill(~mask, 0), advantages.masked_fill(~mask, 0)
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.min(ratio * advantages, clipped * advantages), logprobs.detach()


@library.custom_op("siren::policy_loss", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    temperature: float,
    epsilon: float,
    epsilon_high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, codes, old_logprobs, advantages, mask)
    check_values(weight, codes, mask, temperature, "codes")
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be from 0 to 1, not {epsilon}")
    if not (epsilon_high >= 0 and math.isfinite(epsilon_high)):
        raise ValueError(f"epsilon_high must be finite and at least 0, not {epsilon_high}")
    policy = (old_logprobs, advantages, 1 - epsilon, 1 + epsilon_high)
    logprobs, norms, losses, slopes = forward(x, weight, codes, mask, temperature, policy)
    assert losses is not None and slopes is not None
    return losses, logprobs, norms, slopes


@_op.register_fake
def _fake(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    temperature: float,
    epsilon: float,
    epsilon_high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight, codes, old_logprobs, advantages, mask)
    N = x.shape[0]
    losses, logprobs, slopes = (x.new_empty(N, dtype=torch.float32) for _ in range(3))
    return losses, logprobs, x.new_empty((2, N), dtype=torch.float32), slopes


def _setup_context(ctx, inputs, output) -> None:
    x, weight, codes, _, _, mask, ctx.temperature, _, _ = inputs
    _, logprobs, norms, slopes = output
    ctx.mark_non_differentiable(logprobs, norms, slopes)
    ctx.save_for_backward(x, weight, codes, mask, norms, slopes)


def _autograd(ctx, d_losses: Tensor, *_: Tensor | None):
    x, weight, codes, mask, norms, slopes = ctx.saved_tensors
    d_x, d_weight = backward_op(x, weight, codes, mask, norms, d_losses * slopes, ctx.temperature)
    return d_x, d_weight, *[None] * 7


_op.register_autograd(_autograd, setup_context=_setup_context)


def policy_loss(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
) -> tuple[Tensor, Tensor]:
    """Losses and log-probabilities, float32 [N] each, of codes [N] drawn from softmax(x @ weight.T / temperature).

    x [N, d], weight [V, d]; old_logprobs and advantages float32 [N]; mask [N] bool, False leaves a row out: loss 0,
    log-probability 0, no influence on any gradient, whatever it holds. The losses are differentiable once, in x and
    weight alone; the log-probabilities are for monitoring and carry no gradient.

    Equation 10: each of the two codes of a frame has its own head, so call this once a head, with the rows of all G
    sequences of l frames in the group and A_i repeated over the frames of sequence i. Then J is -(losses_1 + losses_2)
    / 2 averaged over the frames of each sequence and over the group; sequences with |A_i| < gamma are masked out.

    epsilon is the paper's eps_d, from 0 to 1; epsilon_high is its eps_u, at least 0. Other errors are those of
    `linear_logprob`, whose `targets` are `codes` here.
    """
    return _op(x, weight, codes, old_logprobs, advantages, mask, temperature, epsilon, epsilon_high)[:2]


def _check(
    x: Tensor, weight: Tensor, codes: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None
) -> None:
    check_rows(x, weight, codes, mask, "codes")
    for name, vector in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        if vector.shape != x.shape[:1] or vector.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 [N={x.shape[0]}] as x is {list(x.shape)}, "
                f"not {vector.dtype} {list(vector.shape)}"
            )
        if vector.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, not on {vector.device}")
