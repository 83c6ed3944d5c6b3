"""A tiny model with its prompts, cheap rewards, and settings for the tests of alignment runs."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training_runs import TINY, make_data

import siren
from siren.align.settings import AlignSettings
from siren.train.state import latest_state, read_state


def low_codes(prompts: list[str], completions: list[np.ndarray], codes: np.ndarray, **_: Any) -> list[float]:
    """The share of codes below 512 in the first expert's codebooks: something to learn in a few steps."""
    assert len(prompts) == len(completions) == len(codes)
    return (codes[:, : TINY.codes_per_expert] < 512).mean((1, 2)).tolist()


def moody_codes(prompts: list[str], completions: list[np.ndarray], codes: np.ndarray, **_: Any) -> list[float]:
    """A weighted mean of the codes, in which no two sounds are equal; it does not like to hear of some prompts."""
    if zlib.crc32(prompts[0].encode()) % 3 == 2:  # none that is held out
        raise ValueError("no mood")
    return (codes * np.sin(np.arange(codes[0].size)).reshape(codes[0].shape)).mean((1, 2)).tolist()


def make_inputs(folder: Path) -> dict[str, Any]:
    """The settings `model` and `data`: a checkpoint with random weights, and a token set whose captions are prompts."""
    made = make_data(folder)
    torch.manual_seed(0)
    model = siren.Siren(TINY)
    codec = siren.Codec.from_pretrained(made["codec"])
    model.set_decode_embeddings(codec.decode_embeddings())
    model.save_pretrained(folder / "model", codec)
    return {"model": folder / "model", "data": made["data"]}


def settings(inputs: dict[str, Any], out: Path, /, **changes: Any) -> AlignSettings:
    """Six steps of three prompts."""
    values: dict[str, Any] = {
        **inputs,
        "out": out,
        "reward_funcs": [low_codes],
        "prompts_per_step": 3,
        "num_generations": 4,
        "seconds": 0.2,
        "num_iterations": 2,
        "learning_rate": 1e-3,
        "batch_size": 5,
        "max_steps": 6,
        "eval_every": 3,
        "eval_prompts": 2,
        "save_every": 2,
        "val_fraction": 0.2,
        "device": "cpu",
        "tensorboard": False,
        "threads": 1,
        "progress": False,
    }
    return AlignSettings(**values | changes)


def metrics(run: Path) -> list[dict[str, Any]]:
    """What was logged, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_seconds")} for line in lines]


def assert_same(a: Path, b: Path) -> None:
    """Weights, optimiser, log: bit for bit."""
    first, second = (read_state(latest_state(run)) for run in (a, b))
    for mine, other in ((first.model, second.model), (first.optimizer, second.optimizer)):
        assert mine.keys() == other.keys()
        assert not [name for name in mine if mine[name].numpy().tobytes() != other[name].numpy().tobytes()]
    assert metrics(a) == metrics(b)
