"""The aligner: unit vectors that depend on a sound or text alone, files that give the same bits, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import edit_config, edit_weights, leave_only_a_pickle
from word_encoder import WordEncoder

import siren
from siren.aligner import Aligner, AlignerConfig, AlignerModel, TextHead
from siren.errors import CheckpointError, InputError, MissingDependencyError
from siren.mel import mel_filterbank

RATE = 16000
TINY = AlignerConfig(
    window=256, hop_length=128, n_mels=12, channels=(6, 10), hidden=9, dim=7, text_dim=12, seconds=0.25
)


def make_aligner(seed: int = 0, config: AlignerConfig = TINY) -> Aligner:
    """Random weights, also where training would have them at their start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AlignerModel(config)
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.normal_(0, 0.3)
        torch.nn.init.normal_(model.text.weighting.weight)
    return Aligner(model, WordEncoder(config.text_dim))


def noise(samples: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    wave = rng.standard_normal(samples) * np.sin(np.arange(samples) * rng.uniform(1e-3, 1e-2))
    return (0.1 * wave).astype(np.float32)


def test_features_by_hand() -> None:
    """Levels from 0 to 1, one for each band and frame: log10 of the power, 80 dB below the loudest band is 0."""
    model = make_aligner().model.audio
    wave = noise(1000)
    level, height = model.features(torch.from_numpy(wave)[None])[0]
    hann = np.sin(np.pi * np.arange(256) / 256) ** 2
    padded = np.pad(wave.astype(np.float64), 128)
    starts = range(0, 1001, 128)
    power = np.stack([np.abs(np.fft.rfft(hann * padded[s : s + 256])) ** 2 for s in starts]) * (2 / hann.sum()) ** 2
    wanted = np.log10(mel_filterbank(12, 256, RATE).astype(np.float64) @ power.T + 1e-17)
    wanted = np.maximum((wanted - wanted.max()) / 8 + 1, 0)
    np.testing.assert_allclose(level, wanted, atol=1e-4)
    assert float(height[0, 0]) == -1 and float(height[-1, 0]) == 1


def test_unit_vectors() -> None:
    aligner = make_aligner()
    audio = aligner.embed_audio([noise(3000), noise(9000, 1)[None]], RATE)
    text = aligner.embed_text(["a dog barks", "rain", "rain"])
    assert audio.shape == (2, 7) and text.shape == (3, 7) and audio.dtype == text.dtype == np.float32
    for vectors in (audio, text):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (audio[0] != audio[1]).any() and (text[0] != text[1]).any()
    scores = aligner.similarity(["rain", "a dog barks"], [noise(3000), noise(9000, 1)], RATE)
    np.testing.assert_allclose(scores, [audio[0] @ text[1], audio[1] @ text[0]], atol=1e-6)
    assert aligner.embed_audio([], RATE).shape == aligner.embed_text([]).shape == (0, 7)
    assert aligner.similarity([], [], RATE).shape == (0,)


@given(st.lists(st.integers(1, 6000), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_vector_does_not_depend_on_its_company(lengths: list[int], random) -> None:
    """Sounds of any lengths and texts, in any order, give the bits they give alone."""
    aligner = make_aligner()
    sounds = [noise(length, i) for i, length in enumerate(lengths)]
    texts = [" ".join(random.choices(["a", "dog", "rain"], k=random.randint(1, 4))) for _ in lengths]
    together = aligner.embed_audio(sounds, RATE), aligner.embed_text(texts)
    fresh = make_aligner()
    for i in random.sample(range(len(lengths)), len(lengths)):
        assert (fresh.embed_audio([sounds[i]], RATE) == together[0][i]).all()
        assert (fresh.embed_text([texts[i]]) == together[1][i]).all()


def test_loudness_does_not_count_and_silence_is_finite() -> None:
    """A sound turned down by 40 dB is the same one, by the arithmetic of logarithms; silence is quiet everywhere."""
    aligner = make_aligner()
    loud, quiet = aligner.embed_audio([noise(4000), 0.01 * noise(4000)], RATE)
    np.testing.assert_allclose(loud, quiet, atol=1e-3)
    features = aligner.model.audio.features(torch.zeros(1, 4000))
    torch.testing.assert_close(features[:, 0], torch.zeros(1, 12, 32))
    assert np.isfinite(aligner.embed_audio([np.zeros(4000), np.zeros(1)], RATE)).all()


def test_short_sounds_are_filled_up_and_others_resampled() -> None:
    aligner = make_aligner()
    wave = noise(1500)
    (padded,) = aligner.embed_audio([np.pad(wave, (0, 2500))], RATE)  # 0.25 s
    assert (aligner.embed_audio([wave], RATE)[0] == padded).all()
    other = noise(8000)
    (wanted,) = aligner.embed_audio([soxr.resample(other, 22050, RATE)], RATE)
    assert (aligner.embed_audio([other], 22050)[0] == wanted).all()
    assert np.isfinite(aligner.embed_audio([np.ones(1)], 48000)).all()  # resampled, nothing is left


def test_the_text_head_starts_as_a_mean() -> None:
    """Before training every token counts the same, and tokens outside the mask never do."""
    head = TextHead(TINY)
    states, mask = WordEncoder()(["rain on a roof", "rain"])
    torch.testing.assert_close(head(states, mask), head(states + 9 * ~mask[..., None], mask))
    mean = torch.stack([states[0].mean(dim=0), states[1, 0]])
    torch.testing.assert_close(head(states, mask), head(mean[:, None], torch.ones(2, 1, dtype=torch.bool)))


def test_a_saved_aligner_gives_the_same_bits(tmp_path: Path) -> None:
    """Also its identity; another one has another. Saving again replaces it."""
    aligner = make_aligner()
    aligner.save_pretrained(tmp_path / "aligner")
    aligner.save_pretrained(tmp_path / "aligner")
    assert sorted(path.name for path in (tmp_path / "aligner").iterdir()) == ["config.json", "model.safetensors"]
    loaded = siren.Aligner.from_pretrained(tmp_path / "aligner", encoder=WordEncoder())
    assert loaded.config == TINY and loaded.identity == aligner.identity != make_aligner(1).identity
    sounds, texts = [noise(5000), noise(100, 1)], ["rain on a roof", "a dog"]
    assert (loaded.embed_audio(sounds, RATE) == aligner.embed_audio(sounds, RATE)).all()
    assert (loaded.embed_text(texts) == aligner.embed_text(texts)).all()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="thesis"):
        aligner.save_pretrained(tmp_path / "other")


def test_the_default_is_small(tmp_path: Path) -> None:
    """At most 3 MB, to travel with a package."""
    config = AlignerConfig()
    make_aligner(config=config).save_pretrained(tmp_path / "aligner")
    assert sum(path.stat().st_size for path in (tmp_path / "aligner").iterdir()) <= 3e6
    assert json.loads((tmp_path / "aligner" / "config.json").read_text())["channels"] == list(config.channels)


def changed(**values: object):
    return lambda folder: edit_config(folder, **values)


def flipped(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 16
    (folder / "model.safetensors").write_bytes(data)


SPOILT = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "a codec": (changed(model_type="dac"), "model_type"),
    "huge": (changed(dim=10**9), "dim must be"),
    "stages": (changed(channels=[8] * 99), "channels must be"),
    "no stages": (changed(channels=[]), "channels must be"),
    "seconds": (changed(seconds="4"), "seconds must be"),
    "hop": (changed(hop_length=300), "hop_length"),
    "empty band": (changed(n_mels=200), "holds no bin"),
    "unknown": (changed(code="run()"), "unknown fields code"),
    "encoder": (changed(prompt_encoder=7), "prompt_encoder"),
    "size": (changed(hidden=10), "text.hidden"),
    "pickle": (leave_only_a_pickle, "pickle"),
    "lacking": (lambda folder: edit_weights(folder, {"text.norm.bias": None}), "lacks text.norm.bias"),
    "NaN": (lambda folder: edit_weights(folder, {"text.norm.bias": torch.full((12,), torch.nan)}), "NaN"),
    "damaged": (flipped, "damaged"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_spoilt_folders_are_refused(tmp_path: Path, spoilt: str) -> None:
    """One clear line, and nothing in the folder is run."""
    make_aligner().save_pretrained(tmp_path / "aligner")
    spoil, reason = SPOILT[spoilt]
    spoil(tmp_path / "aligner")
    with pytest.raises(CheckpointError, match=reason) as caught:
        Aligner.from_pretrained(tmp_path / "aligner")
    assert "\n" not in str(caught.value) and not (tmp_path / "aligner" / "run").exists()


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    """Token states of other weights, or of another width, mean nothing to the head."""
    make_aligner().save_pretrained(tmp_path / "aligner")
    for encoder in (WordEncoder(identity="others"), WordEncoder(dim=13)):
        with pytest.raises(CheckpointError, match="reads token states of words"):
            Aligner.from_pretrained(tmp_path / "aligner", encoder=encoder)
    try:
        with pytest.raises(CheckpointError, match="not of minilm"):
            Aligner.from_pretrained(tmp_path / "aligner").embed_text(["rain"])
    except MissingDependencyError:
        pytest.skip("minilm is not installed")


def test_names_without_an_aligner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siren.aligner._MINI_FOLDER", tmp_path / "none")
    with pytest.raises(CheckpointError, match="siren train-aligner"):
        Aligner.from_pretrained("siren-mini")
    with pytest.raises(CheckpointError, match="an aligner is a local folder"):
        Aligner.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize(
    ("sound", "words"),
    [(np.zeros(0), "shape"), (np.zeros((2, 5)), "shape"), (np.array([0, np.inf]), "sound 1 holds NaN"), (0.0, "shape")],
)
def test_sounds_that_are_refused(sound: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_aligner().embed_audio([noise(10), sound], RATE)  # type: ignore[list-item]


def test_texts_that_are_refused() -> None:
    aligner = make_aligner()
    with pytest.raises(InputError, match="a list"):
        aligner.embed_text("rain")
    with pytest.raises(InputError, match="empty"):
        aligner.embed_text(["rain", " "])
    with pytest.raises(InputError, match="2 texts and 1 waveforms"):
        aligner.similarity(["a", "b"], [noise(10)], RATE)
    with pytest.raises(InputError, match="sample_rate"):
        aligner.embed_audio([noise(10)], 0)


def test_texts_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder is asked once for a text of a group; the oldest ones go."""
    monkeypatch.setattr("siren.aligner._CACHED_TEXTS", 3)
    aligner, asked = make_aligner(), list[str]()
    encode = aligner.encoder
    encoder = type("Counting", (), {"__call__": lambda self, texts: (asked.extend(texts), encode(texts))[1]})()
    aligner._encoder = encoder
    aligner.embed_text(["a", "a", "b"])
    aligner.embed_text(["a", "c"])
    assert asked == ["a", "b", "c"]
    rows = aligner.embed_text(["d", "e", "f", "g", "a"])
    assert len(aligner._texts) == 3 and (rows[-1] == make_aligner().embed_text(["a"])[0]).all()
