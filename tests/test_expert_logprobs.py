"""Expert.logprobs is the policy that the sampler draws from: value, gradient, and every way to compute it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import siren
from siren.config import SirenConfig
from siren.expert import Expert
from siren.sampler import Sampler

SMALL = SirenConfig.preset("tiny")


def make(config: SirenConfig, seed: int = 0) -> siren.Siren:
    torch.manual_seed(seed)
    model = siren.Siren(config)
    for parameter in model.parameters():  # biases and norms too
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prompts(config: SirenConfig, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    return torch.randn(batch, length, config.prompt_dim), mask


def plain(
    expert: Expert,
    codes: torch.Tensor,
    prompt: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    guidance_scale: float,
) -> torch.Tensor:
    """By the logits: guided, scaled, log-softmax, gathered."""
    logits = expert(codes, prompt, mask)
    if guidance_scale != 1:
        uncond = expert(codes, torch.zeros_like(prompt[:, :1]))
        logits = uncond + guidance_scale * (logits - uncond)
    owned = codes[:, expert.start_codebook : expert.start_codebook + expert.config.codes_per_expert]
    return (logits / temperature).log_softmax(-1).gather(-1, owned.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_before_an_update_every_ratio_is_one(backend: str, guidance_scale: float) -> None:
    """What the sampler reports and what training computes are within 1e-5 of a ratio of 1, in float32 (eq. 11)."""
    if backend == "cpu":
        pytest.importorskip("siren._cpu")
    model = make(SMALL)
    prompt, mask = prompts(SMALL, 5, 7)
    sampler = Sampler(model, backend=backend, weights="fp32")
    out = sampler.sample(prompt, mask, frames=31, seed=3, temperature=0.9, guidance_scale=guidance_scale)
    m = SMALL.codes_per_expert
    for k, expert in enumerate(model.experts):
        with torch.no_grad():
            logprobs = expert.logprobs(out.codes, prompt, mask, 0.9, guidance_scale)
        ratio = torch.exp(logprobs - out.logprobs[:, k * m : (k + 1) * m])
        assert (ratio - 1).abs().max() < 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 3.0])
@pytest.mark.parametrize(
    "changes", [{}, {"factorized_layers": 0, "conditioning": "none", "num_experts": 4}, {"num_experts": 12}]
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_values_and_gradients_are_those_of_the_logits(
    changes: dict[str, Any], guidance_scale: float, checkpoint: bool
) -> None:
    """In float64, for models with and without a residual decoder, and with blocks computed twice."""
    config = dataclasses.replace(SMALL, **changes)
    expert = make(config, 1).double().experts[1]
    prompt, mask = prompts(config, 3, 5)
    prompt = prompt.double()
    codes = torch.randint(config.codebook_size, (3, config.num_codebooks, 11))
    weights = torch.randn(3, config.codes_per_expert, 11, dtype=torch.float64)
    results = []
    for compute in (
        lambda: plain(expert, codes, prompt, mask, 0.7, guidance_scale),
        lambda: expert.logprobs(codes, prompt, mask, 0.7, guidance_scale, checkpoint_activations=checkpoint),
    ):
        expert.zero_grad()
        values = compute()
        (values * weights).sum().backward()
        gradients = {n: p.grad for n, p in expert.named_parameters() if p.grad is not None}
        results.append((values.detach(), gradients))
    (values, gradients), (fast_values, fast_gradients) = results
    torch.testing.assert_close(fast_values, values)
    assert gradients.keys() == fast_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_it_is_the_loss_with_another_sign() -> None:
    """At temperature 1 without guidance, summed over a batch, it is minus `loss_sums`."""
    expert = make(SMALL).experts[0]
    prompt, mask = prompts(SMALL, 2, 4)
    codes = torch.randint(SMALL.codebook_size, (2, SMALL.num_codebooks, 9))
    sums = expert.logprobs(codes, prompt, mask).sum(dim=(0, 2))
    torch.testing.assert_close(-sums, expert.loss_sums(codes, prompt, mask))
