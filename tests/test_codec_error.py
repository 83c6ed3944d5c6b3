"""Distances between sounds have the values that can be worked out, and hear what they should and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from siren.codec import Codec
from siren.codec_error import log_mel_distance, reconstruction_error, si_sdr, stft_distance
from siren.errors import InputError

RATE = 16000


class FakeCodec:
    """Its codes are the samples, so that what it makes of a sound is `change` of it, filled up to whole frames."""

    sample_rate = RATE
    device = torch.device("cpu")

    def __init__(self, change=lambda sound: sound) -> None:
        self.change = change

    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        assert waveform.dim() == 3 and waveform.dtype == torch.float32
        return torch.nn.functional.pad(waveform, (0, -waveform.shape[-1] % 320))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.change(codes)


def noise(samples: int = RATE, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def test_a_perfect_codec_has_no_error() -> None:
    assert reconstruction_error(FakeCodec(), [noise(), noise(4321)]) == {"log_mel_db": 0, "stft": 0, "si_sdr": 100}


@pytest.mark.parametrize("gain", [2.0, 0.1, -1.0])
def test_a_gain_is_heard_as_so_many_decibels_and_is_no_distortion(gain: float) -> None:
    result = reconstruction_error(FakeCodec(lambda sound: gain * sound), [noise()])
    assert result["log_mel_db"] == pytest.approx(abs(20 * math.log10(abs(gain))), rel=0.01, abs=1e-6)
    assert result["stft"] == pytest.approx(abs(abs(gain) - 1) + abs(math.log(abs(gain))), rel=0.01, abs=1e-6)
    assert result["si_sdr"] == 100


@pytest.mark.parametrize("decibels", [-10.0, 0.0, 20.0, 60.0])
def test_si_sdr_is_the_ratio_to_noise_that_was_added(decibels: float) -> None:
    sound, other = noise(seed=1).double(), noise(seed=2).double()
    sound, other = sound - sound.mean(), other - other.mean()
    other -= sound * (sound @ other) / (sound @ sound)
    other *= (sound.norm() / other.norm()) * 10 ** (-decibels / 20)
    assert si_sdr(sound, 0.3 * (sound + other) + 0.2) == pytest.approx(decibels, abs=1e-6)


def test_every_distance_grows_with_the_noise() -> None:
    errors = [
        reconstruction_error(FakeCodec(lambda sound, level=level: sound + level * noise(16000, 5)), [noise()])
        for level in (0.03, 0.3, 3.0)
    ]
    for name, sign in (("log_mel_db", 1), ("stft", 1), ("si_sdr", -1)):
        values = [sign * error[name] for error in errors]
        assert values == sorted(values) and values[0] < values[1] < values[2], name


def test_a_shifted_tone_sounds_the_same_but_its_samples_differ() -> None:
    angle = torch.arange(RATE) * (2 * math.pi * 440 / RATE)
    fade = torch.hann_window(RATE)  # without a start and an end, which depend on the phase
    tone, shifted, other = fade * angle.sin(), fade * angle.cos(), fade * (angle * 1.3).sin()
    assert log_mel_distance(tone, shifted, RATE) < 0.2 * log_mel_distance(tone, other, RATE)
    assert stft_distance(tone, shifted) < 0.2 * stft_distance(tone, other)
    assert si_sdr(tone, shifted) < -30


def test_what_is_60_db_below_is_not_heard_wherever_the_level() -> None:
    """The same at any loudness; noise at -40 dB in the silence after a sound counts, at -90 dB it does not."""
    sound = noise()
    sound[RATE // 2 :] = 0
    for level in (1.0, 0.2):
        assert log_mel_distance(level * sound, level * (sound + 1e-4 * noise(seed=3)), RATE) < 0.02
        assert stft_distance(level * sound, level * (sound + 1e-4 * noise(seed=3))) < 0.02
        audible = log_mel_distance(level * sound, level * (sound + 1e-1 * noise(seed=3)), RATE)
        assert audible > 5
        assert audible == pytest.approx(log_mel_distance(sound, sound + 1e-1 * noise(seed=3), RATE), rel=1e-3)


def test_silence_has_no_sdr_but_hiss_in_it_is_an_error() -> None:
    silence = np.zeros(5000, dtype=np.float32)
    hissing = FakeCodec(lambda sound: sound + 0.01 * noise(sound.shape[-1]))
    quiet, hiss = reconstruction_error(FakeCodec(), [silence]), reconstruction_error(hissing, [silence])
    assert quiet["log_mel_db"] == quiet["stft"] == 0
    assert hiss["log_mel_db"] > 5 and hiss["stft"] > 1
    assert math.isnan(quiet["si_sdr"]) and math.isnan(hiss["si_sdr"])
    assert reconstruction_error(FakeCodec(), [silence, noise()])["si_sdr"] == 100
    assert si_sdr(noise(), torch.zeros(RATE)) == -100


@pytest.mark.parametrize("samples", [1, 7, 320, 1000, 2049])
def test_any_length_and_shape_will_do(samples: int) -> None:
    sound = noise(samples).numpy() + 0.1 * np.arange(samples, dtype=np.float64) / samples
    for shaped in (sound, sound[None], torch.from_numpy(sound)[None, None]):
        result = reconstruction_error(FakeCodec(), [shaped])
        assert result["log_mel_db"] == result["stft"] == 0
        assert samples == 1 or result["si_sdr"] == 100


def test_the_mean_is_over_sounds_however_long() -> None:
    half = FakeCodec(lambda sound: sound * (0.5 if sound.shape[-1] < RATE else 1.0))
    result = reconstruction_error(half, [noise(3200), noise(2 * RATE)])
    assert result["log_mel_db"] == pytest.approx(20 * math.log10(2) / 2, rel=0.01)


def test_what_is_no_list_of_sounds_is_refused() -> None:
    with pytest.raises(InputError, match="must be a waveform"):
        reconstruction_error(FakeCodec(), [])
    with pytest.raises(InputError, match=r"one channel.*\[2, 8000\]"):
        reconstruction_error(FakeCodec(), [np.zeros((2, 8000))])


def test_a_real_codec_of_random_weights_is_far_off() -> None:
    pytest.importorskip("transformers")
    codec = Codec.from_descript(Path(__file__).parent / "data" / "descript-dac-small" / "weights_16khz_small.pth")
    result = reconstruction_error(codec, [noise(4000), noise(777, 1)])
    assert result["log_mel_db"] > 3 and result["stft"] > 0.5 and result["si_sdr"] < 5
