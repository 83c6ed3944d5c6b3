"""A codec that needs no GPU to train: residual vector quantisation of log-mel frames, phases found at the end.

A frame is `steps_per_frame` short spectra side by side, as log-mel energies. The quantiser is DAC's in shape: each
codebook projects what is left of the frame to a few values, takes the nearest code and projects back. Here the nearest
is meant in Euclid's sense and everything is fitted by PCA and k-means (spectral_training.py). The first codebooks carry
the spectral envelope and how loud it is, the later ones details. Codes carry no phase: decoding spreads the mel bands
over the Fourier bins and finds phases by fast Griffin-Lim, so noises come back as they were and clicks a little soft.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .mel import mel_filterbank

MODEL_TYPE = "siren-spectral"
_UNMIX_STEPS = 30  # multiplicative updates that spread mel bands over Fourier bins
_MOMENTUM = 0.99  # of fast Griffin-Lim


@dataclass(frozen=True)
class SpectralConfig:
    """Sizes of a spectral codec. `floor` is the power added before the logarithm; a full-scale sine has power 1."""

    sampling_rate: int = 16000
    steps_per_frame: int = 2
    step: int = 160
    window: int = 1024
    n_mels: int = 80
    n_codebooks: int = 12
    codebook_size: int = 1024
    codebook_dim: int = 16
    floor: float = 1e-7
    phase_iterations: int = 32

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        return self.steps_per_frame * self.step

    @property
    def features(self) -> int:
        """Values of a frame, the width of the quantiser's input."""
        return self.steps_per_frame * self.n_mels

    def to_dict(self) -> dict[str, Any]:
        """As JSON in a codec folder's config."""
        return {"model_type": MODEL_TYPE, **asdict(self)}


class Encoded(NamedTuple):
    """What `encode` gives, named as in transformers' DacModel: codes [1, n_codebooks, T]."""

    audio_codes: Tensor


class Decoded(NamedTuple):
    """What `decode` gives, named as in transformers' DacModel: sound [1, hop_length * T]."""

    audio_values: Tensor


class Codebook(nn.Module):
    """One stage of the quantiser, its tensors named as DAC's."""

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.codebook = nn.Embedding.from_pretrained(torch.zeros(config.codebook_size, config.codebook_dim))
        self.in_proj = nn.Conv1d(config.features, config.codebook_dim, 1)
        self.out_proj = nn.Conv1d(config.codebook_dim, config.features, 1)

    def nearest(self, residual: Tensor) -> Tensor:
        """residual [T, features] -> codes [T]."""
        return nearest(self.in_proj(residual.T).T, self.codebook.weight)

    def look_up(self, codes: Tensor) -> Tensor:
        """codes [T] -> their part of the frames [T, features]."""
        found: Tensor = self.out_proj(self.codebook(codes).T).T
        return found


class Quantizer(nn.Module):
    """All stages, in order."""

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(Codebook(config) for _ in range(config.n_codebooks))


