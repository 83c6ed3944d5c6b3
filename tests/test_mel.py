"""Mel filterbanks against the closed forms of their triangles and scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.errors import InputError
from siren.mel import hertz_to_mel, mel_filterbank, mel_to_hertz


def test_scales_at_known_points() -> None:
    """HTK: 1000 Hz is 1000 mel within 0.02; Slaney: 200/3 Hz a mel up to 1000 Hz, then 27 mel for a factor of 6.4."""
    assert hertz_to_mel(700.0) == pytest.approx(2595 * np.log10(2))
    assert hertz_to_mel(1000.0) == pytest.approx(1000.0, abs=0.02)
    np.testing.assert_allclose(hertz_to_mel([0, 200, 1000, 6400, 6400 * 6.4], "slaney"), [0, 3, 15, 42, 69])


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_scales_invert_each_other(scale: str) -> None:
    hertz = np.linspace(0, 24000, 4001)
    mel = hertz_to_mel(hertz, scale)
    assert (np.diff(mel) > 0).all()
    np.testing.assert_allclose(mel_to_hertz(mel, scale), hertz, atol=1e-8)


def test_a_filterbank_worked_by_hand() -> None:
    """Slaney below 1000 Hz is linear: points 0, 200, 400, 600, 800 Hz over bins 50 Hz apart are triangles of 8 bins."""
    weights = mel_filterbank(3, 40, 2000, f_max=800, scale="slaney")
    triangle = [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]
    wanted = np.zeros((3, 21))
    for m in range(3):
        wanted[m, 4 * m + 1 : 4 * m + 8] = triangle
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, wanted, atol=1e-6)
    area = mel_filterbank(3, 40, 2000, f_max=800, scale="slaney", norm="slaney")
    np.testing.assert_allclose(area, wanted / 200, atol=1e-8)  # half of 400 Hz x height 1 / 200
    np.testing.assert_allclose(mel_filterbank(3, 40, 2000, f_max=800, scale="slaney", norm="l1"), wanted / 4, atol=1e-7)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    n_mels=st.integers(1, 40),
    n_fft=st.sampled_from([2048, 2047, 4096]),
    rate=st.sampled_from([16000, 22050, 44100]),
    f_min=st.floats(0, 1000),
    scale=st.sampled_from(["htk", "slaney"]),
)
def test_between_the_outer_centres_the_triangles_sum_to_one(n_mels, n_fft, rate, f_min, scale) -> None:
    weights = mel_filterbank(n_mels, n_fft, rate, f_min, scale=scale)
    assert weights.shape == (n_mels, n_fft // 2 + 1)
    points = mel_to_hertz(np.linspace(*hertz_to_mel([f_min, rate / 2], scale), n_mels + 2), scale)
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    inside = (bins >= points[1]) & (bins <= points[-2])
    np.testing.assert_allclose(weights.sum(axis=0)[inside], 1, atol=1e-5)
    assert weights[:, (bins <= f_min) | (bins >= rate / 2)].max(initial=0) < 1e-6  # the ends, as far as they round
    np.testing.assert_allclose(mel_filterbank(n_mels, n_fft, rate, f_min, None, scale, "l1").sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1024, 16000), "at least 1"),
        ((80, 1024, 16000, 9000.0), "f_min < f_max"),
        ((80, 1024, 16000, 0.0, 9000.0), "sample_rate / 2"),
        ((80, 1024, 16000, 0.0, None, "bark"), "htk or slaney"),
        ((80, 1024, 16000, 0.0, None, "htk", "l2"), "slaney or l1"),
        ((256, 512, 44100), "holds no bin"),
    ],
)
def test_arguments_that_make_no_filterbank(arguments, words) -> None:
    with pytest.raises(InputError, match=words):
        mel_filterbank(*arguments)
