"""Pairs of sound and caption to train an aligner on: clip folders in memory, and what is done to a sound before use.

A window of a sound is cut or shifted at random, turned up or down, and gets faint noise. Half of the sounds are what a
codec makes of them, if there is one: that is how generated sound comes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from .codec import MAX_SECONDS, Codec
from .codec_data import read_sounds
from .data.captions import clean_captions
from .data.clips import ClipRecord, read_clip_folder
from .data.sound import SAMPLE_RATE
from .data.tokens import split
from .errors import DataError, InputError

# Captions whose mean token states have a cosine of at least this are taken to say the same: of the captions of the two
# offline data sets, half of those with the same label, and 3 in 1000 of those with different ones.
SAME_CAPTION = 0.6
_GAIN = 12.0  # dB, up or down
_NOISE = (-90.0, -50.0)  # dBFS of white noise
_WORD_DROPOUT = 0.1


@dataclass(frozen=True)
class Pairs:
    """N clips in memory: ids, labels, sounds int16 [S] at 16 kHz, and the places of each one's captions in `texts`.

    states: of each distinct text the encoder's token states [P, text_dim], in half precision. meanings [texts,
    text_dim]: their means, of length 1.
    """

    ids: list[str]
    labels: list[str | None]
    sounds: list[np.ndarray]
    captions: list[list[int]]
    texts: list[str]
    states: list[Tensor]
    meanings: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def clip_id(self, index: int) -> str:
        return self.ids[index]

    def split(self, val_fraction: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Clips for training and for validation, by the rule of `siren.data.split`. Raises InputError."""
        asked: Any = self  # the rule reads ids only
        return split(asked, val_fraction)

    def related(self, clips: Sequence[int], texts: Sequence[int]) -> Tensor:
        """bool [B, B]: whether clips i and j have the same label, or their captions `texts` say the same."""
        labels = [self.labels[clip] for clip in clips]
        same = torch.tensor([[a is not None and a == b for b in labels] for a in labels])
        meanings = self.meanings[torch.as_tensor(texts)]
        return same | (meanings @ meanings.T >= SAME_CAPTION)

    def token_states(self, texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """float32 [B, P, text_dim] and bool [B, P] of texts."""
        chosen = [self.states[text] for text in texts]
        states = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).float()
        lengths = torch.tensor([len(part) for part in chosen])
        return states, torch.arange(states.shape[1]) < lengths[:, None]


def read_pairs(sources: Sequence[str | Path], encoder: Any, progress: bool = True) -> Pairs:
    """The clips of clip folders that have a sound and a caption, cleaned as `siren data tokenize` does.

    Those that have none, or cannot be read, are left out, and it says so. Raises InputError if there is no folder,
    DataError if one is not a clip folder or nothing is left.
    """
    if isinstance(sources, (str, Path)) or not sources:
        raise InputError("sources must be a list of clip folders")
    records = [record for source in sources for record in read_clip_folder(source)]
    cleaned = [clean_captions(record.captions)[0] for record in records]
    kept = [i for i, texts in enumerate(cleaned) if texts]
    if not kept:
        raise DataError(f"none of the {len(records)} clips has a caption; an aligner learns from captions")
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} of {len(records)} clips have no caption and are left out", file=sys.stderr)
    found = read_sounds([records[i] for i in kept], progress)
    clips: list[tuple[ClipRecord, np.ndarray, list[str]]] = [
        (records[i], sound, cleaned[i]) for i, sound in zip(kept, found, strict=True) if sound is not None
    ]
    texts = list(dict.fromkeys(text for _, _, captions in clips for text in captions))
    places = {text: i for i, text in enumerate(texts)}
    states, meanings = _encode(texts, encoder, progress)
    return Pairs(
        [record.id for record, _, _ in clips],
        [record.label for record, _, _ in clips],
        [sound for _, sound, _ in clips],
        [[places[text] for text in captions] for _, _, captions in clips],
        texts,
        states,
        meanings,
    )


def _encode(texts: list[str], encoder: Any, progress: bool) -> tuple[list[Tensor], Tensor]:
    states, means = [], []
    for text in tqdm(texts, desc="read captions", disable=not progress or not sys.stderr.isatty()):
        try:
            found = encoder([text])[0][0].cpu()
        except InputError as error:
            raise DataError(f"the caption {text[:60]!r} cannot be encoded: {error}") from error
        means.append(found.mean(dim=0))
        states.append(found.half())
    return states, torch.nn.functional.normalize(torch.stack(means), dim=1)


def recode(
    sounds: Sequence[np.ndarray], codec: Codec, seconds: float, progress: bool = True, workers: int | None = None
) -> list[np.ndarray]:
    """What the codec makes of the first `seconds` of int16 sounds. They are spread over threads, the result is not."""
    if codec.sample_rate != SAMPLE_RATE:
        raise InputError(f"the codec works at {codec.sample_rate} Hz; an aligner hears {SAMPLE_RATE} Hz")
    size = round(min(seconds, MAX_SECONDS) * SAMPLE_RATE)

    def one(sound: np.ndarray) -> np.ndarray:
        wave = torch.from_numpy(sound[:size]).float() / 32767
        made = codec.decode(codec.encode(wave[None, None].to(codec.device)))[0, 0, : len(wave)].cpu()
        return (made.clamp(-1, 1) * 32767).round().numpy().astype(np.int16)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a clip is too small to be shared; the bits do not depend on the number of threads
    pool = ThreadPoolExecutor(workers or threads)
    try:
        made = pool.map(one, sounds)
        return list(tqdm(made, "codec", len(sounds), disable=not progress or not sys.stderr.isatty()))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def windows(sounds: Sequence[np.ndarray], size: int, rng: np.random.Generator | None = None) -> Tensor:
    """float32 [B, size] of int16 sounds. With `rng`, longer ones are cut and shorter ones placed at random; without,
    all begin at their beginning.
    """
    batch = np.zeros((len(sounds), size), dtype=np.float32)
    for row, sound in zip(batch, sounds, strict=True):
        spare = size - len(sound)
        shift = 0 if rng is None else int(rng.integers(min(spare, 0), max(spare, 0) + 1))
        piece = sound[max(-shift, 0) :][:size]
        row[max(shift, 0) : max(shift, 0) + len(piece)] = piece / np.float32(32767)
    return torch.from_numpy(batch)


def disturb(batch: Tensor, rng: np.random.Generator) -> Tensor:
    """Waveforms [B, S] turned up or down by up to 12 dB, half of them with faint white noise."""
    rows = (len(batch), 1)
    gain = 10 ** (rng.uniform(-_GAIN, _GAIN, rows) / 20)
    level = 10 ** (rng.uniform(*_NOISE, rows) / 20) * (rng.random(rows) < 0.5)
    noise = rng.standard_normal(tuple(batch.shape), np.float32) * level.astype(np.float32)
    return batch * torch.from_numpy(gain).float() + torch.from_numpy(noise)


def drop_words(mask: Tensor, rng: np.random.Generator) -> Tensor:
    """A mask [B, P] of tokens without a tenth of them; one at least stays of each text."""
    order = rng.random(tuple(mask.shape))
    kept = torch.from_numpy(order >= _WORD_DROPOUT)
    first = torch.from_numpy(order).masked_fill(~mask, -1).argmax(dim=1)
    kept[torch.arange(len(mask)), first] = True
    return mask & kept
