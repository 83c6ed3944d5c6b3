"""The objective of alignment equals equations 9 to 11 written out as loops, in float64, with its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.align.objective import (
    clipped_objective,
    dpo_objective,
    extreme_pairs,
    group_advantages,
    keep_extreme,
    reference_divergence,
)

NAN = float("nan")


def plain_advantages(group: list[float]) -> list[float]:
    """Eq. 9 for one group."""
    known = [reward for reward in group if not math.isnan(reward)]
    mean = sum(known) / len(known) if known else 0.0
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in known) / len(known)) if known else 0.0
    if deviation < 1e-6:
        return [0.0] * len(group)
    return [0.0 if math.isnan(reward) else (reward - mean) / deviation for reward in group]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6), st.floats(0, 0.6), st.booleans())
def test_advantages_are_eq_9(prompts: int, count: int, seed: int, missing: float, ties: bool) -> None:
    """Also with rewards that are missing, equal, or few."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, count, generator=generator, dtype=torch.float64)
    if ties:
        rewards = rewards.round()
    rewards[torch.rand(prompts, count, generator=generator) < missing] = NAN
    advantages = group_advantages(rewards)
    expected = torch.tensor([plain_advantages(group) for group in rewards.tolist()])
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)  # float32's rounding
    assert advantages.dtype == torch.float32


@pytest.mark.parametrize("group", [[0.3, 0.3, 0.3], [0.3, NAN, NAN], [NAN, NAN, NAN], [0.3, 0.3 + 1e-7, 0.3]])
def test_a_group_without_spread_contributes_nothing(group: list[float]) -> None:
    advantages = group_advantages(torch.tensor([group]))
    assert advantages.tolist() == [[0.0, 0.0, 0.0]]
    assert not keep_extreme(advantages, 0.0).any()


def test_groups_do_not_touch_one_another() -> None:
    """A prompt that always pays well gains nothing by it; one large group would give it positive advantages."""
    rewards = torch.tensor([[0.1, 0.2, 0.3], [10.1, 10.2, 10.3]], dtype=torch.float64)
    first, second = group_advantages(rewards)
    torch.testing.assert_close(first, second)


def test_the_filter_drops_small_advantages() -> None:
    """|A| >= gamma, with equality kept."""
    advantages = torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.5])
    assert keep_extreme(advantages, 0.5).tolist() == [True, True, False, False, True]
    assert keep_extreme(advantages, 0.0).tolist() == [True, True, False, True, True]


def plain_objective(
    logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, epsilon: float, epsilon_high: float
) -> torch.Tensor:
    """Eq. 10 and 11, one code after another."""
    values = []
    for i, advantage in enumerate(advantages):
        total = logprobs.new_zeros(())
        for j in range(logprobs.shape[1]):
            for t in range(logprobs.shape[2]):
                ratio = (logprobs[i, j, t] - old[i, j, t]).exp()
                if ratio > 1 + epsilon_high:
                    clipped = 0 * ratio + 1 + epsilon_high
                elif ratio < 1 - epsilon:
                    clipped = 0 * ratio + 1 - epsilon
                else:
                    clipped = ratio
                a, b = ratio * advantage, clipped * advantage
                total = total + (a if a <= b else b)
        values.append(total / logprobs[i].numel())
    return torch.stack(values)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([(0.2, 0.28), (0.0, 0.5), (0.5, 0.0), (0.2, 0.2)]),
    st.integers(0, 10**6),
)
def test_the_clipped_objective_is_eq_10_and_11(
    count: int, codes: int, frames: int, bounds: tuple[float, float], seed: int
) -> None:
    """Value and gradient, on ratios well inside and outside of both bounds."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, codes, frames)
    old = -5 * torch.rand(shape, generator=generator, dtype=torch.float64)
    logprobs = (old + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(count, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, generator=generator, dtype=torch.float64)
    given_, expected = (
        clipped_objective(logprobs, old, advantages, *bounds),
        plain_objective(logprobs, old, advantages, *bounds),
    )
    torch.testing.assert_close(given_, expected)
    gradients = [torch.autograd.grad((weights * value).sum(), logprobs)[0] for value in (given_, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("advantage", "ratio", "learns"), [(1, 1.3, False), (1, 0.7, True), (-1, 1.3, True)])
def test_clipping_is_one_sided_and_asymmetric(advantage: float, ratio: float, learns: bool) -> None:
    """Beyond 1.28 a good rollout is not pushed further, a bad one still is; below 0.8 it is the other way round."""
    logprobs = torch.tensor([[[math.log(ratio)]]], requires_grad=True)
    objective = clipped_objective(logprobs, torch.zeros(1, 1, 1), torch.tensor([float(advantage)]), 0.2, 0.28)
    (gradient,) = torch.autograd.grad(objective.sum(), logprobs)
    assert (gradient.item() != 0) == learns
    inside = torch.tensor([[[math.log(1.25)]]], requires_grad=True)  # above 1 + epsilon, below 1 + epsilon_high
    objective = clipped_objective(inside, torch.zeros(1, 1, 1), torch.tensor([1.0]), 0.2, 0.28)
    assert torch.autograd.grad(objective.sum(), inside)[0].item() != 0


def test_at_the_old_policy_the_gradient_is_that_of_reinforce() -> None:
    """Ratios of 1: the objective is the advantage, its gradient that of the mean log-probability times it."""
    logprobs = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    objective = clipped_objective(logprobs, logprobs.detach(), advantages, 0.2, 0.28)
    torch.testing.assert_close(objective, advantages)
    (gradient,) = torch.autograd.grad(objective.sum(), logprobs)
    torch.testing.assert_close(gradient, advantages.view(3, 1, 1).expand(3, 2, 4) / 8)


def test_the_divergence_is_zero_at_the_reference_and_unbiased() -> None:
    """Its mean over codes of the policy is the KL divergence, worked out from both distributions."""
    policy = torch.randn(1, 5, dtype=torch.float64).log_softmax(1)
    reference = torch.randn(1, 5, dtype=torch.float64).log_softmax(1)
    each = reference_divergence(policy.view(5, 1, 1), reference.view(5, 1, 1))
    assert (each >= 0).all()
    mean = (policy.exp() * each).sum()
    torch.testing.assert_close(mean, (policy.exp() * (policy - reference)).sum())
    assert reference_divergence(policy.view(5, 1, 1), policy.view(5, 1, 1)).abs().max() == 0


def test_pairs_are_the_best_and_the_worst_of_each_group() -> None:
    """Groups of equal rewards and groups with fewer than two give none; ties go to the first."""
    rewards = torch.tensor(
        [[0.1, 0.9, 0.9, -0.3], [0.5, 0.5, 0.5, 0.5], [NAN, 0.2, NAN, 0.7], [NAN, NAN, 0.2, NAN], [NAN] * 4]
    )
    best, worst = extreme_pairs(rewards)
    assert best.tolist() == [1, 11]
    assert worst.tolist() == [3, 9]


def test_dpo_is_its_formula() -> None:
    best, worst, reference_best, reference_worst = torch.randn(4, 6, dtype=torch.float64)
    given_ = dpo_objective(best, worst, reference_best, reference_worst, 0.1)
    for i in range(6):
        margin = (best[i] - reference_best[i]) - (worst[i] - reference_worst[i])
        assert given_[i].item() == pytest.approx(-math.log(1 + math.exp(-0.1 * margin)))
