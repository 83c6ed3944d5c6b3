"""Rewards by models: each is the cosine of its model's embeddings; a sound that cannot be scored costs only itself."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from test_aligner import make_aligner, noise

from siren.align.reward_models import AlignerReward, ClapReward, ImageBindReward
from siren.align.rewards import RewardMix, load_reward
from siren.errors import CheckpointError, InputError, MissingDependencyError

RATE = 16000
PROMPTS = ["rain", "a dog", "rain", "rain", "rain"]
SPOILT = np.array([0, np.nan], np.float32)


def sounds() -> list[np.ndarray]:
    """Three good ones, one with NaN, one without a sample."""
    return [noise(3000), noise(5000, 1), noise(40, 2), SPOILT, np.zeros(0, np.float32)]


def test_aligner() -> None:
    aligner = make_aligner()
    reward = AlignerReward(aligner)
    values = reward(PROMPTS, sounds(), sample_rate=RATE, codes=None)
    assert values[:3] == aligner.similarity(PROMPTS[:3], sounds()[:3], RATE).tolist() and values[3:] == [None, None]
    mix = RewardMix([reward])
    assert mix.names == ["aligner"] and mix.identities == [aligner.identity]
    result = mix(PROMPTS, sounds(), sample_rate=RATE, codes=np.zeros((5, 2, 3)))
    assert (
        result.failures == {"aligner": {"None": 2}} and np.isfinite(result.total).tolist() == [True] * 3 + [False] * 2
    )


def test_the_aligner_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path, or the one of siren-mini; one for another encoder is refused when it is loaded."""
    aligner = make_aligner()
    aligner.save_pretrained(tmp_path / "mine")
    monkeypatch.setattr("siren.aligner.PromptEncoder.from_pretrained", lambda name, device: aligner.encoder)
    monkeypatch.setattr("siren.aligner._MINI_FOLDER", tmp_path / "mine")
    for name in (f"aligner:{tmp_path / 'mine'}", "aligner"):
        found: Any = load_reward(name)
        assert found.identity == aligner.identity
        assert found(PROMPTS, sounds(), sample_rate=RATE) == AlignerReward(aligner)(PROMPTS, sounds(), sample_rate=RATE)
    other = SimpleNamespace(identity="other", dim=12)
    monkeypatch.setattr("siren.aligner.PromptEncoder.from_pretrained", lambda name, device: other)
    with pytest.raises(CheckpointError, match="not of other"):
        load_reward("aligner")


class Loudness:
    """A stand-in for CLAP that hears 0.1 s: the similarity is the loudest sample."""

    identity = "loudness"
    max_seconds = 0.1

    def similarity(self, waveforms, captions, sample_rate):
        assert all(len(wave) <= 0.1 * sample_rate for wave in waveforms)
        if not all(np.isfinite(wave).all() and len(wave) for wave in waveforms):
            raise InputError("not a sound")
        return np.array([np.abs(wave).max() for wave in waveforms], np.float32)


def test_clap_hears_long_sounds_in_pieces() -> None:
    clap: Any = Loudness()
    long = np.concatenate([np.full(1000, 0.25), np.full(1000, 0.5), np.full(1000, 0.75)]).astype(np.float32)
    values = ClapReward(clap)(["a", "b", "c"], [long, long[:1600], SPOILT], sample_rate=RATE)
    assert values == [pytest.approx((0.5 + 0.75) / 2), 0.5, None]


def test_clap(tmp_path: Path) -> None:
    """Of a folder, the similarity of the data engine."""
    pytest.importorskip("transformers")
    from test_similarity import save_clap

    from siren.data.similarity import ClapSimilarity

    save_clap(tmp_path / "tiny-clap", fusion=False)
    reward: Any = load_reward(f"clap:{tmp_path / 'tiny-clap'}")
    values = reward(PROMPTS, sounds(), sample_rate=RATE, codes=None)
    clap = ClapSimilarity.from_pretrained(tmp_path / "tiny-clap")
    assert values[:3] == clap.similarity(sounds()[:3], PROMPTS[:3], RATE).tolist() and values[3:] == [None, None]
    assert reward.identity == clap.identity and RewardMix([reward]).names == ["clap"]


