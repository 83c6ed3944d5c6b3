"""VGGish against torchvggish, from sound to embedding, and where its windows are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_embedders import FILE, random_state, sounds

from siren.evaluate import vggish
from siren.evaluate.vggish import MIN_SAMPLES, Vggish, VggishEmbedder


def shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Vggish().state_dict().items()}


def test_numbers_are_those_of_torchvggish() -> None:
    """At its real size with random weights: 1 and 2 windows of sound, with a rest. See golden_embedders.py.

    The tolerance is that of float32 sums of 12,288 products in another order: sqrt(12288) roundings of 2^-24 in each
    of three layers, of values up to 10.
    """
    model = VggishEmbedder(random_state(shapes(), seed=1), "", "")
    golden = np.load(FILE)
    for i, vectors in enumerate(model.embed(sounds("vggish")).vectors):
        wanted = golden[f"vggish_{i}"]
        assert wanted.std() > 1 and (wanted < 0).any()  # before the last ReLU
        np.testing.assert_allclose(vectors, wanted, atol=3 * 12288**0.5 * 2**-24 * 10)


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> VggishEmbedder:
    """With a network that is no work: the mean of each window's bands over time, and zeros."""
    monkeypatch.setattr(vggish, "_CHANNELS", ((1,), (1,), (1,), (1,)))
    monkeypatch.setattr(vggish, "_HIDDEN", 1)
    model = VggishEmbedder(random_state(shapes(), seed=0), "", "")
    monkeypatch.setattr(model, "model", lambda windows: torch.nn.functional.pad(windows.mean(dim=1), (0, 64)))
    return model


@pytest.mark.parametrize(
    ("samples", "windows"),
    [(MIN_SAMPLES, 1), (MIN_SAMPLES + 15359, 1), (MIN_SAMPLES + 15360, 2), (160000, 10), (17 * 15360 + 400, 17)],
)
def test_windows(front: VggishEmbedder, samples: int, windows: int) -> None:
    """Whole windows of 0.96 s that do not overlap; a window depends on its own 0.975 s only, in any batch of 16."""
    wave = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    (vectors,) = front.embed([wave]).vectors
    assert vectors.shape == (windows, 128)
    for i in range(windows):
        (alone,) = front.embed([wave[i * 15360 : i * 15360 + MIN_SAMPLES]]).vectors
        np.testing.assert_array_equal(alone[0], vectors[i])


def test_a_tone_is_in_its_band(front: VggishEmbedder) -> None:
    """1 kHz is heard where the HTK scale has it between 125 and 7500 Hz; silence is the logarithm of the offset."""
    wave = np.sin(2 * np.pi * 1000 * np.arange(MIN_SAMPLES) / 16000).astype(np.float32)
    (vectors,) = front.embed([wave]).vectors
    mel = 2595 * np.log10(1 + np.array([125, 1000, 7500]) / 700)
    assert vectors[0, :64].argmax() == round(65 * (mel[1] - mel[0]) / (mel[2] - mel[0])) - 1
    (silence,) = front.embed([0 * wave]).vectors
    np.testing.assert_allclose(silence[0, :64], np.log(0.01), rtol=1e-6)
