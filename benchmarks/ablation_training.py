"""How the arms of the ablations are trained: supervised by `siren train`, then some aligned by `siren align`.

Everything is resumable: what a call finished is not done again, and what it began goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ablation_arms import ARMS, config_of

from siren.align import align
from siren.align.settings import AlignSettings
from siren.codec import Codec
from siren.config import SirenConfig
from siren.data.delay import delay_tokens
from siren.data.tokens import open_tokens
from siren.expert import Expert
from siren.studies.task_vectors import make_initial
from siren.train import TrainSettings, train
from siren.train.logs import METRICS


@dataclass(frozen=True)
class Scale:
    """What every arm shares: data, lengths and rates. Two folders of runs with different scales cannot be mixed."""

    tokens: Path
    codec: Path
    out: Path
    seed: int
    updates: int
    batch_size: int
    learning_rate: float
    val_fraction: float
    align_steps: int
    align_rate: float
    seconds: float
    temperature: float
    guidance_scale: float


def folder_of(scale: Scale, arm: str) -> Path:
    """Where an arm's run, sounds and scores are."""
    return scale.out / f"{arm}-seed{scale.seed}"


def checkpoint_of(scale: Scale, arm: str) -> Path:
    return folder_of(scale, arm) / "run" / "checkpoint"


def delayed_tokens(scale: Scale) -> Path:
    """The token set in the delay pattern, made once."""
    target = scale.out / "delayed-tokens"
    if not target.exists():
        delay_tokens(scale.tokens, target)
    return target


def arm_config(scale: Scale, arm: str) -> SirenConfig:
    """The configuration of an arm for the codec and the prompts of the token set."""
    tokens, embedding = open_tokens(scale.tokens), Codec.from_pretrained(scale.codec).decode_embeddings()[0]
    width, code_dim = embedding.weight.shape
    sizes = {"num_codebooks": tokens.num_codebooks, "codebook_size": tokens.codebook_size}
    return config_of(
        ARMS[arm], sizes | {"prompt_dim": tokens.prompt_dim, "dac_code_dim": code_dim, "dac_feature_dim": width}
    )


def common_start(scale: Scale, arm: str) -> Path:
    """A checkpoint whose experts all hold the same random weights, made once."""
    folder, config = folder_of(scale, arm) / "start", arm_config(scale, arm)
    if not folder.exists():
        make_initial(folder, config, scale.codec, scale.seed, "minilm")
    return folder


def train_expert(scale: Scale, arm: str, index: int) -> None:
    """Train one expert of an arm; the last of an arm makes its checkpoint."""
    if checkpoint_of(scale, arm).exists():
        return
    train(
        TrainSettings(
            delayed_tokens(scale) if ARMS[arm].delayed else scale.tokens,
            folder_of(scale, arm) / "run",
            init_from=common_start(scale, arm),
            experts=(index,),
            max_steps=scale.updates,
            batch_size=scale.batch_size,
            learning_rate=scale.learning_rate,
            min_lr_ratio=0.05,
            warmup_steps=min(100, scale.updates // 8),
            crop_seconds=0,
            prompt_dropout=0.1,
            val_fraction=scale.val_fraction,
            val_every=0,
            save_every=max(1, scale.updates // 5),
            keep=5,
            seed=scale.seed,
            device="cpu",
            tensorboard=False,
            progress=False,
        )
    )


def align_arm(scale: Scale, arm: str) -> None:
    """Align an arm's experts, beginning with its base, unless it is through."""
    base = ARMS[arm].base
    if base is None or checkpoint_of(scale, arm).exists():
        return
    sampling: dict[str, Any] = {"temperature": scale.temperature, "guidance_scale": scale.guidance_scale}
    align(
        AlignSettings(
            str(checkpoint_of(scale, base)),
            scale.tokens,
            folder_of(scale, arm) / "run",
            experts=ARMS[arm].aligned,
            val_fraction=scale.val_fraction,
            seed=scale.seed,
            max_steps=scale.align_steps,
            num_iterations=2,
            learning_rate=scale.align_rate,
            warmup_steps=2,
            min_lr_ratio=0.1,
            seconds=scale.seconds,
            eval_every=0,
            eval_prompts=16,
            save_every=10,
            keep=1,
            device="cpu",
            threads=1,
            tensorboard=False,
            progress=False,
            **sampling,
        )
    )


def parameters_of(scale: Scale, arm: str) -> int:
    """Trainable parameters of all experts."""
    config = arm_config(scale, arm)
    with torch.device("meta"):
        expert = Expert(config, 0)
    return config.num_experts * sum(p.numel() for p in expert.parameters() if p.requires_grad)


def training_seconds(scale: Scale, arm: str) -> float:
    """Time that an arm's updates took in one thread each, by its metrics; alignment without what it began with."""
    run = folder_of(scale, arm) / "run"
    if ARMS[arm].base is not None:
        names = ("rollout_seconds", "codec_seconds", "reward_seconds", "update_seconds")
        lines = (json.loads(line) for line in (run / METRICS).read_text().splitlines())
        return sum(line.get(name, 0.0) for line in lines for name in names)
    lines = (json.loads(line) for path in run.glob(f"expert_*/{METRICS}") for line in path.read_text().splitlines())
    return sum(line["frames"] / line["frames_per_second"] for line in lines if "frames_per_second" in line)
