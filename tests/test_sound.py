"""Reading sound: what a file becomes, which files are refused and why, what counts as activity, and the segments."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.data.sound import MIN_SECONDS, MIN_SNR, SAMPLE_RATE, activity_snr, read_sound, segments
from siren.errors import DataError, InputError


def noise(seconds: float, level: float, seed: int = 0) -> np.ndarray:
    """White noise of `level` dBFS at 16 kHz."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))
    return (samples * 10 ** (level / 20)).astype(np.float32)


def tone(seconds: float, level: float, rate: int = SAMPLE_RATE, frequency: float = 440.0) -> np.ndarray:
    """A sine of `level` dBFS (its power, so -3 dBFS is the loudest that fits)."""
    time = np.arange(round(seconds * rate)) / rate
    return (math.sqrt(2) * 10 ** (level / 20) * np.sin(2 * math.pi * frequency * time)).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "caf"])
@pytest.mark.parametrize(("rate", "channels"), [(44100, 2), (16000, 1), (8000, 1)])
def test_any_file_becomes_mono_at_16_khz(tmp_path: Path, suffix: str, rate: int, channels: int) -> None:
    """The tone is still there, at its level and frequency, whatever the format, rate and channels."""
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack([tone(1.01, -20, rate)] * channels, 1), rate)
    sound = read_sound(path)
    assert sound.dtype == np.float32 and sound.ndim == 1
    assert abs(len(sound) / SAMPLE_RATE - 1.01) < 0.08  # lossy formats add some milliseconds
    middle = sound[4000:12000]
    assert abs(10 * math.log10((middle**2).mean()) + 20) < 0.5
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(spectrum.argmax() * SAMPLE_RATE / len(middle) - 440) <= 2


def test_reading_in_blocks_is_soxr_of_the_whole(tmp_path: Path) -> None:
    """Long files are read and resampled in blocks; the seams are not there. Channels are averaged."""
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, (600_001, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 44100, subtype="FLOAT")
    mono = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(read_sound(tmp_path / "a.wav"), soxr.resample(mono, 44100, SAMPLE_RATE))


def test_a_sound_outside_the_range_is_turned_down_as_a_whole(tmp_path: Path) -> None:
    sound = noise(0.5, 10)
    soundfile.write(tmp_path / "loud.wav", sound, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_sound(tmp_path / "loud.wav"), sound / np.abs(sound).max(), rtol=1e-6)


