"""Sounds to train a codec on: those of clip folders, and random crops of them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .data.clips import ClipRecord, read_clip_folder
from .data.sound import read_sound
from .errors import DataError, InputError


def read_clips(sources: Sequence[str | Path], progress: bool = True) -> list[np.ndarray]:
    """The sounds of clip folders, int16 [S] at 16 kHz; those that cannot be read are left out, and it says so.

    Raises InputError if there is no folder, DataError if one is not a clip folder or no sound at all can be read.
    """
    if isinstance(sources, (str, Path)) or not sources:
        raise InputError("sources must be a list of clip folders")
    records = [record for source in sources for record in read_clip_folder(source)]
    return [sound for sound in read_sounds(records, progress) if sound is not None]


def read_sounds(records: Sequence[ClipRecord], progress: bool = True) -> list[np.ndarray | None]:
    """The sound of each clip, int16 [S] at 16 kHz; None for one that cannot be read, and it says so.

    Raises DataError if none can be read.
    """
    sounds: list[np.ndarray | None] = []
    failed = []
    for record in tqdm(records, desc="read sounds", disable=not progress or not sys.stderr.isatty()):
        try:
            sounds.append((read_sound(record.path) * 32767).round().astype(np.int16))
        except DataError as error:
            sounds.append(None)
            failed.append(str(error))
    if failed and len(failed) == len(records):
        raise DataError(f"none of the {len(records)} sounds can be read; the first: {failed[0]}")
    if failed:
        print(f"{len(failed)} of {len(records)} sounds left out; the first: {failed[0]}", file=sys.stderr)
    return sounds


class Crops:
    """Random crops of `crop` samples from int16 sounds; which ones is a function of seed and step.

    Sounds are drawn by length plus one crop. A crop may begin half its length before its sound, and end as much after
    it, in silence: sounds that are shorter than a crop stand anywhere in it, and the silence after them is learned too.
    """

    def __init__(self, sounds: Sequence[np.ndarray], crop: int, seed: int) -> None:
        self.sounds, self.crop, self.seed = sounds, crop, seed
        lengths = np.array([len(sound) + crop for sound in sounds], dtype=np.float64)
        self._shares = lengths / lengths.sum()

    def batch(self, size: int, step: int, purpose: int = 0) -> Tensor:
        """Crops [size, 1, crop], float32 within -1..1. Another purpose gives other crops for the same step."""
        rng = np.random.default_rng((self.seed, purpose, step))
        batch = np.zeros((size, self.crop), dtype=np.float32)
        for row, index in zip(batch, rng.choice(len(self.sounds), size, p=self._shares), strict=True):
            sound = self.sounds[index]
            start = int(rng.integers(-(self.crop // 2), max(1, len(sound) - self.crop // 2)))
            piece = sound[max(start, 0) : start + self.crop]
            row[max(-start, 0) : max(-start, 0) + len(piece)] = piece / np.float32(32767)
        return torch.from_numpy(batch)[:, None]

    def digest(self) -> str:
        """The sha256 of all samples."""
        digest = hashlib.sha256()
        for sound in self.sounds:
            digest.update(len(sound).to_bytes(8, "little"))
            digest.update(sound.tobytes())
        return digest.hexdigest()
