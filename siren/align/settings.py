"""Every switch of an alignment run in one flat dataclass, named as TRL names them where it has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..train.settings import CHECKPOINT_DTYPES, PRECISIONS

LOSSES = ("grpo", "dpo")
REWARD_WEIGHTS = 1e-9  # the least sum of absolute weights

# What may change between a stop and a resume: it moves work around. Another device or backend rounds differently.
_FREE = {
    *("model", "data", "out", "reward_funcs", "max_steps", "eval_every", "save_every", "keep", "resume", "device"),
    *("rollout_batch_size", "checkpoint_activations", "backend", "threads", "tensorboard", "wandb", "progress"),
    *("checkpoint_dtype", "reward_timeout"),
}


@dataclass(frozen=True)
class AlignSettings:
    """What to align, on which prompts, by which rewards and how.

    What:
    model: a checkpoint folder, or "siren-mini". data: a token set whose captions are the prompts; its reserve, if it
    has one and `reserve` is true. out: the run's folder.
    experts: indices from 0 of the experts that learn: (0,) is the paper's anti-causal direction, (0, 1) its table 7,
    (5,) the causal one. The others stay as they are.
    reward_funcs: names or paths for `load_reward`, or callables `f(prompts, completions, **kwargs) -> list[float]`.
    reward_weights: one each, 1 by default. reward_timeout: seconds a reward function may take for a batch, 0: any.
    max_failures: updates in a row without a single reward, after which the run stops with an error.

    A step (algorithm 3): `prompts_per_step` prompts, `num_generations` rollouts of each (G), `seconds` long, drawn at
    `temperature` with `guidance_scale`; then `num_iterations` updates (mu) on them.
    loss: "grpo" (eq. 9 to 11) or "dpo", on the best and the worst of each group, with `dpo_beta`.
    epsilon, epsilon_high: the bounds of eq. 11. advantage_threshold: gamma. beta: weight of the KL divergence from the
    model that the run began with; 0 does without that model.
    learning_rate, betas, weight_decay, warmup_steps, min_lr_ratio, grad_clip, precision: as in training.
    batch_size: rollouts whose gradients are computed at once.
    rollout_weights: fp32, bf16 or int8, of the sampler. Where it or `precision` is not fp32, the old policy's
    log-probabilities are computed again by the training forward: they would differ from the sampler's by rounding.
    seed: of prompts and rollouts.

    How long: max_steps steps. eval_every: steps between evaluations on `eval_prompts` held-out prompts (those of the
    val_fraction of the data), `eval_generations` sounds each, always with the same noise; 0: only at both ends.
    """

    model: str | Path
    data: str | Path
    out: str | Path
    reward_funcs: Sequence[str | Callable[..., Any]] = ("aligner",)
    reward_weights: Sequence[float] | None = None
    reward_timeout: float = 0.0
    max_failures: int = 10
    experts: Sequence[int] = (0,)
    reserve: bool = False
    val_fraction: float = 0.05
    prompts_per_step: int = 8
    num_generations: int = 8
    seconds: float = 4.0
    temperature: float = 1.0
    guidance_scale: float = 1.0
    num_iterations: int = 1
    loss: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    advantage_threshold: float = 0.0
    beta: float = 0.0
    dpo_beta: float = 0.1
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    min_lr_ratio: float = 1.0
    grad_clip: float = 1.0
    precision: str = "fp32"
    batch_size: int = 16
    rollout_weights: str = "fp32"
    rollout_batch_size: int = 64
    seed: int = 0
    max_steps: int = 100
    eval_every: int = 25
    eval_prompts: int = 64
    eval_generations: int = 1
    save_every: int = 25
    keep: int = 2
    resume: bool = True
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    checkpoint_activations: bool = False
    tensorboard: bool | None = None
    wandb: bool = False
    progress: bool = True
    checkpoint_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low in (
            *(("max_failures", 1), ("prompts_per_step", 1), ("num_generations", 2), ("num_iterations", 1)),
            *(("warmup_steps", 0), ("batch_size", 1), ("rollout_batch_size", 1), ("seed", 0), ("max_steps", 1)),
            *(("eval_every", 0), ("eval_prompts", 0), ("eval_generations", 1), ("save_every", 0), ("keep", 1)),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 32:
                raise InputError(f"{name} must be a whole number from {low}, not {value!r}")
        for name, least, most in (
            *(("reward_timeout", 0.0, 1e9), ("val_fraction", 0.0, 0.9), ("seconds", 0.02, 3600.0)),
            *(("temperature", 1e-3, 1e3), ("guidance_scale", -100.0, 100.0), ("epsilon", 0.0, 1.0)),
            *(("epsilon_high", 0.0, 1e3), ("advantage_threshold", 0.0, 1e3), ("beta", 0.0, 1e3)),
            *(("dpo_beta", 1e-6, 1e3), ("learning_rate", 1e-12, 10.0), ("weight_decay", 0.0, 10.0)),
            *(("min_lr_ratio", 0.0, 1.0), ("grad_clip", 0.0, 1e9)),
        ):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number <= most:
                raise InputError(f"{name} must be a number from {least:g} to {most:g}, not {number!r}")
        for name, names in (
            ("loss", LOSSES),
            ("precision", PRECISIONS),
            ("rollout_weights", ("fp32", "bf16", "int8")),
            ("checkpoint_dtype", tuple(CHECKPOINT_DTYPES)),
        ):
            if getattr(self, name) not in names:
                raise InputError(f"{name} must be one of {', '.join(names)}, not {getattr(self, name)!r}")
        for name in ("reward_funcs", "reward_weights", "experts", "betas"):
            value = getattr(self, name)
            if isinstance(value, str) or not (
                isinstance(value, Sequence) or (name == "reward_weights" and value is None)
            ):
                raise InputError(f"{name} must be a list, not {value!r}")
        if not self.reward_funcs or not all(isinstance(f, str) or callable(f) for f in self.reward_funcs):
            raise InputError("reward_funcs must be a list of at least one reward, names or functions")
        if len(self.betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in self.betas):
            raise InputError(f"betas must be two numbers from 0 to below 1, not {self.betas!r}")
        weights = self.reward_weights
        if weights is not None and (
            len(weights) != len(self.reward_funcs)
            or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights)
            or sum(map(abs, weights)) < REWARD_WEIGHTS
        ):
            raise InputError(f"reward_weights must be {len(self.reward_funcs)} finite numbers, not all 0: {weights!r}")

    def chosen_experts(self, count: int) -> list[int]:
        """The experts that learn, in order. Raises InputError."""
        chosen = list(self.experts)
        if not chosen or not all(type(k) is int and 0 <= k < count for k in chosen) or len(set(chosen)) < len(chosen):
            raise InputError(f"experts must be indices from 0 to {count - 1}, each once, not {chosen!r}")
        return sorted(chosen)

    def of_the_result(self) -> dict[str, Any]:
        """The settings that what is learned depends on, as JSON values. Rewards are named by their functions."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _FREE}
        return values | {
            "experts": list(self.experts),
            "betas": list(self.betas),
            "reward_weights": None if self.reward_weights is None else list(self.reward_weights),
        }
