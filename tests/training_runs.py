"""A tiny token set, its codec, and settings for the tests of training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from fake_data import random_clips, write_tokens

from siren import Codec, SirenConfig
from siren.spectral import SpectralConfig, SpectralModel
from siren.train import TrainSettings
from siren.train.state import State, latest_state, read_state

TINY = SirenConfig(
    dim=32,
    n_heads=2,
    n_kv_heads=1,
    spatial_layers=1,
    factorized_layers=1,
    prompt_dim=8,
    num_experts=3,
    dac_code_dim=2,
    dac_feature_dim=8,
    ffn_multiple_of=16,
    max_seq_len=64,
    dropout=0.1,
)


def make_codec(seed: int = 0) -> Codec:
    """A codec with random weights whose decode embeddings fit `TINY`."""
    config = SpectralConfig(n_mels=4, window=640, codebook_dim=TINY.dac_code_dim)
    model = SpectralModel(config)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return Codec(model)


def make_data(folder: Path, clips: int = 24) -> dict[str, Any]:
    """The settings `data` and `codec`: a token set of clips of 1 to 9 frames, and the codec that its manifest names."""
    codec = make_codec()
    codec.save_pretrained(folder / "codec")
    tokens = write_tokens(folder / "tokens", [random_clips(clips - 7), random_clips(7, seed=1)])
    manifest = json.loads((tokens / "manifest.json").read_text())
    manifest["codec"]["identity"] = codec.identity
    manifest["encoder"]["identity"] = "minilm sha256:" + "0" * 64
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    return {"data": tokens, "codec": folder / "codec"}


def settings(inputs: dict[str, Any], out: Path, /, **changes: Any) -> TrainSettings:
    """Nine updates of the second expert with all that is random switched on."""
    values: dict[str, Any] = {
        **inputs,
        "out": out,
        "config": TINY,
        "experts": [1],
        "max_steps": 9,
        "batch_size": 3,
        "accumulate": 2,
        "warmup_steps": 2,
        "crop_seconds": 0.1,
        "prompt_dropout": 0.2,
        "bucket": 2,
        "val_fraction": 0.2,
        "val_every": 4,
        "save_every": 3,
        "device": "cpu",
        "tensorboard": False,
    }
    return TrainSettings(**values | changes)


def final_state(run: Path, start_codebook: int = 4) -> State:
    """The last state of one of a run's experts."""
    path = latest_state(run / f"expert_{start_codebook}")
    assert path is not None
    return read_state(path)


def metrics(run: Path, start_codebook: int = 4) -> list[dict[str, Any]]:
    """What was logged, without times."""
    lines = (run / f"expert_{start_codebook}" / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    return [{key: value for key, value in line.items() if key != "frames_per_second"} for line in values]


def assert_same_runs(a: Path, b: Path, start_codebook: int = 4) -> None:
    """Weights, optimiser, losses: bit for bit."""
    first, second = (final_state(run, start_codebook) for run in (a, b))
    assert first.values["step"] == second.values["step"]
    for mine, other in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert mine.keys() == other.keys()
        different = [name for name in mine if mine[name].numpy().tobytes() != other[name].numpy().tobytes()]
        assert not different
    assert metrics(a, start_codebook) == metrics(b, start_codebook)
