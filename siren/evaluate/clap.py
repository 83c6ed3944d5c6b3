"""CLAP as an embedding model: sound and text at 48 kHz, by a model in the transformers format, see data/similarity.py.

CLAP hears ten seconds at most, and its extractor would cut a random piece from a longer clip, or shrink it and add
three random pieces (the "fusion" models). Nothing random here: a longer clip is cut into the fewest equal parts that
fit, each of which is heard as a clip of its own, and its vector is the mean of theirs, scaled to length 1. Shorter
clips are repeated and filled up with silence by the extractor, as the model was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data.similarity import ClapSimilarity
from .embedding import Embedded, check_wave, pieces, unit_mean


class ClapEmbedder:
    """A CLAP; its vectors have length 1. `identity` is its name and the sha256 of its weights."""

    name = "clap"
    classes = 0
    min_samples = 0
    text = True

    def __init__(self, clap: ClapSimilarity) -> None:
        self.clap = clap
        self.identity = clap.identity
        self.sample_rate = int(clap.extractor.sampling_rate)
        self.dim = int(clap.model.config.projection_dim)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "cpu") -> ClapEmbedder:
        """Raises CheckpointError and MissingDependencyError, as `ClapSimilarity.from_pretrained`."""
        return cls(ClapSimilarity.from_pretrained(name, device))

    def embed(self, waves: Sequence[npt.NDArray[np.float32]]) -> Embedded:
        vectors, longest = [], int(self.clap.max_seconds * self.sample_rate)
        for i, wave in enumerate(waves):
            rows = [self.clap.embed_sound(part, self.sample_rate) for part in pieces(check_wave(wave, i), longest)]
            vectors.append(unit_mean(np.stack([row.numpy() for row in rows])))
        return Embedded(vectors, None)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        rows = [self.clap.embed_caption(text).numpy() for text in texts]
        return np.stack(rows) if rows else np.zeros((0, self.dim), np.float32)
