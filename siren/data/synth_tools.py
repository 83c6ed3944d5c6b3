"""Building blocks of procedural sound: coloured noise, tones, resonators, grains and rooms. numpy and scipy, 16 kHz.

Lengths are in samples unless a name says seconds; signals are float64 [samples].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import MissingDependencyError

try:
    from scipy import fft, signal
except ImportError as error:
    raise MissingDependencyError("scipy is not installed (or does not import): pip install 'siren[data]'") from error

RATE = 16000  # Hz
Rng = np.random.Generator
Signal = npt.NDArray[np.float64]


class Event(NamedTuple):
    """A sound and what is true of it: captions[0] describes it, captions[1] just names it, more may follow.

    Both are phrases without a verb form of their own ("a dog barking"), so that scenes can join them.
    """

    wave: Signal
    captions: list[str]


Synthesizer = Callable[[Rng, int], Event]


def pick(rng: Rng, choices: Sequence[Any]) -> Any:
    """One of the choices, as it is (Generator.choice would turn strings and tuples into arrays)."""
    return choices[int(rng.integers(len(choices)))]


def log_uniform(rng: Rng, low: float, high: float) -> float:
    """A number whose logarithm is uniform: for frequencies and durations."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def seconds(value: float) -> int:
    """Samples in so many seconds, at least one."""
    return max(1, round(value * RATE))


def shaped_noise(rng: Rng, n: int, frequencies: Sequence[float], decibels: Sequence[float]) -> Signal:
    """Gaussian noise whose spectrum runs through the given points, straight over log frequency; RMS 1."""
    size = fft.next_fast_len(n, real=True)
    bins = np.fft.rfftfreq(size, 1 / RATE)
    bins[0] = bins[1]
    gains = 10 ** (np.interp(np.log(bins), np.log(frequencies), decibels) / 20)
    spectrum = rng.standard_normal((2, len(bins)))
    wave = fft.irfft((spectrum[0] + 1j * spectrum[1]) * gains, size)[:n]
    return wave / max(float(np.sqrt(np.mean(wave * wave))), 1e-9)


def band_noise(rng: Rng, n: int, low: float, high: float, skirt: float = 40.0) -> Signal:
    """Noise between two frequencies that falls by `skirt` dB within an octave outside of them; RMS 1."""
    return shaped_noise(rng, n, [low / 4, low / 2, low, high, 2 * high], [-2 * skirt, -skirt, 0, 0, -skirt])


def wander(rng: Rng, n: int, rate: float, low: float = 0.0, high: float = 1.0) -> Signal:
    """A slow random curve between two values, with about `rate` turns a second."""
    count = int(n / RATE * rate) + 4
    points = rng.uniform(low, high, count)
    position = np.arange(n) * (rate / RATE) + rng.uniform()
    index = position.astype(np.int64)
    blend = position - index
    blend = blend * blend * (3 - 2 * blend)  # no corners
    return points[index] * (1 - blend) + points[index + 1] * blend


def glide(n: int, times: Sequence[float], values: Sequence[float]) -> Signal:
    """A curve through (time, value), times as fractions of n; smooth at the points, so fit for pitch."""
    t = np.arange(n) / max(n - 1, 1)
    index = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
    start, stop = np.asarray(times)[index], np.asarray(times)[index + 1]
    blend = np.clip((t - start) / np.maximum(stop - start, 1e-9), 0, 1)
    blend = blend * blend * (3 - 2 * blend)
    points = np.asarray(values, dtype=np.float64)
    return points[index] * (1 - blend) + points[index + 1] * blend


def sine(frequency: Signal | float, n: int, phase: float = 0.0) -> Signal:
    """A sine whose frequency in Hz may change."""
    return np.sin(2 * np.pi * (_cycles(frequency, n) + phase))


def tone(frequency: Signal | float, n: int, harmonics: Sequence[float] | Signal, phase: float = 0.0) -> Signal:
    """A periodic wave from the amplitudes of its harmonics; those above 7.6 kHz at its highest pitch are left out."""
    amplitudes = np.asarray(harmonics, dtype=np.float64)
    amplitudes = amplitudes[: max(1, int(7600 / float(np.max(frequency))))]
    spectrum = np.zeros(1025, dtype=np.complex128)
    # Quadratic phases spread the harmonics' energy over the period: no huge peak from a rich spectrum.
    order = np.arange(1, len(amplitudes) + 1)
    spectrum[1 : len(amplitudes) + 1] = amplitudes * np.exp(1j * np.pi * order * order / max(len(order), 1))
    table = np.fft.irfft(spectrum) * 1024
    table = np.append(table, table[0])
    position = ((_cycles(frequency, n) + phase) % 1.0) * 2048
    index = position.astype(np.int64)
    blend = position - index
    return table[index] * (1 - blend) + table[index + 1] * blend


def _cycles(frequency: Signal | float, n: int) -> Signal:
    if isinstance(frequency, np.ndarray):
        return np.cumsum(frequency / RATE)
    return np.arange(n, dtype=np.float64) * (float(frequency) / RATE)


def decay(n: int, t60: float, attack: float = 0.0) -> Signal:
    """An envelope that rises in `attack` seconds and falls by 60 dB in `t60` seconds."""
    t = np.arange(n) / RATE
    envelope = np.exp(-6.908 * t / t60)
    return envelope * np.minimum(t / attack, 1.0) if attack > 0 else envelope


