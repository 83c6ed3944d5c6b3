"""What the studies of a codec share: a sample of clips, their codes, and the feature that each code stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..data.tokens import check_codec
from ..errors import DataError, InputError
from ..train.batches import random_words

_CLIPS = 101  # names the stream of random words that picks clips


class Tokens(Protocol):
    """What the studies ask of a token set (siren.data.tokens.TokenSet)."""

    @property
    def frames(self) -> NDArray[Any]: ...
    def __len__(self) -> int: ...
    def codes(self, index: int, start: int = 0, stop: int | None = None) -> NDArray[Any]: ...
    def clip_id(self, index: int) -> str: ...
    def label(self, index: int) -> str | None: ...


@dataclass(frozen=True)
class Codes:
    """The codes of some clips side by side: codes int32 [J, N]; clip i has the frames offsets[i] to offsets[i + 1]."""

    codes: NDArray[np.int32]
    offsets: NDArray[np.int64]


def pick_clips(indices: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """At most `most` of the clips (0: all), drawn without replacement, in their order."""
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise InputError(f"the number of clips must be a whole number from 0, which is all, not {most!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise InputError(f"seed must be a whole number from 0 to 2^32 - 1, not {seed!r}")
    if not most or most >= len(indices):
        return indices
    order = np.argsort(random_words(len(indices), seed, _CLIPS), kind="stable")
    return np.sort(indices[order[:most]])


def read_codes(tokens: Tokens, indices: NDArray[np.int64], progress: bool = False) -> Codes:
    """The codes of the clips `indices`: 4 bytes a code, 2.4 MB for 1,000 s of 12 codebooks at 50 frames a second."""
    clips = tqdm(indices.tolist(), desc="reading codes", unit="clip", disable=not progress)
    parts = [tokens.codes(i).astype(np.int32) for i in clips]
    offsets = np.cumsum([0, *(part.shape[1] for part in parts)])
    return Codes(np.concatenate(parts, axis=1), offsets)


def feature_tables(tokens: Any, codec: Any) -> NDArray[np.float32]:
    """The feature of every code of every codebook, [J, V, C]: what the codec's decoder adds up (eq. 2).

    Raises DataError if the codec did not make the codes, or a feature is not finite.
    """
    check_codec(tokens, codec)
    tables = np.stack([embedding.table().numpy() for embedding in codec.decode_embeddings()]).astype(np.float32)
    if not np.isfinite(tables).all():
        raise DataError("the codec's decode embeddings hold NaN or infinity; get it again")
    return tables


def used_codes(codes: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    """How often each code of each codebook comes up: codes [J, N] -> [J, size]."""
    return np.stack([np.bincount(row, minlength=size) for row in codes])


def mean_features(
    tables: NDArray[np.float32], codes: Codes, clips: Sequence[int] | NDArray[np.int64], codebook: int
) -> NDArray[np.float32]:
    """One codebook's feature of each clip, the mean over its frames (appendix D.1): [len(clips), C]."""
    means = []
    for clip in clips:
        part = codes.codes[codebook, codes.offsets[clip] : codes.offsets[clip + 1]]
        means.append(tables[codebook][part].mean(0))
    return np.stack(means)
