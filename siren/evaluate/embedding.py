"""What an embedding model is to the figures: sound in, vectors and perhaps class logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InputError

LONGEST = 60  # seconds that go through a network at once


@dataclass(frozen=True)
class Embedded:
    """Of N clips: `vectors`, one float32 [n_i, dim] each, and `logits` float32 [N, classes], or None without classes.

    n_i is 1, except for VGGish: it is the number of whole windows in the clip. softmax(logits) are probabilities.
    """

    vectors: list[npt.NDArray[np.float32]]
    logits: npt.NDArray[np.float32] | None


class Embedder(Protocol):
    """An embedding model as `load_embedder` gives it. A clip runs alone: its numbers do not depend on its company.

    `identity` says what weights, and is a part of every figure: figures of different identities are not comparable.
    `sample_rate` in Hz, of the sound it wants. `dim` of an embedding. `classes` of its classifier; 0: it has none.
    `min_samples`: shorter sound cannot be embedded; 0: any length can. `text`: whether it embeds texts too, so that
    sound and text have a cosine.
    """

    name: str
    identity: str
    sample_rate: int
    dim: int
    classes: int
    min_samples: int
    text: bool

    def embed(self, waves: Sequence[npt.NDArray[np.float32]]) -> Embedded:
        """Mono waves, each float [samples] within -1..1 at `sample_rate`, of any lengths.

        Raises InputError for one that is empty or below min_samples, not mono, or holds NaN or infinity.
        """

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors [N, dim]. Raises InputError for an empty text, and if the model embeds no texts."""


def check_wave(wave: npt.ArrayLike, index: int, least: int = 1) -> npt.NDArray[np.float32]:
    """Clip `index` as contiguous float32 [samples]. Raises InputError unless it is mono, finite and `least` long."""
    array = np.asarray(wave)
    if array.ndim != 1 or array.dtype.kind != "f":
        raise InputError(f"clip {index} must be floating point of shape [samples], not {array.dtype} {array.shape}")
    if len(array) < max(1, least):
        raise InputError(f"clip {index} has {len(array)} samples, of which this embedding needs {max(1, least)}")
    array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"clip {index} holds NaN or infinity")
    return array


def pieces(wave: npt.NDArray[np.float32], longest: int) -> list[npt.NDArray[np.float32]]:
    """A clip in equal parts of at most `longest` samples, as few as there can be."""
    return np.array_split(wave, -(-len(wave) // longest))


def no_texts(name: str) -> InputError:
    return InputError(f"{name} embeds sound only; scores of sound and text need aligner or clap")


def unit_mean(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The mean of unit vectors [n, D], scaled to length 1: [1, D]. A single one stays as it is."""
    if len(rows) == 1:
        return rows
    mean = rows.mean(axis=0, keepdims=True)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)
