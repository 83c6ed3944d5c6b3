"""The clips of a report: which of them are shown, and each as a player and a mel spectrogram that fit into the page."""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, MissingDependencyError
from ..picture import mel_spectrogram

MAX_CLIPS = 24
MAX_SECONDS = 10.0  # of one clip
_SOUND_BYTES = 12 << 20  # of all players; 16 MiB in base64, and the pictures add less than 3
_RATES = (2000, 768000)  # Hz; a header outside is damaged or no sound
_MAX_CHANNELS = 64
_COLUMNS, _BANDS = 480, 128  # pixels of a spectrogram
_RANGE_DB = 80.0  # of mel_spectrogram
# Every 32nd colour of matplotlib's map "magma" (CC0), from silence to the loudest.
_COLOURS = ("000004", "1d1147", "51127c", "832681", "b73779", "e75263", "fc8961", "fec488", "fcfdbf")


@dataclass(frozen=True)
class Sound:
    """What of a clip is in the page: `shown` of its `seconds`, mono at `sample_rate` Hz, as data URIs."""

    player: str
    picture: str
    sample_rate: int
    seconds: float
    shown: float
    channels: int


def choose_clips(
    clips: Sequence[dict[str, Any]], score: str | None, better: str | None
) -> list[tuple[dict[str, Any], str]]:
    """At most 24 clips, each with its place in words ("best, rank 3 of 98"; "" if it has none).

    The best, the middle and the worst eight by `score`, best first; `better` is "lower" or "higher", None: unknown.
    Clips without the score come after, evenly spaced, where there is room.
    """
    scored = [clip for clip in clips if score is not None and score_of(clip, score) is not None]
    others = [clip for clip in clips if score is None or score_of(clip, score) is None]
    if score is not None:
        scored.sort(key=lambda clip: score_of(clip, score) or 0.0, reverse=better != "lower")
    count, third = len(scored), MAX_CLIPS // 3
    if count <= MAX_CLIPS:
        chosen = [(clip, f"rank {i + 1} of {count}") for i, clip in enumerate(scored)]
    else:
        words = ("best", "middle", "worst") if better else ("highest", "middle", "lowest")
        starts = (0, (count - third) // 2, count - third)
        chosen = [
            (scored[i], f"{word}, rank {i + 1:,} of {count:,}")
            for word, start in zip(words, starts, strict=True)
            for i in range(start, start + third)
        ]
    room = min(MAX_CLIPS - len(chosen), len(others))
    return chosen + [(others[i * len(others) // room], "") for i in range(room)]


def score_of(clip: dict[str, Any], score: str) -> float | None:
    """The clip's finite score, or None."""
    value = (clip.get("scores") or {}).get(score)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def load_sound(path: Path, clips: int) -> Sound:
    """The sound for one of `clips` players, whose size is bounded together. Raises DataError: why there is none.

    Channels are averaged. A sound that leaves -1..1 is turned down as a whole.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library libsndfile is missing
        raise MissingDependencyError(f"soundfile does not import ({error}): pip install soundfile") from error
    try:
        if not path.is_file():  # before opening: a pipe would be waited for
            raise DataError("the file is gone" if not path.exists() else "this is not a file")
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            if file.format == "RAW" or not _RATES[0] <= rate <= _RATES[1] or channels > _MAX_CHANNELS:
                raise DataError("the file has no header that says what sound it holds")
            limit = min(int(MAX_SECONDS * rate), _SOUND_BYTES // clips // 2)
            wave = file.read(limit, dtype="float32", always_2d=True).mean(axis=1)
            seconds = max(file.frames, len(wave)) / rate
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError) as error:
        # TypeError: soundfile's own for a file named .raw
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        raise DataError(f"the file cannot be read as sound: {reason}") from error
    if not len(wave):
        raise DataError("the file holds no sound")
    peak = float(np.abs(wave).max())
    if not math.isfinite(peak):
        raise DataError("the file holds NaN or infinity")
    wave = wave / max(1.0, peak)
    data = io.BytesIO()
    soundfile.write(data, wave, rate, format="WAV", subtype="PCM_16")
    decibels = mel_spectrogram(wave, rate, max(1, math.ceil(len(wave) / _COLUMNS)))
    pixels = np.rint((decibels[::-1] + _RANGE_DB) * (255 / _RANGE_DB)).astype(np.uint8)
    return Sound(
        _data_uri("audio/wav", data.getvalue()),
        _data_uri("image/png", _png(pixels)),
        rate,
        seconds,
        len(wave) / rate,
        channels,
    )


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG of 256 colours from uint8 [height, width], without a library: those put their version or the date in."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    anchors = np.array([list(bytes.fromhex(colour)) for colour in _COLOURS], dtype=np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    palette = np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, i]) for i in range(3)], axis=1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)  # each row starts with its filter, none
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", np.rint(palette).astype(np.uint8).tobytes()),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        ]
    )