def fade(wave: Signal, rise: float = 0.005, fall: float = 0.01) -> Signal:
    """The wave with its two ends faded, in seconds."""
    n = len(wave)
    up, down = min(seconds(rise), n // 2), min(seconds(fall), n // 2)
    wave = wave.copy()
    wave[:up] *= np.linspace(0, 1, up, endpoint=False)
    if down:
        wave[n - down :] *= np.linspace(1, 0, down)
    return wave


def resonate(wave: Signal, frequencies: Iterable[float], t60s: Iterable[float], gains: Iterable[float]) -> Signal:
    """Modal synthesis: the wave through parallel two-pole resonators; each rings at its frequency for its t60."""
    out = np.zeros_like(wave)
    for frequency, t60, gain in zip(frequencies, t60s, gains, strict=True):
        if not 20 < frequency < 7800:
            continue
        angle, radius = 2 * np.pi * frequency / RATE, np.exp(-6.908 / (t60 * RATE))
        numerator = [0.0, gain * np.sin(angle)]
        out += signal.lfilter(numerator, [1.0, -2 * radius * np.cos(angle), radius * radius], wave)
    return out


def formants(wave: Signal, centres: Sequence[float], widths: Sequence[float], gains: Sequence[float]) -> Signal:
    """A vocal tract: parallel resonators of unit peak gain, widths in Hz."""
    t60s = [6.908 / (np.pi * width) for width in widths]
    scaled = [gain * 2 * np.pi * width / RATE for gain, width in zip(gains, widths, strict=True)]
    return resonate(wave, centres, t60s, scaled)


def lowpass(wave: Signal, cutoff: float, order: int = 2) -> Signal:
    """Butterworth low-pass."""
    return signal.sosfilt(signal.butter(order, min(cutoff, 7900.0), fs=RATE, output="sos"), wave)


def highpass(wave: Signal, cutoff: float, order: int = 2) -> Signal:
    """Butterworth high-pass."""
    return signal.sosfilt(signal.butter(order, cutoff, "highpass", fs=RATE, output="sos"), wave)


def impulses(rng: Rng, n: int, rate: float, spread: float = 0.8) -> Signal:
    """Random clicks, `rate` a second on average, whose sizes are log-normal with that spread."""
    out = np.zeros(n)
    count = int(rng.poisson(rate * n / RATE))
    np.add.at(out, rng.integers(n, size=count), rng.lognormal(0.0, spread, count) * rng.choice([-1.0, 1.0], count))
    return out


def click(rng: Rng, length: float, low: float, high: float) -> Signal:
    """A burst of noise between two frequencies that dies within `length` seconds."""
    n = max(seconds(length), 64)
    return band_noise(rng, n, low, high) * decay(n, length, 0.0003)


def add(out: Signal, wave: Signal, start: int, gain: float = 1.0) -> None:
    """Mix `wave` into `out` from sample `start`; what does not fit is left out."""
    if 0 <= start < len(out):
        stop = min(start + len(wave), len(out))
        out[start:stop] += gain * wave[: stop - start]


def times(rng: Rng, n: int, period: float, jitter: float = 0.05, first: float | None = None) -> list[int]:
    """Starts of a rhythm: `period` seconds apart, each shifted by up to `jitter` periods; the first within one."""
    start = rng.uniform(0.02, min(period, 0.6)) if first is None else first
    count = int((n / RATE - start) / period) + 1
    shifts = rng.uniform(-jitter, jitter, max(count, 1)) * period
    starts = [seconds(max(start + i * period + shift, 0.0)) for i, shift in enumerate(shifts)]
    return [start for start in starts if start < n - 320] or [0]


def reverb(rng: Rng, wave: Signal, t60: float, wet: float, cutoff: float = 4000.0, delay: float = 0.01) -> Signal:
    """The wave in a room: exponentially decaying low-passed noise after `delay` seconds, of `wet` times its energy."""
    size = min(seconds(t60), len(wave))
    tail = lowpass(rng.standard_normal(size), cutoff) * decay(size, t60, 0.002)
    tail *= wet / np.sqrt(np.sum(tail * tail))
    late = signal.oaconvolve(wave, tail)[: len(wave)]
    out = wave.copy()
    gap = seconds(delay)
    out[gap:] += late[: max(len(wave) - gap, 0)]
    return out


def normalise(wave: Signal) -> Signal:
    """The wave at peak 1; silence stays silence."""
    return wave / max(float(np.max(np.abs(wave))), 1e-9)


def hit(rng: Rng, length: float, base: float, ratios: Sequence[float], t60: float, hardness: float) -> Signal:
    """A struck object: modes at `ratios` of `base`, higher ones dying sooner; `hardness` 0..1 brightens the blow."""
    n = seconds(length)
    blow = np.zeros(n)
    width = max(2, seconds(0.004 * (1 - hardness)))
    blow[: min(width, n)] = np.hanning(width + 2)[1 : min(width, n) + 1] / width * 4
    blow[: min(n, 64)] += 0.3 * hardness * rng.standard_normal(min(n, 64)) * decay(min(n, 64), 0.004)
    spread = np.asarray(ratios) * rng.uniform(0.96, 1.04, len(ratios))
    gains = rng.uniform(0.5, 1.0, len(ratios)) / spread ** (0.6 * (1 - hardness))
    return normalise(resonate(blow, base * spread, t60 / spread**0.5, gains))


WOOD = (1.0, 1.62, 2.4, 3.3, 4.6, 6.1)  # modes of a board
METAL = (1.0, 1.51, 2.13, 2.76, 3.62, 4.43, 5.4, 6.7)
