"""The experts that learn: gradients of the objective on rollouts (eq. 9 to 11), and steps of their optimiser.

Each process has whole groups of rollouts. Gradients are summed over the processes, and so is what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..expert import Expert
from ..model import Siren
from ..train.distributed import World
from ..train.optimizer import make_optimizer
from .objective import (
    clipped_objective,
    dpo_objective,
    extreme_pairs,
    group_advantages,
    keep_extreme,
    reference_divergence,
)
from .rollout import Rollouts
from .settings import AlignSettings


class Learner:
    """The chosen experts of `model`, which change in place. `reference`: copies as they were at the beginning, if the
    settings need them; frames: of a rollout."""

    def __init__(
        self, settings: AlignSettings, model: Siren, reference: Mapping[int, Expert], frames: int, world: World
    ) -> None:
        self.settings, self.config, self.reference, self.frames = settings, model.config, reference, frames
        self.world = world
        experts: list[Any] = list(model.experts)
        self.experts: dict[int, Expert] = {k: experts[k] for k in settings.chosen_experts(model.config.num_experts)}
        self.parameters: dict[str, nn.Parameter] = {
            f"{k}.{name}": parameter
            for k, expert in self.experts.items()
            for name, parameter in expert.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = make_optimizer(
            self.parameters, settings.learning_rate, settings.betas, settings.weight_decay, world.device
        )

    def learn(self, rollouts: Rollouts, learning_rate: float) -> dict[str, float]:
        """All updates on this process's rollouts, whole groups; returns what is logged, of all processes together.

        Raises FloatingPointError, before that update, if a gradient is not finite. All processes must call.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        rewards = rollouts.rewards.view(-1, self.settings.num_generations)
        return self._dpo(rollouts, rewards) if self.settings.loss == "dpo" else self._grpo(rollouts, rewards)

    def _grpo(self, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Updates by eq. 10."""
        settings = self.settings
        advantages = group_advantages(rewards).flatten()
        kept = keep_extreme(advantages, settings.advantage_threshold).nonzero()[:, 0]
        parts = _parts(kept, settings.batch_size)
        count = settings.prompts_per_step * settings.num_generations
        old = {k: [self._old_logprobs(k, rollouts, rows) for rows in parts] for k in self.experts}
        if settings.beta:
            reference = {k: [self._reference_logprobs(k, rollouts, rows) for rows in parts] for k in self.experts}
        record: dict[str, float] = {}
        for _ in range(settings.num_iterations):
            sums = torch.zeros(5, dtype=torch.float64)  # objective, |ratio - 1|, clipped, divergence, codes
            for i, rows in enumerate(parts):
                for k, expert in self.experts.items():
                    logprobs = self._logprobs(expert, rollouts, rows)
                    a = advantages[rows].to(logprobs.device)
                    objective = clipped_objective(logprobs, old[k][i], a, settings.epsilon, settings.epsilon_high)
                    if settings.beta:
                        divergence = reference_divergence(logprobs, reference[k][i])
                        objective = objective - settings.beta * divergence
                        sums[3] += divergence.detach().sum().cpu()
                    (-objective.sum() / (count * len(self.experts))).backward()
                    ratio = (logprobs.detach() - old[k][i]).exp()
                    outside = (ratio < 1 - settings.epsilon) | (ratio > 1 + settings.epsilon_high)
                    measured = (objective.detach().sum(), (ratio - 1).abs().sum(), outside.sum(), 0, ratio.numel())
                    sums += torch.tensor([float(value) for value in measured], dtype=torch.float64)
            objective_, off, clipped, divergence_, codes = self.world.total(sums).tolist()
            record = {
                "objective": objective_ / (count * len(self.experts)),
                "ratio_off_one": _ratio(off, codes),
                "clipped": _ratio(clipped, codes),
                "kept": codes / (count * len(self.experts) * self.config.codes_per_expert * self.frames),
            }
            if settings.beta:
                record["divergence"] = _ratio(divergence_, codes / (self.config.codes_per_expert * self.frames))
            if codes:
                record["grad_norm"] = self._update()
        return record

    def _dpo(self, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Updates by direct preference optimisation, the comparison of figure 5."""
        settings = self.settings
        best, worst = extreme_pairs(rewards)
        parts = _parts(torch.stack((best, worst), 1).flatten(), 2 * max(1, settings.batch_size // 2))
        reference = {k: [self._reference_logprobs(k, rollouts, rows) for rows in parts] for k in self.experts}
        record: dict[str, float] = {}
        for _ in range(settings.num_iterations):
            sums = torch.zeros(3, dtype=torch.float64)  # objective, pairs told apart, pairs
            # An expert's pairs are told apart by its own codes: each learns from the same preference by itself.
            for i, rows in enumerate(parts):
                for k, expert in self.experts.items():
                    logprobs = self._logprobs(expert, rollouts, rows).sum(dim=(1, 2)).view(-1, 2)
                    before = reference[k][i].sum(dim=(1, 2)).view(-1, 2)
                    objective = dpo_objective(
                        logprobs[:, 0], logprobs[:, 1], before[:, 0], before[:, 1], settings.dpo_beta
                    )
                    (-objective.sum() / (settings.prompts_per_step * len(self.experts))).backward()
                    margin = (logprobs - before).detach()
                    told = (margin[:, 0] > margin[:, 1]).sum()
                    measured = (objective.detach().sum(), told, len(objective))
                    sums += torch.tensor([float(value) for value in measured], dtype=torch.float64)
            objective_, told_, count = self.world.total(sums).tolist()
            record = {
                "objective": _ratio(objective_, count),
                "told_apart": _ratio(told_, count),
                "kept": count / (settings.prompts_per_step * len(self.experts)),
            }
            if count:
                record["grad_norm"] = self._update()
        return record

    @torch.no_grad()
    def _old_logprobs(self, k: int, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """Those of the policy that drew the codes: the sampler's own where both computed in float32."""
        settings = self.settings
        if settings.precision == settings.rollout_weights == "fp32":
            first = k * self.config.codes_per_expert
            return rollouts.logprobs[rows, first : first + self.config.codes_per_expert].to(self.world.device)
        return self._logprobs(self.experts[k], rollouts, rows)

    @torch.no_grad()
    def _reference_logprobs(self, k: int, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """Those of the model that the run began with."""
        return self._logprobs(self.reference[k], rollouts, rows)

    def _logprobs(self, expert: Expert, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """Log-probabilities of an expert's codes of some rollouts, [n, codes_per_expert, T]."""
        settings, device = self.settings, self.world.device
        codes, prompt, mask = (
            tensor[rows].to(device) for tensor in (rollouts.codes, rollouts.prompt, rollouts.prompt_mask)
        )
        with torch.autocast(device.type, torch.bfloat16, settings.precision == "bf16"):
            return expert.logprobs(
                codes,
                prompt,
                mask,
                settings.temperature,
                settings.guidance_scale,
                checkpoint_activations=settings.checkpoint_activations,
            )

    def _update(self) -> float:
        """One step of the optimiser on the gradients of all processes; returns their norm."""
        parameters = self.parameters.values()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world.size > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
        limit = self.settings.grad_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            raise FloatingPointError(f"its norm is {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def _parts(rows: Tensor, size: int) -> list[Tensor]:
    """Rows in pieces of `size`; none of nothing, where Tensor.split gives an empty one."""
    return [part for part in rows.split(size) if len(part)]


def _ratio(total: float, count: float) -> float:
    return total / count if count else 0.0
