"""Alignment, algorithm 3: rollouts of the old policy, their rewards, and updates of the experts that learn.

Bit for bit the same on a CPU however often it is stopped, as far as the rewards are: prompts and noise are functions of
the seed and the step, and a state holds weights and optimiser exactly.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..codec import Codec
from ..errors import CheckpointError
from ..expert import Expert
from ..model import Siren
from ..sampler import Sampler
from ..train.distributed import World
from ..train.logs import Logs
from ..train.loop import TrainingError
from ..train.optimizer import load_optimizer, optimizer_tensors
from ..train.schedule import learning_rate
from ..train.state import latest_state, read_state, read_values, write_state
from ..train.stop import StopSignals, TrainingStoppedError
from .learner import Learner
from .prompts import Prompt, PromptSet, rollout_seeds
from .rewards import RewardMix
from .rollout import Rollouts, roll_out
from .settings import AlignSettings

_EVALUATION = 1 << 41  # in place of a run's seed, which is below 2^32, for the seeds of evaluations


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
        settings = job.settings
        self.job, self.folder, self.stop = job, folder, stop
        self.frames = round(settings.seconds * job.codec.sample_rate / job.codec.hop_length)
        self.learner = Learner(settings, job.model, job.reference, self.frames, job.world)
        self.step, self.saved, self.failures = 0, -1, 0
        self.evaluation_due = False
        self.logs: Any = None  # of process 0

    def run(self) -> None:
        """To the last step. Raises TrainingError, CheckpointError, TrainingStoppedError, as training does."""
        settings, world = self.job.settings, self.job.world
        self.load()
        world.first_does(self.open_logs)
        quiet = world.rank > 0 or not settings.progress or not sys.stderr.isatty()
        bar = tqdm(initial=self.step, total=settings.max_steps, desc="aligning", unit="step", disable=quiet)
        try:
            if self.step == 0:
                self.evaluate()
            elif self.evaluation_due:
                self.evaluate()
                self.evaluation_due, self.saved = False, -1
                self.save()  # again, or the next start would evaluate once more
            while self.step < settings.max_steps:
                record = self.one_step()
                self.log(record)
                bar.set_postfix(reward=f"{record.get('reward', math.nan):.3f}", refresh=False)
                bar.update()
                signal = world.largest(self.stop.received)
                last = self.step == settings.max_steps
                self.evaluation_due = last or _due(self.step, settings.eval_every)
                if signal:
                    self.save()  # whoever sent the signal may not wait for the evaluation; the next start does it
                    raise TrainingStoppedError(
                        signal, f"stopped at step {self.step} of {settings.max_steps}; the same command goes on there"
                    )
                if self.evaluation_due:
                    self.evaluate()
                    self.evaluation_due = False
                if last or _due(self.step, settings.save_every):
                    self.save()  # last: what is not logged yet is done again after a kill
        finally:
            bar.close()
            if self.logs is not None:
                self.logs.close()

    def one_step(self) -> dict[str, Any]:
        """One round of algorithm 3; returns what is logged of it: all processes' rollouts, but seconds of this one."""
        settings, world = self.job.settings, self.job.world
        count = settings.prompts_per_step
        own = range(world.rank, count, world.size)  # whole groups stay on a process
        prompts = self.job.prompts.of_step(self.step, count, settings.seed)
        seeds = [seed for p in own for seed in rollout_seeds(settings.num_generations, settings.seed, self.step, p)]
        rollouts = self.roll_out([prompts[p] for p in own], seeds)
        record = {"step": self.step + 1} | self.describe_rewards(rollouts)
        start = time.perf_counter()
        record |= self.learn(rollouts)
        self.step += 1
        record |= {f"{name}_seconds": round(value, 4) for name, value in rollouts.seconds.items()}
        record["update_seconds"] = round(time.perf_counter() - start, 4)
        record["rollout_frames"] = count * settings.num_generations * self.frames
        return record

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

    def describe_rewards(self, rollouts: Rollouts) -> dict[str, Any]:
        """What is logged of the rewards. Raises TrainingError when too many steps in a row have none."""
        settings, world = self.job.settings, self.job.world
        own = torch.stack((rollouts.rewards, *rollouts.parts.values()), 1)
        everyone = world.collect(own.view(-1, settings.num_generations, own.shape[1]), settings.prompts_per_step)
        rewards, *parts = everyone.unbind(2)
        known = rewards.isfinite()
        failures: Counter[str] = sum(map(Counter, world.collect_json(rollouts.failures)), Counter())
        self.failures = 0 if known.any() else self.failures + 1
        if self.failures >= settings.max_failures:
            reasons = "; ".join(f"{name} ({count} times)" for name, count in failures.items())
            raise TrainingError(
                f"no rollout of the last {self.failures} steps has a reward: {reasons}; {self.what_is_kept()}"
            )
        record: dict[str, Any] = {}
        if known.any():  # a step without rewards has none to log
            spread = [group[mask].std(correction=0) for group, mask in zip(rewards, known, strict=True) if mask.any()]
            record = {"reward": float(rewards[known].mean()), "reward_std": float(torch.stack(spread).mean())}
        means = {f"reward_{name}": float(part.nanmean()) for name, part in zip(rollouts.parts, parts, strict=True)}
        record |= {name: mean for name, mean in means.items() if math.isfinite(mean)}  # JSON has no NaN
        record["missing_rewards"] = int((~known).sum())
        return record | ({"failures": str(dict(failures))} if failures else {})

    def learn(self, rollouts: Rollouts) -> dict[str, float]:
        """The updates of a step; the sampler gets the new weights. Raises TrainingError."""
        settings = self.job.settings
        rate = learning_rate(
            self.step, settings.learning_rate, settings.max_steps, settings.warmup_steps, settings.min_lr_ratio
        )
        try:
            learned = self.learner.learn(rollouts, rate)
        except FloatingPointError as error:
            raise TrainingError(
                f"the gradient of step {self.step + 1} is not finite ({error}): lower learning_rate, or use precision "
                f"fp32; {self.what_is_kept()}"
            ) from error
        for k, expert in self.learner.experts.items():
            self.job.sampler.load_expert(k, expert)
        return learned | {"learning_rate": rate}

    def what_is_kept(self) -> str:
        return "nothing was saved yet" if self.saved < 0 else f"the last state, of step {self.saved}, is kept"

    def evaluate(self) -> None:
        """The mean reward on the held-out prompts, always with the same noise, so that changes are the policy's."""
        job, settings, world = self.job, self.job.settings, self.job.world
        if not job.held_out:
            return
        own = range(world.rank, len(job.held_out), world.size)  # none, if there are more processes than prompts
        rewards = torch.empty(0, dtype=torch.float64)
        if own:
            seeds = [s for p in own for s in rollout_seeds(settings.eval_generations, _EVALUATION, 0, p)]
            rewards = self.roll_out([job.held_out[p] for p in own], seeds).rewards
        everyone = world.collect(rewards.view(-1, settings.eval_generations), len(job.held_out))
        known = everyone[everyone.isfinite()]
        if len(known):
            self.log({"step": self.step, "eval_reward": float(known.mean()), "eval_sounds": len(known)})

    def open_logs(self) -> None:
        """Begin to write; without a state from the beginning, the evaluation of step 0 too."""
        settings = self.job.settings
        self.logs = Logs(self.folder, self.saved, settings.tensorboard, settings.wandb, self.job.agreed)

    def log(self, record: dict[str, Any]) -> None:
        """Write a record; all processes must call."""
        self.job.world.first_does(lambda: self.logs.write(record))

    def save(self) -> None:
        """Write a state, unless this step's is there already."""
        if self.saved == self.step:
            return
        model = {
            f"{k}.{name}": value.detach().cpu()
            for k, expert in self.learner.experts.items()
            for name, value in expert.state_dict().items()
        }
        values = {
            "step": self.step,
            "total_steps": self.job.settings.max_steps,
            "settings": self.job.agreed,
            "failures": self.failures,
            "evaluation_due": self.evaluation_due,
            "torch": torch.__version__,
        }
        optimizer = optimizer_tensors(self.learner.optimizer, self.learner.parameters)
        self.job.world.first_does(lambda: write_state(self.folder, values, model, optimizer, self.job.settings.keep))
        self.saved = self.step

    def load(self) -> None:
        """Take over the latest state."""
        path, world = latest_state(self.folder), self.job.world
        found = -1 if path is None else int(read_values(path)["step"])
        if world.largest(found) != -world.largest(-found):
            raise CheckpointError(
                f"the processes find different states in {self.folder}; it must be one folder for all"
            )
        if path is None:
            return
        state = read_state(path)
        for k, expert in self.learner.experts.items():
            expert.load_state_dict({name: state.model[f"{k}.{name}"].to(world.device) for name in expert.state_dict()})
            self.job.sampler.load_expert(k, expert)
        load_optimizer(self.learner.optimizer, self.learner.parameters, state.optimizer)
        self.step = self.saved = int(state.values["step"])
        self.failures = int(state.values["failures"])
        self.evaluation_due = bool(state.values["evaluation_due"])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
