"""The alignment that kill_resume.py --align kills: a tiny model with random weights, prompts, and a cheap reward."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import siren
from siren.align.settings import AlignSettings
from siren.data.clip_tokenizer import Outcome
from siren.data.shards import Clip
from siren.data.unfinished import Unfinished, pack_group
from siren.spectral import SpectralConfig, SpectralModel


def make_inputs(config: siren.SirenConfig, folder: Path) -> Path:
    """A checkpoint with random weights and a codec, and a token set, in `folder`, which is returned."""
    torch.manual_seed(0)
    spectral = SpectralModel(SpectralConfig(n_mels=4, window=640, codebook_dim=config.dac_code_dim))
    for tensor in spectral.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))
    codec = siren.Codec(spectral)
    model = siren.Siren(config)
    model.set_decode_embeddings(codec.decode_embeddings())
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder / "model", codec)
    _make_tokens(codec, config.prompt_dim, folder / "tokens")
    return folder


def _make_tokens(codec: siren.Codec, prompt_dim: int, folder: Path, clips: int = 12) -> None:
    """A token set of random clips; every caption is a prompt of its own."""
    rng = np.random.default_rng(0)
    names = ("identity", "sample_rate", "hop_length", "num_codebooks", "codebook_size")
    job: dict[str, Any] = {
        "format_version": 1,
        "kind": "siren-tokens",
        "codec": {name: getattr(codec, name) for name in names},
        "encoder": {"identity": "random", "dim": prompt_dim},
        "settings": {"reserve": 0},
    }
    made = []
    for i in range(clips):
        codes = rng.integers(0, codec.codebook_size, (9, codec.num_codebooks))
        prompt = rng.standard_normal((int(rng.integers(1, 6)), prompt_dim)).astype(np.float32)
        made.append(Clip(f"clip-{i}", codes, [f"sound {i}"], [prompt]))
    unfinished = Unfinished(folder, job, 0.0)
    unfinished.open(1, overwrite=False)
    unfinished.write(0, *pack_group(0, [Outcome(clips=made)], codec.codebook_size))
    unfinished.finish(1)


def weighted_codes(notes: Path, prompts: list[str], _: Any, codes: np.ndarray, **__: Any) -> list[float | None]:
    """A reward in which no two sounds are equal; the last sound of a batch gets none. It notes what it was given."""
    with notes.open("a") as file:
        file.write(f"{' '.join(prompts)} {codes.sum()}\n")
    weights = np.sin(np.arange(codes[0].size)).reshape(codes[0].shape)
    return [*(codes[:-1] * weights).mean((1, 2)).tolist(), None]


def settings(folder: Path, out: Path, steps: int, save_every: int) -> AlignSettings:
    """Two experts, two updates a step, guidance, a divergence, from the inputs in `folder`."""
    reward = partial(weighted_codes, Path(f"{out}.notes"))
    return AlignSettings(
        model=folder / "model", data=folder / "tokens", out=out, reward_funcs=[reward], experts=(0, 1),
        prompts_per_step=3, num_generations=3, seconds=0.1, guidance_scale=1.5, num_iterations=2, beta=0.01,
        learning_rate=1e-3, weight_decay=0.01, warmup_steps=4, min_lr_ratio=0.1, batch_size=4, rollout_batch_size=6,
        max_steps=steps, eval_every=7, eval_prompts=2, save_every=save_every, val_fraction=0.2, device="cpu",
        threads=1, tensorboard=False, progress=False,
    )  # fmt: skip
