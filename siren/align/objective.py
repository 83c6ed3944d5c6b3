"""What alignment maximises (paper, section 4.2): advantages of a group, the clipped objective, and DPO beside it.

P prompts, G rollouts of each, N = P G; m codes of a frame that the policy draws, T frames. No tensor here is large:
log-probabilities come from `Expert.logprobs` or the sampler.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LEAST_SPREAD = 1e-6  # rewards are computed in float32: below, differences within a group are rounding


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. 9: rewards [P, G], NaN where there is none -> how many standard deviations above the group's mean, [P, G].

    Mean and deviation (over n, as the paper's formula has it) are those of the group's rewards alone. A rollout without
    a reward has advantage 0 and so contributes nothing, and so has a whole group with fewer than two rewards, or whose
    deviation is below 1e-6: normalising would turn rounding into advantages. float32, computed in float64.
    """
    rewards = rewards.double()
    known = rewards.isfinite()
    count = known.sum(1, keepdim=True).clamp(min=1)
    values = torch.where(known, rewards, 0.0)
    centred = torch.where(known, values - values.sum(1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    advantages = torch.where(deviation >= LEAST_SPREAD, centred / deviation, 0.0)
    return advantages.float()


def keep_extreme(advantages: Tensor, threshold: float) -> Tensor:
    """The filter of eq. 10: which rollouts are learned from, |A| >= threshold, bool. An advantage of 0 teaches nothing
    and is left out whatever the threshold."""
    return (advantages.abs() >= threshold) & (advantages != 0)


def clipped_objective(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float
) -> Tensor:
    """Eq. 10 and 11 for each rollout [N], a mean over its codes: logprobs and old_logprobs [N, m, T], advantages [N].

    The ratio of each code is clipped to [1 - epsilon, 1 + epsilon_high], and the smaller product counts. To be
    maximised; the average over the rollouts is the caller's, who knows how many there were before the filter.
    """
    advantages = advantages.view(-1, 1, 1)
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return torch.minimum(ratio * advantages, clipped * advantages).mean(dim=(1, 2))


def reference_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(policy | reference) of each rollout [N] from the codes that were drawn, a mean over codes [N, m, T].

    r - 1 - log r with r = reference / policy: no bias for codes of the policy, never negative, little variance.
    """
    difference = reference_logprobs - logprobs
    return (difference.exp() - 1 - difference).mean(dim=(1, 2))


def extreme_pairs(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """For DPO: places in [N] of the best and the worst rollout of each group of rewards [P, G] whose best and worst
    differ by 1e-6 or more; NaN is no reward. Of equal ones the first is taken. Two int64 [Q], Q <= P."""
    known = rewards.isfinite()
    best, best_place = rewards.masked_fill(~known, -torch.inf).max(1)
    worst, worst_place = rewards.masked_fill(~known, torch.inf).min(1)
    groups = (best - worst >= LEAST_SPREAD).nonzero()[:, 0]
    first = groups * rewards.shape[1]
    return first + best_place[groups], first + worst_place[groups]


def dpo_objective(
    best: Tensor, worst: Tensor, reference_best: Tensor, reference_worst: Tensor, dpo_beta: float
) -> Tensor:
    """The objective of direct preference optimisation for each pair [Q] (Rafailov et al., 2023), to be maximised.

    log sigmoid(dpo_beta ((log best - log reference) - (log worst - log reference))), all [Q]: log-probabilities of
    whole rollouts, sums over frames and codes.
    """
    return logsigmoid(dpo_beta * ((best - reference_best) - (worst - reference_worst)))
