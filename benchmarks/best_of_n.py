"""Does pruning by a critic choose better sounds than best-of-N, sampling at most as many frames?

    python benchmarks/best_of_n.py --critic out/critic --tokens out/tokens

For each held-out prompt and seed, by the same reward throughout:

- single: one sound.
- best of M: M sounds, the best of them by the reward.
- pruned: N prefixes, of which the critic keeps K; the best of the finished K by the reward.
- random: the same plan, where the critic's scores are random numbers.

A plan N:t:K begins N sounds, scores them after t frames and finishes K; it samples N t + K (T - t) frames of each
prompt, and must not sample more than best-of-M's M T. Arms share seeds: prefix j of a plan is the beginning of sound j
of best-of-M. Means are over the prompts, each the mean over its seeds; intervals are of a bootstrap over prompts.

What the table shows is the reward that chose the sounds: that it rises is no proof that they sound better. Seconds are
of sampling, scoring by the critic, decoding and rewards, one arm after the other, on whatever else the machine does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import json_file
import machine
import numpy as np
import numpy.typing as npt
import torch
import typer
from tqdm import tqdm

import siren
from siren.align.prompts import Prompt, PromptSet, pad
from siren.align.rewards import RewardMix, load_reward
from siren.audio import write_files
from siren.critic import Critic
from siren.critic_training import check_tokens
from siren.data.tokens import open_tokens, split
from siren.errors import InputError
from siren.generate import MAX_BATCH, find_codec
from siren.manifest import read_manifest
from siren.prune import Pruning, Scorer
from siren.train.batches import random_words

Array = npt.NDArray[np.float64]
_PROMPT_SEEDS, _RANDOM, _BOOTSTRAP = range(300, 303)  # what a stream of random words is for
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Plan:
    """`prefixes` prefixes of `frames` frames, of which `keep` are finished."""

    prefixes: int
    frames: int
    keep: int

    def __str__(self) -> str:
        return f"{self.prefixes}:{self.frames}:{self.keep}"


class RandomScores:
    """The control: scores of a stream of random words."""

    def __init__(self, seed: int) -> None:
        self.seed, self.calls = seed, 0

    def score(self, codes: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        words = random_words(len(codes), self.seed, _RANDOM, self.calls)
        return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)

    def check(self, codec: siren.Codec, prompt_dim: int) -> None:
        """It scores anything."""


class Bench:
    """Sounds of `frames` frames of held-out prompts and their rewards."""

    def __init__(
        self,
        sampler: siren.Sampler,
        codec: siren.Codec,
        reward: RewardMix,
        prompts: Sequence[Prompt],
        frames: int,
        options: dict[str, Any],
    ) -> None:
        self.sampler, self.codec, self.reward, self.prompts = sampler, codec, reward, prompts
        self.frames, self.options = frames, options
        self.rate = codec.sample_rate / codec.hop_length

    def rewards(self, count: int, seed: int, pruning: Pruning | None = None) -> Array:
        """Rewards [prompts, sounds]: of `count` sounds of each prompt, or of those that the pruning keeps.

        Sound j of prompt i has the same seed whatever the count. NaN where there is no reward.
        """
        at_once = max(1, MAX_BATCH // count)
        rows = []
        for first in range(0, len(self.prompts), at_once):
            some = self.prompts[first : first + at_once]
            prompt, mask = pad(some, count)
            seeds = [
                int(word)
                for i in range(first, first + len(some))
                for word in random_words(count, _PROMPT_SEEDS, seed, i)
            ]
            session = self.sampler.start(prompt, mask, seeds, **self.options)
            kept = list(range(len(seeds)))
            if pruning is None:
                session.step(self.frames)
            else:
                kept = pruning.sample(session, prompt, mask, self.frames, self.rate)
            with torch.inference_mode():
                waves = self.codec.decode(session.codes)
            found = self.reward(
                [some[place // count].text for place in kept],
                [wave.numpy() for wave in waves[:, 0]],
                sample_rate=self.codec.sample_rate,
                codes=session.codes.numpy(),
            )
            rows.append(found.total.reshape(len(some), -1))
        return np.concatenate(rows)


def run(
    critic: Annotated[Path, typer.Option(help="Critic folder, of `siren train-critic`.")] = Path("out/critic"),
    tokens: Annotated[Path, typer.Option(help="Token set whose held-out captions are the prompts.")] = Path(
        "out/tokens"
    ),
    model: Annotated[str, typer.Option(help="Name or checkpoint folder.")] = "siren-mini",
    reward: Annotated[str, typer.Option(help="As in siren align.")] = "aligner",
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts, or all there are.")] = 113,
    val_fraction: Annotated[float, typer.Option(min=0, max=0.9, help="That of the critic's training.")] = 0.05,
    best_of: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="M, sounds of best-of-M.")] = 4,
    plans: Annotated[str, typer.Option(help="N:t:K, with commas between; t in frames.")] = "10:25:2,7:33:2,6:50:2",
    seconds: Annotated[float | None, typer.Option(help="By default, as the next four, what the critic knows.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 3,
    first_seed: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
    backend: str = "auto",
    weights: str = "bf16",
    threads: Annotated[int, typer.Option(help="Of the cpu backend; 0: all cores.")] = 0,
    out: Path = Path("out/best_of_n.json"),
    markdown: Annotated[Path | None, typer.Option(help="Also write the table here.")] = None,
) -> None:
    """One sound, best of M, and prefix pruning at equal sampled frames."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    manifest = read_manifest(model)
    codec = find_codec(manifest)
    token_set = open_tokens(tokens)
    scorer = Critic.from_pretrained(critic, codec)
    scorer.check(codec, manifest.config.prompt_dim)
    asked = {"seconds": seconds, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    asked |= {"guidance_scale": guidance_scale}
    options = {name: scorer.sampling[name] if value is None else value for name, value in asked.items()}
    given |= options
    frames = check_tokens(manifest, token_set, codec, options.pop("seconds"))
    chosen = read_plans(plans, frames, best_of)
    training, validation = split(token_set, val_fraction)
    held_out = PromptSet(token_set, validation, without=PromptSet(token_set, training)).some(prompts)
    if len(held_out) < 2:
        raise InputError(
            f"{len(held_out)} held-out prompts: train the critic with a larger --val-fraction, and pass the same here"
        )
    mix = RewardMix([load_reward(reward)])
    sampler = siren.Sampler(manifest, backend, weights, threads or None)
    bench = Bench(sampler, codec, mix, held_out, frames, options)

    value = {
        "about": {**machine.describe(), "options": given, "reward": mix.identities, "sampler": sampler.describe()},
        "prompts": len(held_out),
        **measure(bench, scorer, chosen, best_of, range(first_seed, first_seed + seeds)),
        "failures": mix.describe_failures(),
    }
    text = report(value)
    json_file.write(out, value)
    print(text)
    if markdown is not None:
        write_files({markdown: text.encode()})


def read_plans(text: str, frames: int, best_of: int) -> list[Plan]:
    """The plans of "N:t:K,...". Raises InputError for one that cannot be, or samples more than best-of-`best_of`."""
    found = []
    for part in text.split(","):
        try:
            prefixes, prefix, keep = (int(number) for number in part.split(":"))
        except ValueError as error:
            raise InputError(f"--plans must be N:t:K with commas between, such as 10:25:2, not {part!r}") from error
        if not 1 <= keep <= prefixes <= MAX_BATCH or not 1 <= prefix <= frames:
            raise InputError(f"the plan {part} needs 1 <= K <= N <= {MAX_BATCH} and 1 <= t <= {frames}")
        plan = Plan(prefixes, prefix, keep)
        if sampled(plan, frames) > best_of * frames:
            raise InputError(
                f"the plan {part} samples {sampled(plan, frames)} frames, best-of-{best_of} {best_of * frames}"
            )
        found.append(plan)
    if len(set(found)) < len(found):
        raise InputError(f"--plans {text} names a plan twice")
    return found


def sampled(plan: Plan, frames: int) -> int:
    """Frames that a plan samples of a prompt."""
    return plan.prefixes * plan.frames + plan.keep * (frames - plan.frames)


def measure(bench: Bench, critic: Scorer, plans: Sequence[Plan], best_of: int, seeds: Sequence[int]) -> dict[str, Any]:
    """The arms' rows: means, intervals, paired differences of each pruned arm, frames and seconds."""
    arms: dict[str, tuple[Plan | None, str]] = {"single": (None, ""), f"best of {best_of}": (None, "")}
    arms |= {f"{kind} {plan}": (plan, kind) for plan in plans for kind in ("pruned", "random")}
    best: dict[str, list[Array]] = {name: [] for name in arms}
    seconds = dict.fromkeys(arms, 0.0)
    with tqdm(total=len(arms) * len(seeds), unit="arm", disable=not sys.stderr.isatty()) as bar:
        for seed in seeds:
            for name, (plan, kind) in arms.items():
                began = time.perf_counter()
                if plan is None:
                    rewards = bench.rewards(1 if name == "single" else best_of, seed)
                else:
                    scorer = critic if kind == "pruned" else RandomScores(seed)
                    length = plan.frames / bench.rate
                    rewards = bench.rewards(plan.prefixes, seed, Pruning(scorer, plan.prefixes, length, plan.keep))
                seconds[name] += time.perf_counter() - began
                best[name].append(highest(rewards))
                bar.update()
    chosen = {name: mean_of_known(np.stack(rows)) for name, rows in best.items()}
    rows = []
    for name, (plan, kind) in arms.items():
        count = 1 if name == "single" else best_of
        row: dict[str, Any] = {
            "arm": name,
            "frames": count * bench.frames if plan is None else sampled(plan, bench.frames),
            "seconds": seconds[name],
            "reward": interval(chosen[name]),
        }
        if kind == "pruned":
            row["over_best_of"] = interval(chosen[name] - chosen[f"best of {best_of}"])
            row["over_random"] = interval(chosen[name] - chosen[f"random {plan}"])
        rows.append(row)
    return {"frames": bench.frames, "rows": rows, "by_prompt": {name: list(row) for name, row in chosen.items()}}


def highest(rewards: Array) -> Array:
    """The highest reward of each row, NaN where there is none."""
    best = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1)
    return np.where(np.isinf(best), np.nan, best)


