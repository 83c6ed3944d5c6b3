"""Training a critic on rollouts of the model that it will prune, by lambda-returns (generalised advantages).

    target_T = R;  target_t = (1 - lambda) v_{t+1} + lambda target_{t+1} = v_t + GAE_t

R is the reward at the end, nothing is discounted, and v, the critic's own values, are constants in a target. Pruning
needs values that tell the sounds of one prompt apart: that is measured on held-out prompts. Nothing is saved on the
way. Left out: GPUs for the critic, which is small; the sampler may use one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .align.prompts import Prompt, PromptSet, pad, rollout_seeds
from .align.rewards import RewardBatch, RewardFunction, RewardMix, load_reward
from .align.rollout import roll_out
from .codec import Codec
from .critic import Critic, CriticConfig, CriticModel
from .data.tokens import check_codec, check_encoder, open_tokens, split
from .errors import CheckpointError, InputError, SirenError
from .generate import MAX_BATCH, check_whole, fill_in, find_codec, find_encoder
from .jsonl import check_folder
from .manifest import MINI, Manifest, read_manifest
from .sampler import Sampler
from .sampling import SamplingSettings
from .train.batches import random_words
from .train.optimizer import make_optimizer
from .train.schedule import learning_rate as scheduled

QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of a sound, where values are compared with rewards
_TRAINING, _VALIDATION = range(2)  # what rollouts are for
_ORDER = 200  # a stream of random words; those of training and alignment are below
_AT_ONCE = 4 * MAX_BATCH  # rollouts between which an interruption is not waited for
_WEIGHT_DECAY = 0.01
_MAX_NORM = 1.0


@dataclass(frozen=True)
class Episodes:
    """N sounds with a reward: codes int64 [N, C, T], rewards float32 [N], and group int64 [N], their prompt's row of
    prompt [G, P, prompt_dim] and prompt_mask [G, P]. left_out: how many got no reward."""

    codes: Tensor
    rewards: Tensor
    group: Tensor
    prompt: Tensor
    prompt_mask: Tensor
    left_out: int

    def __len__(self) -> int:
        return len(self.rewards)


@dataclass(frozen=True)
class Foresight:
    """Correlation of values with rewards on `sounds` sounds of `prompts` held-out prompts, at QUARTERS of a sound.

    within: of the deviations from the prompt's own means; overall: of all sounds. NaN where nothing varies.
    """

    prompts: int
    sounds: int
    within: tuple[float, ...]
    overall: tuple[float, ...]

    def __str__(self) -> str:
        within, overall = (" ".join(f"{value:.3f}" for value in row) for row in (self.within, self.overall))
        return (
            f"{self.sounds} sounds of {self.prompts} held-out prompts, value and reward at 1/4, 1/2, 3/4 and the end: "
            f"correlation within prompts {within}; over all {overall}"
        )


def train_critic(
    data: str | Path,
    out: str | Path,
    model: str | Path = MINI,
    reward: str | RewardFunction = "aligner",
    rollouts: int = 2000,
    generations: int = 8,
    val_prompts: int = 32,
    val_fraction: float = 0.05,
    seconds: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
    steps: int = 600,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    gae_lambda: float = 0.95,
    dim: int = 128,
    layers: int = 1,
    seed: int = 0,
    backend: str = "auto",
    weights: str = "bf16",
    threads: int | None = None,
    progress: bool = True,
) -> tuple[Critic, Foresight | None, str]:
    """Roll out a model on the captions of a token set, train a critic on it, and write it to the folder `out`.

    data: a token set with captions, made with the model's codec and prompt encoder. reward: a name for `load_reward`,
    or a reward function. rollouts: to train on, `generations` of each of as many training captions as that takes; and
    as many of each of `val_prompts` held-out captions (those of val_fraction of the clips). What the critic learns is
    about sounds of these `seconds` at these sampling settings; where one is None it is the model's own.

    The same arguments give the same critic, on a CPU with as many threads bit for bit. Returns the critic, its
    foresight on held-out prompts (None without any), and what is to be said of failed rewards, empty if nothing.
    Raises before anything is sampled InputError, DataError, and CheckpointError if `out` holds something already;
    SirenError if no rollouts are left to train on. Nothing is written before the end.
    """
    _check_arguments(locals())
    out = Path(out).expanduser()
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} exists; choose another folder for the critic")
    manifest = read_manifest(model)
    given = {"seconds": seconds, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = fill_in(manifest, given | {"guidance_scale": guidance_scale})
    seconds = options.pop("seconds")
    SamplingSettings(**options)
    tokens = open_tokens(data)
    codec = find_codec(manifest)
    frames = check_tokens(manifest, tokens, codec, seconds)
    training, validation = split(tokens, val_fraction)
    prompts = PromptSet(tokens, training)
    held_out = PromptSet(tokens, validation, without=prompts).some(val_prompts)
    mix = RewardMix([load_reward(reward) if isinstance(reward, str) else reward])
    sampler = Sampler(manifest, backend, weights, threads)

    count = -(-rollouts // generations)
    asked = prompts.of_step(0, count, seed)
    with tqdm(
        total=(count + len(held_out)) * generations,
        unit="sound",
        desc="roll out",
        disable=not progress or not sys.stderr.isatty(),
    ) as bar:

        def scored(*arguments: Any, **more: Any) -> RewardBatch:
            found = mix(*arguments, **more)
            bar.update(len(found.total))
            return found

        def collect(chosen: Sequence[Prompt], kind: int) -> Episodes:
            seeds = [word for i in range(len(chosen)) for word in rollout_seeds(generations, seed, kind, i)]
            return roll_out_all(sampler, codec, scored, chosen, seeds, frames, options)

        learned = collect(asked, _TRAINING)
        kept_out = collect(held_out, _VALIDATION) if held_out else None
    failures = mix.describe_failures()
    if len(learned) < 2:
        raise SirenError(f"{len(learned)} of {count * generations} rollouts have a reward: {failures}")
    network = start(CriticConfig(tokens.prompt_dim, dim, layers), codec, learned, seed)
    fit(network, learned, steps, batch_size, learning_rate, gae_lambda, seed, progress)
    critic = Critic(network, codec, {"seconds": seconds} | options)
    foresight = None if kept_out is None or not len(kept_out) else foresee(critic, kept_out)
    critic.save_pretrained(out)
    lost = learned.left_out + (0 if kept_out is None else kept_out.left_out)
    return critic, foresight, f"{lost} rollouts without a reward were left out ({failures})" if lost else ""


def check_tokens(manifest: Manifest, tokens: Any, codec: Codec, seconds: float) -> int:
    """The frames of a sound, once the token set and the length fit the model; else InputError or DataError."""
    check_codec(tokens, codec)
    if manifest.prompt_encoder is not None:
        check_encoder(tokens, find_encoder(manifest))
    elif tokens.prompt_dim != manifest.config.prompt_dim:
        raise InputError(
            f"{tokens.path} has prompts of {tokens.prompt_dim} values, the model takes {manifest.config.prompt_dim}"
        )
    rate, longest = codec.sample_rate / codec.hop_length, manifest.config.max_seq_len
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 1 <= seconds * rate <= longest:
        raise InputError(f"seconds must be a number from {1 / rate:g} to {longest / rate:g}, not {seconds!r}")
    return round(seconds * rate)


def roll_out_all(
    sampler: Sampler,
    codec: Codec,
    reward: Any,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    frames: int,
    options: Mapping[str, Any],
) -> Episodes:
    """Sample and score len(seeds) / len(prompts) sounds of each prompt; those without a reward are left out."""
    generations = len(seeds) // len(prompts)
    at_once = max(1, _AT_ONCE // generations)
    codes, rewards = [], []
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        their = seeds[first * generations : (first + at_once) * generations]
        made = roll_out(sampler, codec, reward, some, their, frames, MAX_BATCH, **options)
        codes.append(made.codes)
        rewards.append(made.rewards)
    total = torch.cat(rewards)
    kept = total.isfinite()
    group = torch.arange(len(prompts)).repeat_interleave(generations)
    return Episodes(
        torch.cat(codes)[kept], total[kept].float(), group[kept], *pad(prompts, 1), left_out=int((~kept).sum())
    )


def start(config: CriticConfig, codec: Codec, episodes: Episodes, seed: int) -> CriticModel:
    """A new model with the means and spreads of these sounds."""
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(seed)
        model = CriticModel(config, codec)
    model.standardise(episodes.codes, episodes.rewards)
    return model


def lambda_returns(values: Tensor, rewards: Tensor, gae_lambda: float) -> Tensor:
    """The targets above, [N, T], of values [N, T] and rewards [N]."""
    targets = torch.empty_like(values)
    targets[:, -1] = rewards
    for t in range(values.shape[1] - 2, -1, -1):
        targets[:, t] = (1 - gae_lambda) * values[:, t + 1] + gae_lambda * targets[:, t + 1]
    return targets


def fit(
    model: CriticModel,
    episodes: Episodes,
    steps: int,
    batch_size: int,
    learning_rate: float,
    gae_lambda: float,
    seed: int,
    progress: bool = True,
) -> list[float]:
    """Train a model in place; the loss of each update, the mean squared error in the rewards' standard deviations."""
    batch_size = min(batch_size, len(episodes))
    each = len(episodes) // batch_size  # updates of an epoch; what is left over waits for the next order
    optimizer = make_optimizer(
        dict(model.named_parameters()), learning_rate, (0.9, 0.98), _WEIGHT_DECAY, torch.device("cpu")
    )
    losses: list[float] = []
    model.train()
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=steps, desc="train critic", disable=not progress or not sys.stderr.isatty()) as bar,
    ):
        torch.manual_seed(seed)  # dropout draws from the global generator
        for step in range(steps):
            epoch, place = divmod(step, each)
            order = np.argsort(random_words(len(episodes), seed, _ORDER, epoch), kind="stable")
            rows = torch.from_numpy(order[place * batch_size : (place + 1) * batch_size])
            group = episodes.group[rows]
            values = model(episodes.codes[rows], episodes.prompt[group], episodes.prompt_mask[group])
            targets = lambda_returns(values.detach(), episodes.rewards[rows], gae_lambda)
            loss = ((values - targets) / model.reward_spread).square().mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
            if not bool(torch.isfinite(norm)):
                raise SirenError(f"the gradient of update {step + 1} is not finite; lower learning_rate")
            for part in optimizer.param_groups:
                part["lr"] = scheduled(step, learning_rate, steps, min(50, steps // 10), floor=0.05)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval()
    return losses


def foresee(critic: Critic, episodes: Episodes) -> Foresight:
    """How well the critic's values foretell the rewards of these sounds."""
    prompt, mask = episodes.prompt[episodes.group], episodes.prompt_mask[episodes.group]
    values = critic.values(episodes.codes, prompt, mask).double()
    places = [max(1, round(share * values.shape[1])) - 1 for share in QUARTERS]
    columns = values[:, places]
    rewards = episodes.rewards.double()
    groups, group = episodes.group.unique(return_inverse=True)

    def deviations(numbers: Tensor) -> Tensor:
        sums = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, group, numbers)
        return numbers - (sums / group.bincount())[group]

    within = tuple(_correlation(deviations(column), deviations(rewards)) for column in columns.T)
    overall = tuple(_correlation(column - column.mean(), rewards - rewards.mean()) for column in columns.T)
    return Foresight(len(groups), len(rewards), within, overall)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Of numbers around 0."""
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else float("nan")


def _check_arguments(values: Mapping[str, Any]) -> None:
    for name, high in (
        *(("rollouts", 1_000_000), ("generations", 1024), ("steps", 1_000_000), ("batch_size", 4096)),
        *(("dim", 1024), ("layers", 8)),
    ):
        check_whole(name, values[name], high)
    for name, low, high in (("val_prompts", 0, 100_000), ("seed", 0, (1 << 32) - 1)):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    for name, least, most in (("learning_rate", 1e-12, 1.0), ("gae_lambda", 0.0, 1.0), ("val_fraction", 0.0, 0.9)):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise InputError(f"{name} must be a number from {least:g} to {most:g}, not {value!r}")
