"""The embedding models that work offline: aiSFX (sound and classes) and the aligner (sound and text).

They stand in for CNN14 and CLAP where those weights are not at hand. Figures by them keep their names and are never
compared with figures by others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..aisfx import CLASSES, DIM, HEAD, SAMPLE_RATE, SoundEvents
from ..aligner import Aligner
from ..manifest import MINI
from .embedding import LONGEST, Embedded, check_wave, no_texts, pieces, unit_mean


class AisfxEmbedder:
    """aiSFX: an embedding of 512 numbers and logits of 81 classes, see aisfx.py.

    A clip of more than a minute is heard in equal parts; embedding and logits are the means of theirs.
    """

    name = "aisfx"
    sample_rate = SAMPLE_RATE
    dim = DIM
    classes = CLASSES
    min_samples = 0
    text = False

    def __init__(self, events: SoundEvents) -> None:
        self.events = events
        self.identity = f"{events.identity} classes:{HEAD}"

    def embed(self, waves: Sequence[npt.NDArray[np.float32]]) -> Embedded:
        vectors, logits = [], np.zeros((len(waves), self.classes), np.float32)
        for i, wave in enumerate(waves):
            parts = pieces(check_wave(wave, i), LONGEST * self.sample_rate)
            rows, row_logits = self.events.embed_and_classify(parts, self.sample_rate)
            vectors.append(rows.mean(axis=0, keepdims=True))
            logits[i] = row_logits.mean(axis=0)
        return Embedded(vectors, logits)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:  # noqa: ARG002
        raise no_texts(self.name)


class AlignerEmbedder:
    """An aligner, see aligner.py; its vectors have length 1.

    A clip of more than a minute is heard in equal parts; its vector is the mean of theirs, scaled to length 1.
    """

    name = "aligner"
    classes = 0
    min_samples = 0
    text = True

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner
        self.identity = aligner.identity
        self.sample_rate = aligner.sample_rate
        self.dim = aligner.dim

    @classmethod
    def from_pretrained(cls, folder: str | Path | None, device: str) -> AlignerEmbedder:
        """The aligner of siren-mini, or of a folder or hub name. Raises CheckpointError, MissingDependencyError."""
        aligner = Aligner.from_pretrained(MINI if folder is None else folder, device)
        _ = aligner.encoder  # what is missing is said now and not after an hour of other figures
        return cls(aligner)

    def embed(self, waves: Sequence[npt.NDArray[np.float32]]) -> Embedded:
        vectors = []
        for i, wave in enumerate(waves):
            parts = pieces(check_wave(wave, i), LONGEST * self.sample_rate)
            vectors.append(unit_mean(self.aligner.embed_audio(parts, self.sample_rate)))
        return Embedded(vectors, None)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return self.aligner.embed_text(texts)