def mean_of_known(values: Array) -> Array:
    """Means of the columns of [seeds, prompts] without NaN; NaN where a column holds nothing else."""
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    return np.where(counts, np.where(known, values, 0).sum(axis=0) / np.maximum(counts, 1), np.nan)


def interval(values: Array) -> tuple[float, float, float]:
    """Mean of the values that are not NaN, and the 95% interval of a bootstrap over them."""
    known = values[~np.isnan(values)]
    if not len(known):
        raise InputError("no prompt has a reward in every arm")
    words = random_words(_RESAMPLES * len(known), _BOOTSTRAP).reshape(_RESAMPLES, -1)
    means = known[(words % np.uint64(len(known))).astype(np.int64)].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(known.mean()), float(low), float(high)


def report(value: dict[str, Any]) -> str:
    """The table."""
    options = value["about"]["options"]
    about = (
        f"{options['model']}, {value['prompts']} held-out prompts, {options['seeds']} seeds from "
        f"{options['first_seed']}, sounds of {value['frames']} frames, temperature {options['temperature']:g}, top-k "
        f"{options['top_k']}, top-p {options['top_p']:g}, guidance {options['guidance_scale']:g}. Reward "
        f"{options['reward']}, which also chooses. Plans are N:t:K. 95% intervals over prompts. "
        f"{value['about']['date'][:10]}, commit {value['about']['commit']}."
    )
    lines = [
        about,
        "",
        "| Arm | Frames a prompt | Reward of the chosen | Over best-of-M | Over random | Seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in value["rows"]:
        over = [shown(row[key], "+") if key in row else "" for key in ("over_best_of", "over_random")]
        lines.append(
            f"| {row['arm']} | {row['frames']} | {shown(row['reward'])} | {' | '.join(over)} | {row['seconds']:.0f} |"
        )
    if value["failures"]:
        lines += ["", f"Failed rewards: {value['failures']}."]
    return "\n".join(lines) + "\n"


def shown(found: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = (f"{number:{sign}.3f}" for number in found)
    return f"{mean} ({low} to {high})"


if __name__ == "__main__":
    machine.main(run)
