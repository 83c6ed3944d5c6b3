"""Sound files to what a codec reads: mono float32 at 16 kHz, with activity, in segments (paper, appendix A).

Left out: loudness normalisation, which the paper does not do, and formats that libsndfile does not read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from ..errors import DataError, InputError, MissingDependencyError

SAMPLE_RATE = 16000  # Hz
MIN_SECONDS = 0.15
MAX_SECONDS = 3600.0
MIN_SNR = 6.0  # dB, appendix A
NOISE_CEILING = -60.0  # dBFS

_MIN_RATE, _MAX_RATE = 2000, 768000  # Hz; a header outside is damaged or no sound
_MAX_CHANNELS = 64
_BLOCK = 1 << 18  # frames read at a time
_CUT_OFF = 0.99  # of the frames a header announces; MP3 headers are a little off
_FRAME_SECONDS = 0.05
_QUANTISATION = (1 / 32768) ** 2 / 12  # power of 16-bit rounding, -101 dBFS: below it there is digital silence


class SoundError(DataError):
    """A sound file that cannot be used; `reason` is why, in a few words that are the same for every file."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


def read_sound(path: str | Path, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """A sound file as mono float32 [S] at 16 kHz, S >= 1, within -1..1: `read_native` with its arguments, resampled."""
    return read_native(path, max_seconds, SAMPLE_RATE)[0]


def read_native(
    path: str | Path, max_seconds: float = MAX_SECONDS, sample_rate: int | None = None
) -> tuple[np.ndarray, int]:
    """A sound file as mono float32 [S], S >= 1, within -1..1, and the file's own rate in Hz.

    The sound is at `sample_rate`, or at the file's own if that is None. Channels are averaged; soxr resamples. A sound
    that leaves -1..1 is turned down as a whole, never clipped. A file without a header (raw samples) is refused,
    because what it holds would be a guess. Raises SoundError, which names the file, if it is missing, unreadable, cut
    off, empty, longer than `max_seconds`, or holds NaN or infinity.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library libsndfile is missing
        raise MissingDependencyError(f"soundfile does not import ({error}): pip install soundfile") from error
    path = Path(path)
    try:
        if not path.is_file():  # before opening: a pipe would be waited for
            raise SoundError(f"{path}: no such file", "missing")
        with soundfile.SoundFile(path) as file:
            waveform = _read_mono(path, file, max_seconds, sample_rate or file.samplerate)
            rate = int(file.samplerate)
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError) as error:
        # TypeError: soundfile's own for a file named .raw
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        raise SoundError(f"{path} cannot be read as sound: {reason}") from error
    if not len(waveform):
        raise SoundError(f"{path} is empty", "too short")
    peak = np.abs(waveform).max()
    if not np.isfinite(peak):
        raise SoundError(f"{path} holds NaN or infinity", "NaN or infinity")
    return (waveform / peak if peak > 1 else waveform), rate


def _read_mono(path: Path, file: Any, max_seconds: float, sample_rate: int) -> np.ndarray:
    """All of an open file at `sample_rate` with the channels averaged. In blocks, so that only the result is held."""
    rate, channels, announced = file.samplerate, file.channels, file.frames
    if file.format == "RAW":
        raise SoundError(f"{path} has no header that says what sound it holds")
    if not _MIN_RATE <= rate <= _MAX_RATE or channels > _MAX_CHANNELS:
        raise SoundError(f"{path} says {channels} channels at {rate} Hz; that is damaged, or no sound")
    limit = math.floor(max_seconds * rate)
    if announced > limit:
        message = f"{path} is {announced / rate:.0f} s long; the limit is {max_seconds:g} s, split it first"
        raise SoundError(message, "too long")
    resampler = soxr.ResampleStream(rate, sample_rate, num_channels=1, dtype="float32")
    blocks, frames = [], 0
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        mono = block.mean(axis=1, dtype=np.float64).astype(np.float32)
        blocks.append(mono if rate == sample_rate else resampler.resample_chunk(mono))
        frames += len(block)
        if frames > limit:  # a compressed file may hold more than it announces
            raise SoundError(f"{path} is longer than {max_seconds:g} s; split it first", "too long")
    if frames < _CUT_OFF * announced:
        raise SoundError(f"{path} is cut off: {frames} of {announced} samples are there", "truncated")
    if frames and rate != sample_rate:
        blocks.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def activity_snr(waveform: np.ndarray, sample_rate: int, noise_ceiling: float = NOISE_CEILING) -> float:
    """How far the sound in a waveform [S] stands above its noise floor, in dB; -inf for silence.

        SNR = 10 log10((L - N) / N),   N = min(10th percentile of p, ceiling),   L = mean of the loudest 5% of p

    p are the powers of 50 ms frames, each without its mean (a constant offset is no sound); a last frame that is not
    full is left out if there is another one. Frames of digital silence say nothing about a recorder's noise and are
    left out, so padding does not change the result.

    The ceiling, in dBFS, is what steady sounds need. Rain, an engine or a hum have no quiet frame, so a floor taken
    from the clip alone would be the sound itself and the SNR near 0 dB. The noise of a usable recording is below
    -60 dBFS, so a quietest frame above that is taken for sound. With the paper's 6 dB (MIN_SNR) a steady sound stays
    from about -53 dBFS on, and an event in a noise below -60 dBFS if it is 6 dB above the noise. An infinite ceiling
    gives the plain SNR of events over whatever is steady.
    """
    _check_waveform(waveform, sample_rate)
    powers = _frame_powers(waveform, sample_rate)
    powers = np.sort(powers[powers > _QUANTISATION])
    if not len(powers):
        return -math.inf
    noise = min(powers[len(powers) // 10], 10 ** (noise_ceiling / 10))
    loud = powers[-max(1, round(0.05 * len(powers))) :].mean()
    return 10 * math.log10((loud - noise) / noise) if loud > noise else -math.inf


def _frame_powers(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    sounding = np.flatnonzero(waveform)  # without the padding, a frame that is half padding would be the quietest one
    if not len(sounding):
        return np.zeros(0)
    waveform = waveform[sounding[0] : sounding[-1] + 1]
    size = min(max(1, round(_FRAME_SECONDS * sample_rate)), len(waveform))
    count = len(waveform) // size
    powers: np.ndarray = waveform[: count * size].astype(np.float64).reshape(count, size).var(axis=1)
    return powers


def segments(
    waveform: np.ndarray, sample_rate: int, seconds: float = 10.0, pad: bool = True, pad_seconds: float | None = None
) -> list[np.ndarray]:
    """What appendix A makes of a waveform [S]: pieces of `seconds`, without overlap.

    A waveform of `seconds` or more gives as many whole pieces as it has; the rest is discarded. A shorter one gives
    one piece, padded with zeros to `seconds`; with `pad_seconds`, by that much at most; with `pad` false, not at all.
    Below MIN_SECONDS (0.15 s) it is too short to be a sound, and the list is empty; nothing else makes it empty.
    Raises InputError.
    """
    _check_waveform(waveform, sample_rate)
    if not seconds >= MIN_SECONDS or not math.isfinite(seconds):
        raise InputError(f"seconds must be at least {MIN_SECONDS}, not {seconds!r}")
    if pad_seconds is not None and not pad_seconds >= 0:
        raise InputError(f"pad_seconds must be 0 or more, not {pad_seconds!r}")
    if len(waveform) < MIN_SECONDS * sample_rate:
        return []
    size = round(seconds * sample_rate)
    if len(waveform) >= size:
        return [waveform[i : i + size] for i in range(0, len(waveform) - size + 1, size)]
    silence = size - len(waveform) if pad else 0
    if pad_seconds is not None:
        silence = min(silence, round(pad_seconds * sample_rate))
    return [np.pad(waveform, (0, silence))]


def _check_waveform(waveform: np.ndarray, sample_rate: int) -> None:
    if not isinstance(waveform, np.ndarray) or waveform.ndim != 1 or waveform.dtype.kind != "f":
        raise InputError("waveform must be a floating-point array [samples]")
    if sample_rate < 1:
        raise InputError(f"sample_rate must be above 0, not {sample_rate!r}")
