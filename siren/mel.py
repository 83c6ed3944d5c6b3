"""Mel filterbanks: triangles over the bins of a Fourier transform, evenly spaced on a scale of perceived pitch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .errors import InputError

_Array = npt.NDArray[np.float64]

# The Slaney scale is linear up to 1000 Hz (15 mel) and logarithmic above, 27 mel for each factor 6.4.
_KNEE_HZ, _KNEE_MEL, _STEP = 1000.0, 15.0, np.log(6.4) / 27


def _htk_to_mel(hertz: _Array) -> _Array:
    return 2595.0 * np.log10(1.0 + hertz / 700.0)


def _htk_to_hertz(mel: _Array) -> _Array:
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


def _slaney_to_mel(hertz: _Array) -> _Array:
    above = _KNEE_MEL + np.log(np.maximum(hertz, _KNEE_HZ) / _KNEE_HZ) / _STEP
    return np.where(hertz < _KNEE_HZ, hertz * _KNEE_MEL / _KNEE_HZ, above)


def _slaney_to_hertz(mel: _Array) -> _Array:
    above = _KNEE_HZ * np.exp(_STEP * (np.maximum(mel, _KNEE_MEL) - _KNEE_MEL))
    return np.where(mel < _KNEE_MEL, mel * _KNEE_HZ / _KNEE_MEL, above)


_SCALES: dict[str, tuple[Callable[[_Array], _Array], Callable[[_Array], _Array]]] = {
    "htk": (_htk_to_mel, _htk_to_hertz),
    "slaney": (_slaney_to_mel, _slaney_to_hertz),
}


def mel_to_hertz(mel: npt.ArrayLike, scale: str = "htk") -> _Array:
    """Frequencies in Hz of positions on the scale "htk" or "slaney"."""
    return _scale(scale)[1](np.asarray(mel, dtype=np.float64))


def hertz_to_mel(hertz: npt.ArrayLike, scale: str = "htk") -> _Array:
    """Positions on the scale "htk" (2595 log10(1 + Hz / 700)) or "slaney" of frequencies in Hz."""
    return _scale(scale)[0](np.asarray(hertz, dtype=np.float64))


def _scale(scale: str) -> tuple[Callable[[_Array], _Array], Callable[[_Array], _Array]]:
    if scale not in _SCALES:
        raise InputError(f"scale must be htk or slaney, not {scale!r}")
    return _SCALES[scale]


def mel_filterbank(
    n_mels: int,
    n_fft: int,
    sample_rate: float,
    f_min: float = 0.0,
    f_max: float | None = None,
    scale: str = "htk",
    norm: str | None = None,
) -> npt.NDArray[np.float32]:
    """Weights [n_mels, n_fft // 2 + 1] that turn the spectrum of an `n_fft` sample window into mel bands.

    Row m is a triangle over Hz, 1 at its centre and 0 at the centres of its neighbours; the centres and the two ends
    are n_mels + 2 points evenly spaced on the scale from f_min to f_max (half the sample rate if None). `norm`: None
    leaves that height, "slaney" makes the area over Hz 1, "l1" makes each row sum to 1.

    Raises InputError for arguments that make no filterbank, also for a band so narrow that it holds no bin: its energy
    would always be 0.
    """
    f_max = sample_rate / 2 if f_max is None else f_max
    if n_mels < 1 or n_fft < 1:
        raise InputError(f"n_mels and n_fft must be at least 1, not {n_mels} and {n_fft}")
    if not 0 <= f_min < f_max <= sample_rate / 2:
        given = f"f_min={f_min}, f_max={f_max}, sample_rate={sample_rate}"
        raise InputError(f"0 <= f_min < f_max <= sample_rate / 2 must hold, not {given}")
    if norm not in (None, "slaney", "l1"):
        raise InputError(f"norm must be None, slaney or l1, not {norm!r}")
    low, high = hertz_to_mel([f_min, f_max], scale)
    points = mel_to_hertz(np.linspace(low, high, n_mels + 2), scale)
    bins = np.arange(n_fft // 2 + 1) * (sample_rate / n_fft)
    widths = np.diff(points)[:, None]
    rising = (bins - points[:-2, None]) / widths[:-1]
    falling = (points[2:, None] - bins) / widths[1:]
    weights = np.maximum(0.0, np.minimum(rising, falling))
    sums = weights.sum(axis=1, keepdims=True)
    if not sums.all():
        band = int(np.argmin(sums))
        raise InputError(
            f"band {band} of {n_mels} holds no bin of a {n_fft} sample window; ask fewer or a longer window"
        )
    if norm == "slaney":
        weights *= 2.0 / (points[2:] - points[:-2])[:, None]
    elif norm == "l1":
        weights /= sums
    return weights.astype(np.float32)
