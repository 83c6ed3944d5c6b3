"""CNN14 against panns_inference with torchlibrosa, from sound to embedding and logits, and short and quiet clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_embedders import FILE, FOURIER, RATES, random_state, sounds

from siren.evaluate import cnn14
from siren.evaluate.cnn14 import Cnn14, Cnn14Embedder, wanted
from siren.mel import mel_filterbank

VARIANTS = [("cnn14_16k", 512, 8000), ("cnn14_32k", 1024, 14000)]


def state(kind: str, window: int, highest: float, seed: int = 2) -> dict[str, torch.Tensor]:
    """Random weights with Fourier kernels and mel weights as torchlibrosa makes them, made here by their formulas."""
    found = random_state({n: t.shape for n, t in wanted(window).items() if not n.startswith(FOURIER)}, seed)
    n, k = np.arange(window), np.arange(window // 2 + 1)[:, None]
    angle = 2 * np.pi * (k * n % window) / window
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / window)
    for part, kernel in (("real", np.cos(angle) * hann), ("imag", -np.sin(angle) * hann)):
        values = torch.from_numpy(kernel[:, None].astype(np.float32))
        found[f"spectrogram_extractor.stft.conv_{part}.weight"] = values
    mel = mel_filterbank(64, window, RATES[kind], 50, highest, scale="slaney", norm="slaney")
    return found | {"logmel_extractor.melW": torch.from_numpy(mel.T.copy())}


@pytest.mark.parametrize(("kind", "window", "highest"), VARIANTS)
def test_numbers_are_those_of_panns(kind: str, window: int, highest: float) -> None:
    """At its real size with random weights: embedding after the ReLU, and logits. See golden_embedders.py.

    The tolerance is that of float32 sums of 9 * 2048 products in another order: sqrt(18432) roundings of 2^-24 in each
    of 14 layers, of values up to 8.
    """
    model = Cnn14Embedder(state(kind, window, highest), "", "")
    assert model.sample_rate == RATES[kind]
    found = model.embed(sounds(kind))
    golden = np.load(FILE)
    for values, name in ((np.concatenate(found.vectors), "vectors"), (found.logits, "logits")):
        expected = golden[f"{kind}_{name}"]
        assert expected.std() > 1
        np.testing.assert_allclose(values, expected, atol=14 * 18432**0.5 * 2**-24 * 8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Cnn14Embedder:
    monkeypatch.setattr(cnn14, "_CHANNELS", (3, 4, 5, 6, 7, 8))
    return Cnn14Embedder(state("cnn14_16k", 512, 8000), "", "")


@pytest.mark.parametrize("samples", [1, 255, 31999])
def test_short_clips_are_filled_up_with_silence(small: Cnn14Embedder, samples: int) -> None:
    """To 32,000 samples, as audioldm_eval does."""
    wave = np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32)
    short, filled = small.embed([wave]), small.embed([np.pad(wave, (0, 32000 - samples))])
    np.testing.assert_array_equal(short.vectors[0], filled.vectors[0])
    np.testing.assert_array_equal(short.logits, filled.logits)


def test_a_constant_is_not_heard(small: Cnn14Embedder) -> None:
    """The mean that audioldm_eval takes off a clip is no sound: a constant is silence to every band."""
    model = small.model
    assert isinstance(model, Cnn14)
    levels = [model.features(torch.full((1, 40000), value)) for value in (0.0, 0.1)]
    assert torch.equal(*levels)