class FakeImageBind(torch.nn.Module):
    """Texts embed by their length, sounds by their mean and their loudest sample, each with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.calls: list[tuple[str, int]] = []

    def forward(self, inputs):
        ((kind, rows),) = inputs.items()
        self.calls.append((kind, len(rows)))
        return {kind: rows * (100 if kind == "text" else 20)}


@pytest.fixture
def imagebind(monkeypatch: pytest.MonkeyPatch) -> list[FakeImageBind]:
    """A package imagebind with the names that the adapter uses; the models that it made."""
    made: list[FakeImageBind] = []

    def imagebind_huge(pretrained=False):
        made.append(FakeImageBind())
        return made[-1]

    def text(texts, device):
        return torch.tensor([[len(text), 1.0] for text in texts])

    def audio(paths, device):
        waves = [soundfile.read(path) for path in paths]
        assert {rate for _, rate in waves} == {RATE}
        return torch.tensor([[wave.mean(), np.abs(wave).max()] for wave, _ in waves])

    package, models, model, data = (ModuleType(name) for name in ("imagebind", "models", "imagebind_model", "data"))
    model.imagebind_huge = imagebind_huge  # type: ignore[attr-defined]
    model.ModalityType = SimpleNamespace(TEXT="text", AUDIO="audio")  # type: ignore[attr-defined]
    data.load_and_transform_text, data.load_and_transform_audio_data = text, audio  # type: ignore[attr-defined]
    package.data, package.models, models.imagebind_model = data, models, model  # type: ignore[attr-defined]
    for name, module in (("", package), (".data", data), (".models", models), (".models.imagebind_model", model)):
        monkeypatch.setitem(sys.modules, f"imagebind{name}", module)
    return made


def test_imagebind(imagebind: list[FakeImageBind]) -> None:
    """Eq. 8: the cosine whatever the model's scales are, each prompt embedded once, bad sounds None."""
    reward: Any = load_reward("imagebind")
    many = [noise(500, i) + 0.01 * i for i in range(11)]
    prompts = ["rain", "a dog"] * 5 + ["rain"]
    values = reward([*prompts, "rain", "rain"], [*many, SPOILT, np.zeros(0)], sample_rate=RATE, codes=None)
    heard = [np.round(np.clip(wave, -1, 1) * 32768) / 32768 for wave in many]
    for value, wave, prompt in zip(values, heard, prompts, strict=False):
        a, b = np.array([wave.mean(), np.abs(wave).max()]), np.array([len(prompt), 1])
        assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-3)  # 16-bit files
    assert values[11:] == [None, None]
    assert imagebind[0].calls == [("text", 2), ("audio", 8), ("audio", 3)]
    assert reward([], [], sample_rate=RATE) == [] and reward(["rain"], [SPOILT], sample_rate=RATE) == [None]


def test_imagebind_with_weights_of_a_file(imagebind: list[FakeImageBind], tmp_path: Path) -> None:
    """They are read without running anything in them; what are no weights is refused."""
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pth")
    reward: Any = load_reward(f"imagebind:{tmp_path / 'weights.pth'}")
    assert imagebind[0].weight.tolist() == [1, 1] and "weights.pth" in reward.identity
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    torch.save({"weight": Path("x")}, tmp_path / "object.pth")
    (tmp_path / "damaged.pth").write_bytes(b"not a file of torch's")
    for name in ("other", "object", "damaged", "none"):
        with pytest.raises(CheckpointError, match=f"{name}.pth does not hold") as caught:
            load_reward(f"imagebind:{tmp_path / name}.pth")
        assert "\n" not in str(caught.value)


def test_the_placeholder_on_the_package_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports and holds nothing; the error says where the real one is."""
    monkeypatch.setitem(sys.modules, "imagebind", ModuleType("imagebind"))
    with pytest.raises(MissingDependencyError, match="empty placeholder"):
        ImageBindReward.from_installed()
