"""Alignment, algorithm 3: rollouts of the old policy, their rewards, and updates of the experts that learn.

Bit for bit the same on a CPU however often it is stopped, as far as the rewards are: prompts and noise are functions of
the seed and the step, and a state holds weights and optimiser exactly.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm import tqdm

from ..codec import Codec
from ..expert import Expert
from ..model import Siren
from ..sampler import Sampler
from ..train.distributed import World
from ..train.logs import Logs
from ..train.loop import TrainingError
from ..train.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from ..train.schedule import learning_rate
from ..train.state import latest_state, read_state, write_state
from ..train.stop import StopSignals, TrainingStoppedError
from .objective import (
    clipped_objective,
    dpo_objective,
    extreme_pairs,
    group_advantages,
    keep_extreme,
    reference_divergence,
)
from .prompts import Prompt, PromptSet, rollout_seeds
from .rewards import RewardMix
from .rollout import Rollouts, roll_out
from .settings import AlignSettings

_EVALUATION = 1 << 31  # in place of a step, for the seeds of evaluations


@dataclass(frozen=True)
class Job:
    """What a run is made of. `reference` are copies of the experts as they were at the beginning, if they are needed.

    `agreed` are the settings that a state must have been made with.
    """

    settings: AlignSettings
    model: Siren
    reference: dict[int, Expert]
    sampler: Sampler
    codec: Codec
    reward: RewardMix
    prompts: PromptSet
    held_out: list[Prompt]
    agreed: dict[str, Any]
    world: World


class Alignment:
    """A run in `folder`, from its latest state if there is one."""

    def __init__(self, job: Job, folder: Path, stop: StopSignals) -> None:
        settings, config = job.settings, job.model.config
        self.job, self.folder, self.stop = job, folder, stop
        experts: list[Any] = list(job.model.experts)
        self.experts: dict[int, Expert] = {k: experts[k] for k in settings.chosen_experts(config.num_experts)}
        self.parameters: dict[str, nn.Parameter] = {
            f"{k}.{name}": parameter
            for k, expert in self.experts.items()
            for name, parameter in expert.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = make_optimizer(
            self.parameters, settings.learning_rate, settings.betas, settings.weight_decay, job.world.device
        )
        self.frames = round(settings.seconds * job.codec.sample_rate / job.codec.hop_length)
        self.step, self.saved, self.failures = 0, -1, 0

    def run(self) -> None:
        """To the last step. Raises TrainingError, CheckpointError, TrainingStoppedError, as training does."""
        job, settings, world = self.job, self.job.settings, self.job.world
        self.load()
        self.logs = None
        if world.rank == 0:
            self.logs = Logs(self.folder, self.step, settings.tensorboard, settings.wandb, job.agreed)
        quiet = world.rank > 0 or not settings.progress or not sys.stderr.isatty()
        bar = tqdm(initial=self.step, total=settings.max_steps, desc="aligning", unit="step", disable=quiet)
        try:
            if self.step == 0:
                self.evaluate()
            while self.step < settings.max_steps:
                record = self.one_step()
                if self.logs is not None:
                    self.logs.write(record)
                bar.set_postfix(reward=f"{record.get('reward', math.nan):.3f}", refresh=False)
                bar.update()
                signal = world.largest(self.stop.received)
                last = self.step == settings.max_steps
                if signal or last or _due(self.step, settings.save_every):
                    self.save()  # before the evaluation: whoever sent the signal may not wait for it
                if last or _due(self.step, settings.eval_every):
                    self.evaluate()
                if signal:
                    raise TrainingStoppedError(
                        signal, f"stopped at step {self.step} of {settings.max_steps}; the same command goes on there"
                    )
        finally:
            bar.close()
            if self.logs is not None:
                self.logs.close()

    def one_step(self) -> dict[str, Any]:
        """One round of algorithm 3; returns what is logged of it."""
        settings, world = self.job.settings, self.job.world
        own = range(world.rank, settings.prompts_per_step, world.size)  # whole groups stay on a process
        prompts = self.job.prompts.of_step(self.step, settings.prompts_per_step, settings.seed)
        seeds = [seed for p in own for seed in rollout_seeds(settings.num_generations, settings.seed, self.step, p)]
        rollouts = self.roll_out([prompts[p] for p in own], seeds)
        self.check_rewards(rollouts)
        start = time.perf_counter()
        rewards = rollouts.rewards.view(-1, settings.num_generations)
        rate = learning_rate(
            self.step, settings.learning_rate, settings.max_steps, settings.warmup_steps, settings.min_lr_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        update = self.dpo if settings.loss == "dpo" else self.grpo
        learned = update(rollouts, rewards)
        for k, expert in self.experts.items():
            self.job.sampler.load_expert(k, expert)
        self.step += 1
        known = rewards.isfinite()
        spread = [group[mask].std(correction=0) for group, mask in zip(rewards, known, strict=True) if mask.any()]
        sums = world.total(
            torch.tensor([rewards[known].sum(), known.sum(), sum(spread, torch.tensor(0.0)), len(spread)])
        ).tolist()
        record: dict[str, Any] = {"step": self.step}
        if sums[1]:  # a step without rewards has none to log
            record |= {"reward": sums[0] / sums[1], "reward_std": sums[2] / sums[3]}
        means = {f"reward_{name}": float(part.nanmean()) for name, part in rollouts.parts.items()}
        record |= {name: mean for name, mean in means.items() if math.isfinite(mean)}  # JSON has no NaN
        record |= learned | {"learning_rate": rate, "missing_rewards": int((~known).sum())}
        record |= {f"{name}_seconds": round(value, 4) for name, value in rollouts.seconds.items()}
        record["update_seconds"] = round(time.perf_counter() - start, 4)
        record["rollout_frames"] = rollouts.codes.shape[0] * rollouts.codes.shape[2]
        return record | ({"failures": str(rollouts.failures)} if rollouts.failures else {})

    def roll_out(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollouts:
        job, settings = self.job, self.job.settings
        return roll_out(
            job.sampler,
            job.codec,
            job.reward,
            prompts,
            seeds,
            self.frames,
            settings.rollout_batch_size,
            settings.temperature,
            settings.guidance_scale,
        )

    def check_rewards(self, rollouts: Rollouts) -> None:
        """Count steps in a row without any reward. Raises TrainingError when they are too many."""
        known = int(self.job.world.total(rollouts.rewards.isfinite().sum().view(1)))
        self.failures = 0 if known else self.failures + 1
        if self.failures >= self.job.settings.max_failures:
            reasons = "; ".join(f"{name} ({count} times)" for name, count in rollouts.failures.items())
            raise TrainingError(
                f"no rollout of the last {self.failures} steps has a reward: {reasons}. The last state, of step "
                f"{max(self.saved, 0)}, is kept"
            )

    def grpo(self, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Updates by eq. 10."""
        settings = self.job.settings
        advantages = group_advantages(rewards).flatten()
        kept = keep_extreme(advantages, settings.advantage_threshold).nonzero()[:, 0]
        count = settings.prompts_per_step * settings.num_generations
        old = {k: self.old_logprobs(k, rollouts, kept) for k in self.experts}
        reference = {k: self.reference_logprobs(k, rollouts, kept) for k in self.experts} if settings.beta else {}
        record: dict[str, float] = {}
        for _ in range(settings.num_iterations):
            sums = torch.zeros(5, dtype=torch.float64)  # objective, |ratio - 1|, clipped, divergence, codes
            for rows in _parts(len(kept), settings.batch_size):
                for k in self.experts:
                    logprobs = self.logprobs(k, rollouts, kept[rows])
                    a = advantages[kept[rows]].to(logprobs.device)
                    objective = clipped_objective(logprobs, old[k][rows], a, settings.epsilon, settings.epsilon_high)
                    if settings.beta:
                        divergence = reference_divergence(logprobs, reference[k][rows])
                        objective = objective - settings.beta * divergence
                        sums[3] += divergence.detach().sum().cpu()
                    (-objective.sum() / (count * len(self.experts))).backward()
                    ratio = (logprobs.detach() - old[k][rows]).exp()
                    outside = (ratio < 1 - settings.epsilon) | (ratio > 1 + settings.epsilon_high)
                    sums += torch.tensor(
                        [
                            float(objective.detach().sum()),
                            float((ratio - 1).abs().sum()),
                            int(outside.sum()),
                            0,
                            ratio.numel(),
                        ]
                    )
            objective_, off, clipped, divergence_, codes = self.job.world.total(sums).tolist()
            record = {
                "objective": objective_ / (count * len(self.experts)),
                "ratio_off_one": _ratio(off, codes),
                "clipped": _ratio(clipped, codes),
                "kept": codes / (count * len(self.experts) * self.job.model.config.codes_per_expert * self.frames),
            }
            if settings.beta:
                record["divergence"] = _ratio(
                    divergence_, codes / (self.job.model.config.codes_per_expert * self.frames)
                )
            if codes:
                record["grad_norm"] = self.update()
        return record

    def dpo(self, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Updates by direct preference optimisation, the comparison of figure 5."""
        settings = self.job.settings
        best, worst = extreme_pairs(rewards)
        pairs = torch.stack((best, worst), 1).flatten()
        reference = {k: self.reference_logprobs(k, rollouts, pairs) for k in self.experts}
        record: dict[str, float] = {}
        for _ in range(settings.num_iterations):
            sums = torch.zeros(3, dtype=torch.float64)  # objective, pairs told apart, pairs
            # An expert's pairs are told apart by its own codes: each learns from the same preference by itself.
            for rows in _parts(len(pairs), 2 * max(1, settings.batch_size // 2)):
                for k in self.experts:
                    logprobs = self.logprobs(k, rollouts, pairs[rows]).sum(dim=(1, 2)).view(-1, 2)
                    before = reference[k][rows].sum(dim=(1, 2)).view(-1, 2)
                    objective = dpo_objective(
                        logprobs[:, 0], logprobs[:, 1], before[:, 0], before[:, 1], settings.dpo_beta
                    )
                    (-objective.sum() / (settings.prompts_per_step * len(self.experts))).backward()
                    margin = (logprobs - before).detach()
                    told = (margin[:, 0] > margin[:, 1]).sum()
                    sums += torch.tensor([float(objective.detach().sum()), int(told), len(objective)])
            objective_, told_, count = self.job.world.total(sums).tolist()
            record = {
                "objective": _ratio(objective_, count),
                "told_apart": _ratio(told_, count),
                "kept": count / (settings.prompts_per_step * len(self.experts)),
            }
            if count:
                record["grad_norm"] = self.update()
        return record

    def logprobs(self, k: int, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """Log-probabilities of expert k's codes of some rollouts, [n, m, T], by its weights as they are now."""
        return self._logprobs(self.experts[k], rollouts, rows)

    @torch.no_grad()
    def old_logprobs(self, k: int, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """Those of the policy that drew the codes: the sampler's own where both computed in float32."""
        settings, config = self.job.settings, self.job.model.config
        if settings.precision == settings.rollout_weights == "fp32":
            first = k * config.codes_per_expert
            return rollouts.logprobs[rows, first : first + config.codes_per_expert].to(self.job.world.device)
        return self._in_parts(self.experts[k], rollouts, rows)

    @torch.no_grad()
    def reference_logprobs(self, k: int, rollouts: Rollouts, rows: Tensor) -> Tensor:
        """Those of the model that the run began with."""
        return self._in_parts(self.job.reference[k], rollouts, rows)

    def _in_parts(self, expert: Expert, rollouts: Rollouts, rows: Tensor) -> Tensor:
        size = self.job.settings.batch_size
        parts = [self._logprobs(expert, rollouts, rows[part]) for part in _parts(len(rows), size)]
        shape = (0, expert.config.codes_per_expert, self.frames)
        return torch.cat(parts) if parts else torch.empty(shape, device=self.job.world.device)

    def _logprobs(self, expert: Expert, rollouts: Rollouts, rows: Tensor) -> Tensor:
        settings, device = self.job.settings, self.job.world.device
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

    def update(self) -> float:
        """One step of the optimiser on the gradients of all processes; returns their norm. Raises TrainingError."""
        parameters = self.parameters.values()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.job.world.size > 1:
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
        limit = self.job.settings.grad_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of step {self.step + 1} is not finite: lower learning_rate, or use precision fp32; the "
                f"last state, of step {max(self.saved, 0)}, is kept"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def evaluate(self) -> None:
        """The mean reward on the held-out prompts, always with the same noise, so that changes are the policy's."""
        job, settings, world = self.job, self.job.settings, self.job.world
        own = range(world.rank, len(job.held_out), world.size)
        sums = torch.zeros(2, dtype=torch.float64)
        if own:
            seeds = [s for p in own for s in rollout_seeds(settings.eval_generations, _EVALUATION, 0, p)]
            rewards = self.roll_out([job.held_out[p] for p in own], seeds).rewards
            known = rewards.isfinite()
            sums = torch.stack((rewards[known].sum(), known.sum()))
        total, count = world.total(sums.double()).tolist()
        if self.logs is not None and count:
            self.logs.write({"step": self.step, "eval_reward": total / count, "eval_sounds": int(count)})

    def save(self) -> None:
        """Write a state, unless this step's is there already."""
        if self.saved == self.step:
            return
        model = {
            f"{k}.{name}": value.detach().cpu()
            for k, expert in self.experts.items()
            for name, value in expert.state_dict().items()
        }
        values = {
            "step": self.step,
            "total_steps": self.job.settings.max_steps,
            "settings": self.job.agreed,
            "failures": self.failures,
            "torch": torch.__version__,
        }
        optimizer = optimizer_tensors(self.optimizer, self.parameters)
        self.job.world.first_does(lambda: write_state(self.folder, values, model, optimizer, self.job.settings.keep))
        self.saved = self.step

    def load(self) -> None:
        """Take over the latest state."""
        path = latest_state(self.folder)
        if path is None:
            return
        state = read_state(path)
        for k, expert in self.experts.items():
            expert.load_state_dict(
                {name: state.model[f"{k}.{name}"].to(self.job.world.device) for name in expert.state_dict()}
            )
            self.job.sampler.load_expert(k, expert)
        load_optimizer(self.optimizer, self.parameters, state.optimizer)
        self.step = self.saved = int(state.values["step"])
        self.failures = int(state.values["failures"])


def _parts(count: int, size: int) -> list[Tensor]:
    """0 .. count - 1 in pieces of `size`; none of nothing, where Tensor.split gives an empty one."""
    return list(torch.arange(count).split(size)) if count else []


def _ratio(total: float, count: float) -> float:
    return total / count if count else 0.0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
