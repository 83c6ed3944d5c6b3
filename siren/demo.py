"""A checkpoint with random weights: the whole path from text to sound before any model is trained. Its sound is noise.

It carries a codec of random weights too, and names the prompt encoder "minilm", so generating needs nothing else.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .checkpoint import save_checkpoint
from .codec import Codec
from .config import SirenConfig
from .errors import CheckpointError, InputError
from .expert import Expert
from .pretrained import missing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MINILM_DIM = 384


def write_demo(
    folder: str | Path, preset: str = "tiny", seed: int = 0, dtype: str = "float32", overwrite: bool = False
) -> SirenConfig:
    """Write a checkpoint of this preset with random weights, one expert in memory at a time; returns its config.

    The preset's sizes hold but for the prompt's, which is the encoder's, and lengths of less than 40 s. Raises
    CheckpointError if `folder` holds anything and `overwrite` is false, InputError for other arguments.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise InputError(f"seed must be a whole number from 0 to 2^32 - 1, not {seed!r}")
    target = Path(folder).expanduser()
    if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists; choose another folder, or overwrite it with --overwrite")
    base = SirenConfig.preset(preset)
    codec = _random_codec(base, seed)
    config = dataclasses.replace(
        base,
        prompt_dim=_MINILM_DIM,
        max_seq_len=max(base.max_seq_len, 2048),
        max_prompt_len=max(base.max_prompt_len, 128),
    )
    embeddings = codec.decode_embeddings()

    def experts() -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for start in range(0, config.num_codebooks, config.codes_per_expert):
            expert = _seeded(seed * 1000 + start + 1, lambda start=start: Expert(config, start))
            expert.set_decode_embeddings(embeddings)
            yield start, expert.to(DTYPES[dtype]).state_dict()

    with tempfile.TemporaryDirectory() as temporary:
        codec.save_pretrained(Path(temporary) / "codec")
        save_checkpoint(target, config, experts(), Path(temporary) / "codec", "minilm")
    return config


def _random_codec(config: SirenConfig, seed: int) -> Codec:
    """DAC 16 kHz in shape (hop 320), its channels as wide as the config's latent asks."""
    try:
        from transformers import DacConfig, DacModel
    except ImportError as error:
        raise missing("transformers", "dac") from error
    dac = DacConfig(
        encoder_hidden_size=config.dac_feature_dim // 16,  # doubled at each of the four stages
        downsampling_ratios=[2, 4, 5, 8],
        decoder_hidden_size=config.dac_feature_dim * 3 // 2,
        n_codebooks=config.num_codebooks,
        codebook_size=config.codebook_size,
        codebook_dim=config.dac_code_dim,
        sampling_rate=16000,
    )

    return Codec(_seeded(seed * 1000, lambda: _audible(DacModel(dac))))


@torch.no_grad()
def _audible(model: Any) -> Any:
    """Draw all convolutions again: as transformers draws them the sound is at -56 dB; 0.8 / sqrt(fan in): -20 dB."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            overlap = module.stride[0] if isinstance(module, torch.nn.ConvTranspose1d) else 1
            fan_in = module.in_channels * module.kernel_size[0] / overlap
            module.weight.normal_(std=0.8 * fan_in**-0.5)
            module.bias.zero_()  # type: ignore[union-attr]
    return model


def _seeded(seed: int, make: Any) -> Any:
    """make() with torch's generator, which modules draw their weights from, at `seed`, and afterwards as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
