"""The real clips of a prompt class, which of them are held out, and what the codec makes of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soxr
import torch
from retrieval_classes import PromptClass
from tqdm import tqdm

import siren
from siren.data.clips import ClipRecord
from siren.data.sound import SAMPLE_RATE, read_sound
from siren.errors import InputError

_FEWEST = 4  # clips of a class


@dataclass(frozen=True)
class Selection:
    """The clips of one class: for its prototype, and as queries; `held_out` of these are of the validation split."""

    references: list[ClipRecord]
    queries: list[ClipRecord]
    held_out: int


def select(
    clips: Sequence[ClipRecord], wanted: PromptClass, references: int, queries: int, val_fraction: float
) -> Selection:
    """Up to `references` training clips and `queries` others of a class, in the order of their ids' hashes.

    Where too few clips are held out, the last training clips make up for them. Raises InputError if the class has fewer
    than four clips, or fewer than three of them for training.
    """
    found = sorted(
        (clip for clip in clips if clip.label == wanted.label),
        key=lambda clip: hashlib.sha256(f"retrieval {clip.id}".encode()).digest(),
    )
    training = [clip for clip in found if not is_held_out(clip.id, val_fraction)]
    validation = [clip for clip in found if is_held_out(clip.id, val_fraction)]
    if len(found) < _FEWEST or len(training) < _FEWEST - 1:
        raise InputError(
            f"{len(found)} clips of the {wanted.source} have the label {wanted.label!r}, {len(training)} of them for "
            f"training; {_FEWEST} with {_FEWEST - 1} for training are needed"
        )
    chosen = [*validation[:queries], *training[::-1]][:queries]
    return Selection(training[:references], chosen, min(queries, len(validation)))


def is_held_out(clip_id: str, val_fraction: float) -> bool:
    """Whether a clip is of the validation split; the rule of `siren.data.split`, for clips without tokens."""
    recording = re.sub(r"#\d+$", "", clip_id)
    return int(hashlib.sha256(recording.encode()).hexdigest(), 16) % 1000 < 1000 * val_fraction


def read_waves(clips: Sequence[ClipRecord], sample_rate: int, seconds: float) -> list[npt.NDArray[np.float32]]:
    """The beginnings of the clips, each [seconds * sample_rate], padded with zeros. Raises DataError."""
    size = round(seconds * sample_rate)
    waves = []
    for clip in clips:
        wave = read_sound(clip.path)
        if sample_rate != SAMPLE_RATE:
            wave = soxr.resample(wave, SAMPLE_RATE, sample_rate)
        waves.append(np.pad(wave[:size], (0, max(0, size - len(wave)))))
    return waves


def add_noise(wave: npt.NDArray[np.float32], level: float) -> npt.NDArray[np.float32]:
    """A sound [S] scaled to a peak of 1 (silence stays), plus white noise of this deviation, always the same."""
    noise = np.random.default_rng(0).standard_normal(len(wave), np.float32)
    return wave / (np.abs(wave).max() or 1) + np.float32(level) * noise


def is_silent(wave: npt.NDArray[np.float32]) -> bool:
    """Whether all samples of a sound [S] are 0 once it is a 16-bit file."""
    return float(np.abs(wave).max()) < 0.5 / 32767


def unpadded(wave: npt.NDArray[np.float32]) -> int:
    """Samples of a sound [S] without the zeros at its end, at least 1."""
    sounding = np.flatnonzero(wave)
    return int(sounding[-1]) + 1 if len(sounding) else 1


@torch.inference_mode()
def reconstruct(codec: siren.Codec, waves: Sequence[npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
    """What the codec makes of each clip, of the same length."""
    made = []
    for wave in tqdm(waves, desc="codec", unit="clip", disable=None):
        codes = codec.encode(torch.from_numpy(wave)[None, None].to(codec.device))
        sound = codec.decode(codes)[0, 0, : len(wave)].cpu().numpy()
        made.append(np.pad(sound, (0, len(wave) - len(sound))))
    return made
