"""How far a codec's sound is from the sound it was given: log-mel and STFT distances at several resolutions, SI-SDR.

All three do without a listener. The first two hear a wrong spectrum but not a wrong phase, SI-SDR hears little else, so
a codec that draws its phases anew (a vocoder's) has a low SI-SDR however well it sounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .mel import mel_filterbank

RESOLUTIONS = ((512, 40), (1024, 80), (2048, 128))  # window in samples, mel bands; the hop is a quarter of the window
_RANGE_DB = 60.0  # what is further below the clip's loudest band is equally silent
_SILENCE_DB = -120.0  # in any clip; a sine of amplitude 1 has 0 dB


class AnyCodec(Protocol):
    """What is needed of a codec: sound float32 [1, 1, S] to codes, and codes to sound of S samples or more."""

    @property
    def sample_rate(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, waveform: Tensor) -> Tensor: ...

    def decode(self, codes: Tensor) -> Tensor: ...


def reconstruction_error(codec: AnyCodec, waveforms: Sequence[Tensor | np.ndarray]) -> dict[str, float]:
    """Encode and decode sounds, and return the mean over them of three distances.

    waveforms: float [S], [1, S] or [1, 1, S] each, at codec.sample_rate; lengths may differ. The result has
    "log_mel_db" (see `log_mel_distance`, dB, 0 is best), "stft" (`stft_distance`, 0 is best) and "si_sdr" (`si_sdr`,
    dB, higher is better; sounds of digital silence are left out, NaN if there is no other). Raises InputError.
    """
    if len(waveforms) == 0:
        raise InputError("there must be a waveform")
    rows = []
    for waveform in waveforms:
        reference = torch.as_tensor(waveform, dtype=torch.float32).flatten()
        if reference.numel() != torch.as_tensor(waveform).shape[-1]:
            raise InputError(f"waveforms must be of one channel, [samples], not {list(np.shape(waveform))}")
        with torch.no_grad():
            decoded = codec.decode(codec.encode(reference[None, None].to(codec.device)))
        estimate = decoded[0, 0, : len(reference)].cpu()
        rows.append(
            {
                "log_mel_db": log_mel_distance(reference, estimate, codec.sample_rate),
                "stft": stft_distance(reference, estimate),
                "si_sdr": si_sdr(reference, estimate),
            }
        )
    result = {name: float(np.mean([row[name] for row in rows])) for name in ("log_mel_db", "stft")}
    ratios = [row["si_sdr"] for row in rows if not math.isnan(row["si_sdr"])]
    return result | {"si_sdr": float(np.mean(ratios)) if ratios else math.nan}


def log_mel_distance(reference: Tensor, estimate: Tensor, sample_rate: int) -> float:
    """Mean difference of the mel bands' levels in dB, over bands, frames and RESOLUTIONS. Both sounds are [S].

    Levels more than 60 dB below the reference's loudest count as equally low, so what nobody hears is no error. For a
    reference of digital silence the level that counts as silent is -120 dB.
    """
    total = 0.0
    for window, bands in RESOLUTIONS:
        bank = torch.from_numpy(mel_filterbank(bands, window, sample_rate, scale="slaney"))
        levels = [20 * (bank @ _magnitudes(sound, window)).clamp(min=1e-10).log10() for sound in (reference, estimate)]
        floor = max(float(levels[0].max()) - _RANGE_DB, _SILENCE_DB)
        total += float((levels[0].clamp(min=floor) - levels[1].clamp(min=floor)).abs().mean())
    return total / len(RESOLUTIONS)


def stft_distance(reference: Tensor, estimate: Tensor) -> float:
    """Spectral convergence plus log-magnitude distance, the mean over RESOLUTIONS (Yamamoto et al. 2020). Sounds [S].

        |A - B|_F / |A|_F + mean |ln A - ln B|,   A, B the magnitudes of reference and estimate

    with magnitudes 60 dB below the reference's largest, or at -120 dB, as the smallest there are.
    """
    total = 0.0
    for window, _ in RESOLUTIONS:
        a, b = _magnitudes(reference, window), _magnitudes(estimate, window)
        floor = max(float(a.max()) * 10 ** (-_RANGE_DB / 20), 10 ** (_SILENCE_DB / 20))
        a, b = a.clamp(min=floor), b.clamp(min=floor)
        total += float((a - b).norm() / a.norm() + (a.log() - b.log()).abs().mean())
    return total / len(RESOLUTIONS)


def si_sdr(reference: Tensor, estimate: Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), at most 100. Sounds [S].

    The part of the estimate that is a multiple of the reference, to the rest; means are removed first. -100 for an
    estimate that has nothing of the reference, NaN for a constant reference, of which no multiple says anything.
    """
    a, b = reference.double() - reference.double().mean(), estimate.double() - estimate.double().mean()
    power = float(a @ a)
    if power < 1e-12 * len(a):
        return math.nan
    target = a * (float(a @ b) / power)
    kept, rest = float(target @ target), float((b - target) @ (b - target))
    if kept <= 1e-10 * rest:
        return -100.0
    return 100.0 if rest <= 1e-10 * kept else 10 * math.log10(kept / rest)


def _magnitudes(sound: Tensor, window: int) -> Tensor:
    """Magnitude spectrum [bins, frames], in which a sine of amplitude 1 has a peak of 1."""
    hann = torch.hann_window(window)
    sound = torch.nn.functional.pad(sound, (0, max(0, window - len(sound))))  # the ends are reflected: needs half of it
    return torch.stft(sound, window, window // 4, window=hann * (2 / hann.sum()), return_complex=True).abs()
