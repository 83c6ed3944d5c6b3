"""What an aligner is trained on: the right clips, pairs that are no negatives, sounds shifted and disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_runs import make_codec
from word_encoder import WordEncoder

from siren.aligner_data import Pairs, disturb, drop_words, read_pairs, recode, windows
from siren.codec import Codec
from siren.errors import DataError, InputError
from siren.spectral import SpectralConfig, SpectralModel

RATE = 16000


def write_clips(folder: Path, clips: list[dict], seconds: float = 0.2) -> Path:
    """A clip folder; clips whose audio is "missing.wav" get no file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for clip in clips:
        if clip["audio"] != "missing.wav":
            soundfile.write(folder / clip["audio"], 0.1 * rng.standard_normal(round(seconds * RATE)), RATE)
    (folder / "clips.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return folder


def test_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions are cleaned as for the token sets; clips without caption or sound are left out, and it says so."""
    first = write_clips(
        tmp_path / "first",
        [
            {"id": "a", "audio": "a.wav", "caption": ["Dog barking.", "loud barking"], "label": "dog"},
            {"id": "b", "audio": "b.wav"},
            {"id": "c", "audio": "missing.wav", "caption": "rain"},
        ],
    )
    second = write_clips(tmp_path / "second", [{"id": "a", "audio": "a.wav", "caption": ["dog bark", "rain"]}])
    pairs = read_pairs([first, second], WordEncoder(), progress=False)
    assert len(pairs) == 2 and pairs.ids == ["a", "a"] and pairs.labels == ["dog", None]
    assert [[pairs.texts[text] for text in texts] for texts in pairs.captions] == [
        ["dog bark", "loud barking"],
        ["dog bark", "rain"],
    ]
    assert [len(sound) for sound in pairs.sounds] == [3200, 3200] and pairs.sounds[0].dtype == np.int16
    states, mask = pairs.token_states([2, 0])
    assert mask.tolist() == [[True, False], [True, True]]
    torch.testing.assert_close(states[1], WordEncoder()(["dog bark"])[0][0].half().float())
    said = capsys.readouterr().err
    assert "1 of 4 clips have no caption" in said and "1 of 3 sounds left out" in said


def test_sources_without_anything(tmp_path: Path) -> None:
    for sources in ([], str(tmp_path)):
        with pytest.raises(InputError, match="list of clip folders"):
            read_pairs(sources, WordEncoder(), progress=False)
    silent = write_clips(tmp_path / "silent", [{"id": "a", "audio": "a.wav", "caption": " "}])
    with pytest.raises(DataError, match="none of the 1 clips has a caption"):
        read_pairs([silent], WordEncoder(), progress=False)
    lost = write_clips(tmp_path / "lost", [{"id": "a", "audio": "missing.wav", "caption": "rain"}])
    with pytest.raises(DataError, match="none of the 1 sounds can be read"):
        read_pairs([lost], WordEncoder(), progress=False)


def make_pairs(labels: list[str | None], texts: list[str]) -> Pairs:
    """Clip i has label i and caption i."""
    vectors = [WordEncoder()([text])[0][0] for text in texts]
    meanings = torch.nn.functional.normalize(torch.stack([vector.mean(dim=0) for vector in vectors]), dim=1)
    sounds = [np.zeros(1, np.int16)] * len(texts)
    captions = [[i] for i in range(len(texts))]
    return Pairs([str(i) for i in range(len(texts))], labels, sounds, captions, texts, vectors, meanings)


def test_the_held_out_clips_are_those_of_the_token_sets() -> None:
    """The rule goes by ids: every clip is on one side, pieces of one recording on the same."""
    pairs = make_pairs([None] * 60, ["rain"] * 60)
    pairs.ids[:] = [f"clip{i // 2}#{i % 2}" for i in range(60)]
    training, validation = pairs.split(0.3)
    assert sorted([*training, *validation]) == list(range(60)) and 0 < len(validation) < 40
    assert {i // 2 for i in validation} & {i // 2 for i in training} == set()


def test_related_clips() -> None:
    """Same label, same words or nearly the same words; no label is not a label."""
    texts = ["a dog", "a small cat", "a cow", "a cow", "wind over a field", "wind over a dry field"]
    pairs = make_pairs(["dog", "dog", None, "cow", None, "wind"], texts)
    related = pairs.related(range(6), range(6))
    wanted = torch.eye(6, dtype=torch.bool)
    for i, j in ((0, 1), (2, 3), (4, 5)):
        wanted[i, j] = wanted[j, i] = True
    # Random words: chance resemblance is what the threshold has to be above.
    similar = pairs.meanings @ pairs.meanings.T >= 0.6
    assert torch.equal(related, wanted | similar) and similar[4, 5] and not similar[0, 4]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 50), st.integers(0, 2**32))
def test_windows_hold_all_that_fits(lengths: list[int], size: int, seed: int) -> None:
    """Shorter sounds are whole and stand anywhere; of longer ones there is one piece. Silence is all else."""
    sounds = [np.arange(1, length + 1, dtype=np.int16) for length in lengths]
    still, moved = windows(sounds, size), windows(sounds, size, np.random.default_rng(seed))
    assert still.shape == moved.shape == (len(lengths), size) and still.dtype == torch.float32
    for sound, first, other in zip(sounds, still, moved, strict=True):
        expected = np.pad(sound[:size], (0, max(0, size - len(sound)))) / np.float32(32767)
        assert (first.numpy() == expected).all()
        values = (other.numpy() * 32767).round()
        kept = values[values > 0]
        assert len(kept) == min(size, len(sound)) and (np.diff(kept) == 1).all()
        assert (np.diff(np.flatnonzero(values)) == 1).all()
    assert torch.equal(moved, windows(sounds, size, np.random.default_rng(seed)))


def test_windows_reach_every_place() -> None:
    rng = np.random.default_rng(0)
    short, long = [np.ones(2, np.int16)] * 200, [np.arange(1, 8, dtype=np.int16)] * 200
    assert {int(row.argmax()) for row in windows(short, 5, rng)} == {0, 1, 2, 3}
    assert {round(float(row[0]) * 32767) for row in windows(long, 5, rng)} == {1, 2, 3}


def test_disturbed_sounds() -> None:
    """Up to 12 dB louder or quieter, half with noise of -90 to -50 dBFS; the same for the same random numbers."""
    wave = torch.zeros(400, 3000)
    wave[:, :1500] = 0.5
    changed = disturb(wave, np.random.default_rng(0))
    gain = 20 * torch.log10(changed[:, :1500].mean(dim=1) / 0.5)
    assert -12.01 < gain.min() < -10 and 10 < gain.max() < 12.01
    noise = changed[:, 1500:].std(dim=1)
    noisy = noise > 0
    assert 0.4 < noisy.float().mean() < 0.6
    level = 20 * torch.log10(noise[noisy])
    assert -90.5 < level.min() < -85 and -55 < level.max() < -49.5
    assert torch.equal(changed, disturb(wave, np.random.default_rng(0)))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 2**32))
def test_some_words_are_dropped_and_one_stays(lengths: list[int], seed: int) -> None:
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    kept = drop_words(mask, np.random.default_rng(seed))
    assert not (kept & ~mask).any() and kept.any(dim=1).all()


def test_a_tenth_of_the_words_is_dropped() -> None:
    kept = drop_words(torch.ones(100, 100, dtype=torch.bool), np.random.default_rng(0))
    assert 0.88 < kept.float().mean() < 0.92


def test_recoded_sounds() -> None:
    """What the codec gives, sound by sound, as long as the sound was; threads change nothing."""
    codec = make_codec()
    rng = np.random.default_rng(0)
    sounds = [(3000 * rng.standard_normal(length)).astype(np.int16) for length in (100, 3201, 9000)]
    made = recode(sounds, codec, 0.4, progress=False, workers=3)
    assert [len(sound) for sound in made] == [100, 3201, 6400] and made[0].dtype == np.int16
    wave = torch.from_numpy(sounds[1]).float()[None, None] / 32767
    wanted = codec.decode(codec.encode(wave))[0, 0, :3201]
    assert (made[1] == (wanted * 32767).round().numpy()).all()
    alone = recode(sounds, codec, 0.4, progress=False, workers=1)
    assert all((a == b).all() for a, b in zip(made, alone, strict=True))
    other = Codec(SpectralModel(SpectralConfig(sampling_rate=8000, n_mels=4, window=640)))
    with pytest.raises(InputError, match="8000 Hz"):
        recode(sounds, other, 1.0)
