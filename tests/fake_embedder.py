"""A small embedding model and lists of sounds for the tests of evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from siren.evaluate import EvaluateSettings, evaluate

RATE = 8000


class Made:
    """What `embed` returns."""

    def __init__(self, vectors: list[npt.NDArray[np.float32]], logits: npt.NDArray[np.float32] | None) -> None:
        self.vectors, self.logits = vectors, logits


class FakeEmbedder:
    """Three values of a wave, four logits of these, and texts by their length. It counts the clips that it embeds."""

    sample_rate, dim = RATE, 3

    def __init__(
        self, name: str = "fake", classes: int = 4, text: bool = True, windows: int = 1, min_samples: int = 0
    ) -> None:
        self.name, self.identity = name, f"{name} sha256:0"
        self.classes, self.text, self.windows, self.min_samples = classes, text, windows, min_samples
        self.seen = 0

    def embed(self, waves: Sequence[npt.NDArray[np.float32]]) -> Made:
        vectors = []
        for wave in waves:
            self.seen += 1
            pieces = np.array_split(wave, self.windows)
            vectors.append(np.array([[p.mean(), p.std(), np.abs(np.diff(p)).mean()] for p in pieces], np.float32))
        turn = np.random.default_rng(1).standard_normal((3, self.classes))
        logits = np.array([v.mean(0) @ turn * 20 for v in vectors], np.float32).reshape(len(waves), self.classes)
        return Made(vectors, logits if self.classes else None)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        assert all(texts)
        angles = np.array([len(text) / 10 for text in texts])
        return np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1).astype(np.float32)


def tone(number: int, seconds: float = 0.3, rate: int = RATE) -> npt.NDArray[np.float32]:
    """A sound that differs from that of every other number."""
    generator = np.random.default_rng(number)
    times = np.arange(round(seconds * rate)) / rate
    wave = 0.1 + 0.3 * generator.random() * np.sin(2 * np.pi * (100 + 900 * generator.random()) * times)
    return (wave + 0.02 * generator.standard_normal(len(times))).astype(np.float32)


def sounds(folder: Path, numbers: Sequence[int], rate: int = RATE, **more: Any) -> Path:
    """A folder of tones named clip-000 and so on."""
    folder.mkdir(parents=True)
    for i, number in enumerate(numbers):
        soundfile.write(folder / f"clip-{i:03d}.wav", tone(number, rate=rate), rate, subtype="FLOAT")
    return folder


def manifest(folder: Path, count: int, name: str = "list.jsonl") -> Path:
    """A list with ids and captions for the sounds of a folder."""
    lines = [
        {"id": f"c{i}", "audio": f"clip-{i:03d}.wav", "caption": "rain " * (1 + i % 3) + "falls"} for i in range(count)
    ]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def run(generated: Path, out: Path, **more: Any) -> dict[str, Any]:
    """`evaluate` with the fake model (which `load_embedder` must give), with few replicates."""
    values: dict[str, Any] = {"embeddings": ["fake"], "bootstrap": 40, "progress": False}
    return evaluate(EvaluateSettings(generated, out, **values | more))
