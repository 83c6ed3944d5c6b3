"""Sound files as an embedding model hears them, and the reasons for which a file is skipped instead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr

from ..data.sound import SoundError, read_native

# Of a skipped clip; SoundError has "missing", "unreadable", "truncated", "NaN or infinity", "too long", "too short".
SILENT, TOO_SHORT, CLIPPED = "silent", "too short", "clipped"
_SILENCE = 2.0**-15  # one step of 16 bits: with no louder sample, a file holds digital silence
_FULL_SCALE = 32767 / 32768
_RUN = 3  # samples in a row at full scale; a peak that was turned up to it is one or two


@dataclass(frozen=True)
class Heard:
    """A clip: mono float32 [samples] at the embedder's rate, the file's own rate in Hz, and whether it is clipped."""

    wave: npt.NDArray[np.float32]
    rate: int
    clipped: bool


def hear(path: Path, sample_rate: int, min_seconds: float, max_seconds: float) -> Heard:
    """Read a file at its own rate and resample it by soxr. Raises SoundError with the reason to skip it."""
    wave, rate = read_native(path, max_seconds)
    if _cut_off(path):
        raise SoundError(f"{path} is cut off: it is shorter than its header says", "truncated")
    if len(wave) < min_seconds * rate:
        raise SoundError(f"{path} is {len(wave) / rate:.3g} s long; at least {min_seconds:g} s are needed", TOO_SHORT)
    if np.abs(wave).max() < _SILENCE:
        raise SoundError(f"{path} is silent", SILENT)
    clipped = is_clipped(wave)
    if rate != sample_rate:
        wave = soxr.resample(wave, rate, sample_rate)
    return Heard(np.ascontiguousarray(wave, np.float32), rate, clipped)


def is_clipped(wave: npt.NDArray[np.floating]) -> bool:
    """Whether three samples in a row or more stand at full scale, on the same side."""
    sides = np.where(wave >= _FULL_SCALE, 1, np.where(wave <= -_FULL_SCALE, -1, 0))
    same = (sides[_RUN - 1 :] != 0) & (sides[_RUN - 1 :] == sides[: 1 - _RUN])
    for i in range(1, _RUN - 1):
        same &= sides[i : i + len(same)] == sides[: len(same)]
    return bool(same.any())


def _cut_off(path: Path) -> bool:
    """Whether a WAV file ends before its header says; libsndfile reads what is left of it as if it was whole."""
    with path.open("rb") as file:
        header = file.read(12)
    if len(header) < 12 or header[:4] != b"RIFF" or header[8:] != b"WAVE":
        return False
    size = int.from_bytes(header[4:8], "little")
    # Programs that write to a pipe do not know the size, and leave 0 or the largest number.
    return 0 < size < 0xFFFFFF00 and path.stat().st_size < size + 8 - 1  # some leave out the last padding byte