class SpectralModel(nn.Module):
    """The codec's arithmetic. It answers as transformers' DacModel does, so that `siren.Codec` holds either."""

    mean: Tensor
    filterbank: Tensor

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer = Quantizer(config)
        self.register_buffer("mean", torch.zeros(config.features))
        filterbank = torch.from_numpy(mel_filterbank(config.n_mels, config.window, config.sampling_rate))
        self.register_buffer("filterbank", filterbank, persistent=False)

    def encode(self, waveform: Tensor) -> Encoded:
        """Sound [1, 1, S], S a multiple of hop_length -> codes."""
        residual = self.frames(waveform[0, 0]) - self.mean
        codes = []
        for stage in self.quantizer.quantizers:
            codes.append(stage.nearest(residual))  # type: ignore[operator]
            residual = residual - stage.look_up(codes[-1])  # type: ignore[operator]
        return Encoded(torch.stack(codes)[None])

    def decode(self, audio_codes: Tensor) -> Decoded:
        """Codes [1, n_codebooks, T] -> sound."""
        stages = zip(self.quantizer.quantizers, audio_codes[0], strict=True)
        frames = self.mean + sum(stage.look_up(codes) for stage, codes in stages)  # type: ignore[operator]
        return Decoded(self.sound(frames)[None])

    def frames(self, waveform: Tensor) -> Tensor:
        """Sound [S], S a multiple of hop_length -> log-mel frames [T, features], the steps of a frame side by side."""
        c = self.config
        side = (c.window - c.step) // 2  # step t is in the middle of its window
        window = torch.hann_window(c.window, device=waveform.device)
        padded = nn.functional.pad(waveform, (side, side))
        spectrum = torch.stft(padded, c.window, c.step, window=window, center=False, return_complex=True)
        power = (spectrum.abs() * (2 / window.sum())).square()
        return torch.log(self.filterbank @ power + c.floor).T.reshape(-1, c.features)

    def sound(self, frames: Tensor) -> Tensor:
        """Log-mel frames [T, features] -> sound [hop_length * T] within -1..1. The same frames give the same sound."""
        c = self.config
        mel = frames.reshape(-1, c.n_mels).T.exp()
        # Quantised silence is not quite the floor; within a factor of 2 of it there is none to be heard.
        mel = torch.where(mel > 2 * c.floor, mel - c.floor, 0)
        window = torch.hann_window(c.window, device=frames.device)
        magnitude = _unmix(mel, self.filterbank).sqrt() * (window.sum() / 2)
        side = (c.window - c.step) // 2
        sound = _find_phases(magnitude, window, c.step, c.phase_iterations)[side:-side]
        return sound / sound.abs().max().clamp(min=1)  # codes that were drawn can be too loud: turned down, not clipped


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre [V, n] of each point [T, n], the lowest on a tie; memory stays bounded."""
    half = centres.square().sum(dim=1) / 2
    return torch.cat([torch.argmin(half - part @ centres.T, dim=1) for part in points.split(8192)])


def _unmix(mel: Tensor, filterbank: Tensor) -> Tensor:
    """Power of each Fourier bin [bins, steps], non-negative, whose mel bands are close to `mel` [n_mels, steps]."""
    tiny = 1e-12
    power = filterbank.T @ (mel / filterbank.sum(dim=1, keepdim=True)) + tiny
    wanted = filterbank.T @ mel
    for _ in range(_UNMIX_STEPS):
        power = power * wanted / (filterbank.T @ (filterbank @ power) + tiny)
    return power


def _find_phases(magnitude: Tensor, window: Tensor, step: int, iterations: int) -> Tensor:
    """Sound whose spectrum has nearly these magnitudes [bins, steps]: fast Griffin-Lim from fixed random phases.

    Step by step in memory, so that each Fourier transform reads and writes one run of it.
    """
    length, steps = window.numel(), magnitude.shape[1]
    magnitude = magnitude.T.contiguous()
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(magnitude.shape, generator=generator).to(magnitude.device) * (2 * torch.pi)
    wanted = torch.polar(magnitude, angle)

    def overlap_add(rows: Tensor) -> Tensor:
        total = rows.new_zeros(steps + -(-length // step) - 1, step)
        for i, piece in enumerate(rows.split(step, dim=1)):
            total[i : i + steps, : piece.shape[1]] += piece
        return total.flatten()[: (steps - 1) * step + length]

    weight = 1 / overlap_add(window.square().expand(steps, length)).clamp(min=1e-3)
    moved = torch.zeros(*wanted.shape, 2, device=magnitude.device)  # complex numbers as pairs: their abs and / are slow
    for _ in range(iterations):
        sound = overlap_add(torch.fft.irfft(wanted, length) * window) * weight
        spectrum = torch.view_as_real(torch.fft.rfft(sound.unfold(0, length, step) * window))
        moved.mul_(-_MOMENTUM).add_(spectrum, alpha=1 + _MOMENTUM)  # spectrum + momentum (spectrum - previous)
        scale = moved[..., 0].square().addcmul_(moved[..., 1], moved[..., 1]).add_(1e-18).rsqrt_() * magnitude
        torch.mul(moved, scale[..., None], out=torch.view_as_real(wanted))
        moved = spectrum
    return overlap_add(torch.fft.irfft(wanted, length) * window) * weight
