"""A picture of a sound: its waveform above its mel spectrogram, as PNG bytes.

matplotlib is used without pyplot: no global state, no window system, safe in threads.
"""

from __future__ import annotations

import io
import textwrap
import warnings

import numpy as np
import numpy.typing as npt

from .errors import MissingDependencyError
from .mel import hertz_to_mel, mel_to_hertz

_WINDOW = 1024  # samples
_COLUMNS = 1200  # about as many spectra as the picture has pixels for
_BANDS = 128
_RANGE_DB = 80.0  # quieter than this below the loudest is drawn as silence
_TICKS = (0, 125, 250, 500, 1000, 2000, 4000, 8000, 16000)  # Hz


def mel_spectrogram(wave: npt.NDArray[np.float32], sample_rate: int, hop: int) -> npt.NDArray[np.float64]:
    """Power of each mel band in dB below the loudest, [128, ceil(samples / hop)], not below -80.

    Column i is a Hann window of 1024 samples centred on sample i * hop. The bands are triangles evenly spaced on the
    scale mel = 2595 log10(1 + Hz / 700), from 0 to half the sample rate.
    """
    padded = np.pad(wave.astype(np.float64), _WINDOW // 2)
    starts = np.arange(0, len(wave), hop)
    window = np.hanning(_WINDOW + 1)[:-1]
    power = np.stack([np.abs(np.fft.rfft(window * padded[s : s + _WINDOW])) ** 2 for s in starts], axis=1)
    edges = mel_to_hertz(np.linspace(0, _mel(sample_rate / 2), _BANDS + 2))
    bins = np.linspace(0, sample_rate / 2, _WINDOW // 2 + 1)
    # Low bands are narrower than one bin: widening each to a bin on either side keeps them from being empty.
    width = np.maximum(np.diff(edges), bins[1])
    up = (bins - edges[1:-1, None]) / width[:-1, None] + 1
    down = (edges[1:-1, None] - bins) / width[1:, None] + 1
    bands = np.clip(np.minimum(up, down), 0, None) @ power
    decibels: npt.NDArray[np.float64] = 10 * np.log10(np.maximum(bands, 1e-10))
    return np.asarray(np.maximum(decibels - max(decibels.max(), -20.0), -_RANGE_DB))


def _mel(hertz: float) -> float:
    return float(hertz_to_mel(hertz))


def draw_picture(wave: npt.NDArray[np.float32], sample_rate: int, title: str) -> bytes:
    """PNG of a mono clip [samples]. Raises MissingDependencyError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("pictures need matplotlib: pip install 'siren[pictures]'") from error
    seconds = len(wave) / sample_rate
    hop = max(1, len(wave) // _COLUMNS)
    figure = Figure(figsize=(10, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))

    columns = wave[: len(wave) // hop * hop].reshape(-1, hop)  # the extremes of each column, so that no peak is lost
    times = (np.arange(len(columns)) + 0.5) * hop / sample_rate
    top.fill_between(times, columns.min(axis=1), columns.max(axis=1), color="#3b528b", linewidth=0.6)
    top.axhline(0, color="#3b528b", linewidth=0.5)
    peak = max(0.01, 1.05 * float(np.abs(wave).max()))
    top.set_ylim(-peak, peak)
    top.set_ylabel("amplitude")
    top.tick_params(labelbottom=False)
    top.spines[["top", "right"]].set_visible(False)
    title = title.replace("$", r"\$")  # else matplotlib reads mathematics between two of them
    top.set_title("\n".join(textwrap.wrap(title, 100, max_lines=2, placeholder=" ...")), loc="left", fontsize=12)

    height = _mel(sample_rate / 2)
    image = bottom.imshow(
        mel_spectrogram(wave, sample_rate, hop),
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-_RANGE_DB,
        vmax=0,
        extent=(0, seconds, 0, height),
    )
    ticks = [tick for tick in _TICKS if tick <= sample_rate / 2]
    labels = [f"{tick // 1000}k" if tick >= 1000 else str(tick) for tick in ticks]
    bottom.set_yticks([_mel(tick) for tick in ticks], labels)
    bottom.set_xlim(0, seconds)
    bottom.set_ylabel("frequency (Hz)")
    bottom.set_xlabel("time (s)")
    figure.colorbar(image, ax=bottom, label="dB below the loudest", pad=0.01, fraction=0.05)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a title in a script that the font lacks shows boxes
        figure.savefig(file, format="png")
    return file.getvalue()