def test_files_that_are_no_sound_are_refused_with_a_reason(tmp_path: Path) -> None:
    """Each is a DataError of one line that names the file."""
    good = tmp_path / "good.flac"
    soundfile.write(good, tone(2, -20), SAMPLE_RATE)
    mp3 = tmp_path / "cut.mp3"
    soundfile.write(mp3, tone(4, -20), SAMPLE_RATE)
    mp3.write_bytes(mp3.read_bytes()[: mp3.stat().st_size // 2])
    (tmp_path / "cut.flac").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "junk.wav").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "junk.au").write_bytes(bytes(range(256)) * 20)  # libsndfile reads it as raw mu-law, by its suffix
    (tmp_path / "samples.raw").write_bytes(b"\0" * 4000)
    soundfile.write(tmp_path / "no_frames.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    for name, value in (("nan", np.nan), ("infinity", -np.inf)):
        broken = tone(1, -20, 22050)
        broken[777] = value
        soundfile.write(tmp_path / f"{name}.wav", broken, 22050, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    wanted = {
        "cut.mp3": "cut off",
        "cut.flac": "cannot be read",
        "empty.wav": "cannot be read",
        "junk.wav": "cannot be read",
        "junk.au": "no header",
        "samples.raw": "cannot be read",
        "no_frames.wav": "is empty",
        "nan.wav": "NaN",
        "infinity.wav": "NaN or infinity",
        "folder.wav": "no such file",
        "pipe.wav": "no such file",
        "missing.wav": "no such file",
    }
    for name, reason in wanted.items():
        with pytest.raises(DataError, match=reason) as caught:
            read_sound(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_long_files_and_mad_headers_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(4 * 8000, np.float32), 8000)
    assert len(read_sound(path, max_seconds=4)) == 4 * SAMPLE_RATE
    with pytest.raises(DataError, match=r"4 s long; the limit is 3.9 s"):
        read_sound(path, max_seconds=3.9)
    data = bytearray(path.read_bytes())
    for rate in (1, 2**31 - 1):
        data[24:28] = struct.pack("<I", rate)
        path.write_bytes(data)
        with pytest.raises(DataError, match="Hz"):
            read_sound(path)


@pytest.mark.parametrize("noise_level", [-90.0, -75.0, -63.0])
@pytest.mark.parametrize("snr", [0.0, 3.0, 6.0, 12.0, 30.0])
@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_snr_of_an_event_in_noise(noise_level: float, snr: float, seconds: float) -> None:
    """A tone of known SNR in noise of known level is measured within 1.2 dB; near 0 dB the noise's own rise counts."""
    sound = noise(10, noise_level)
    start, event = 52_345, tone(seconds, noise_level + snr)
    sound[start : start + len(event)] += event
    measured = activity_snr(sound, SAMPLE_RATE)
    assert abs(measured - snr) < (1.2 if snr else 2.0)
    louder = activity_snr(sound * 100, SAMPLE_RATE, noise_ceiling=math.inf)  # the plain SNR knows no level
    assert abs(louder - measured) < 0.01


def test_steady_sound_is_no_silence() -> None:
    """Rain, a hum or an engine pass at any level that can be heard; the plain SNR would drop each of them."""
    rng = np.random.default_rng(3)
    rain = noise(10, -45, 4)
    hum = tone(10, -50, frequency=50)
    engine = np.convolve(noise(10, -20, 5), np.ones(40) / 40, "same").astype(np.float32)
    for sound in (rain, hum, engine, rain[: round(0.2 * SAMPLE_RATE)]):
        assert activity_snr(sound, SAMPLE_RATE) > MIN_SNR
        assert activity_snr(sound, SAMPLE_RATE, noise_ceiling=math.inf) < MIN_SNR
    recorder = noise(10, -70, 6) + tone(10, -75, frequency=50)
    dither = (rng.integers(-1, 2, 160_000) / 32768).astype(np.float32)
    for silence in (recorder, dither, recorder + np.float32(0.3)):
        assert activity_snr(silence, SAMPLE_RATE) < MIN_SNR
    for silence in (np.zeros(16_000, np.float32), np.full(16_000, 0.5, np.float32), np.zeros(0, np.float32)):
        assert activity_snr(silence, SAMPLE_RATE) == -math.inf


def test_a_click_in_silence_is_activity() -> None:
    click = np.zeros(160_000, np.float32)
    click[80_000:80_100] = noise(100 / SAMPLE_RATE, -20)
    assert activity_snr(click, SAMPLE_RATE) > MIN_SNR
    assert activity_snr(click + noise(10, -80), SAMPLE_RATE) > MIN_SNR


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(1, 40_000), st.integers(0, 50_000), st.integers(0, 50_000), st.floats(-90, -10))
def test_padding_does_not_change_the_snr(samples: int, before: int, after: int, level: float) -> None:
    sound = noise(samples / SAMPLE_RATE, level)
    padded = np.pad(sound, (before, after))
    assert activity_snr(padded, SAMPLE_RATE) == activity_snr(sound, SAMPLE_RATE)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(0, 400), st.integers(1, 10), st.integers(2, 9), st.booleans(), st.none() | st.floats(0, 5))
def test_segments(samples: int, rate: int, seconds: int, pad: bool, pad_seconds: float | None) -> None:
    """Whole pieces in order, the rest discarded; a short clip once, with the silence that was asked for."""
    sound = np.arange(1, samples + 1, dtype=np.float32)
    pieces = segments(sound, rate, float(seconds), pad, pad_seconds)
    size = seconds * rate
    if samples < MIN_SECONDS * rate:
        assert pieces == []
    elif samples >= size:
        assert all(len(piece) == size for piece in pieces)
        np.testing.assert_array_equal(np.concatenate(pieces), sound[: samples // size * size])
    else:
        (piece,) = pieces
        np.testing.assert_array_equal(piece[:samples], sound)
        assert not piece[samples:].any()
        silence = min(size - samples, size if pad_seconds is None else round(pad_seconds * rate))
        assert len(piece) - samples == (silence if pad else 0)


def test_segments_of_the_paper() -> None:
    """10 s pieces: 10 s is one, 29.99 s two, 9.99 s one that is padded; 0.149 s is too short."""
    for samples, lengths in (
        (160_000, [160_000]),
        (479_999, [160_000, 160_000]),
        (159_999, [160_000]),
        (2_400, [160_000]),
        (2_399, []),
        (0, []),
    ):
        assert [len(piece) for piece in segments(np.ones(samples, np.float32), SAMPLE_RATE)] == lengths


def test_wrong_arguments_are_named() -> None:
    sound = np.zeros(16_000, np.float32)
    for wrong in (sound.astype(np.int16), sound[None], [0.0]):
        with pytest.raises(InputError, match="waveform"):
            segments(wrong, SAMPLE_RATE)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="waveform"):
            activity_snr(wrong, SAMPLE_RATE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sample_rate"):
        activity_snr(sound, 0)
    for seconds in (0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="seconds"):
            segments(sound, SAMPLE_RATE, seconds)
    with pytest.raises(InputError, match="pad_seconds"):
        segments(sound, SAMPLE_RATE, pad_seconds=-1.0)
