"""The retrieval benchmark's logic with made-up embeddings, clips and tokens: no model, no weights."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.errors import InputError

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from retrieval import check_files, known_prompts, measure, pick_classes
from retrieval_classes import CLASSES, PromptClass
from retrieval_clips import Selection, add_noise, is_held_out, is_silent, read_waves, reconstruct, select, unpadded
from retrieval_loss import held_out_loss, other_clip
from retrieval_report import draw_grid, report
from retrieval_scores import Prototypes, score, wilson

import siren
from siren.codec_error import log_mel_distance
from siren.data.clips import ClipRecord
from siren.data.tokens import split


@settings(max_examples=100, derandomize=True, deadline=None)
@given(data=st.data(), trials=st.integers(1, 500))
def test_wilson_solves_its_equation(data: st.DataObject, trials: int) -> None:
    """At both ends p of the interval the share is 1.96 standard deviations of p away, which defines it."""
    successes = data.draw(st.integers(0, trials))
    share = successes / trials
    low, high = wilson(successes, trials)
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        if 1e-9 < p < 1 - 1e-9:
            assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / trials, rel=1e-6)
    with pytest.raises(InputError):
        wilson(trials + 1, trials)


def test_prototypes_leave_the_query_out() -> None:
    """A reference clip that is a query too is not compared with itself: here it is alone in its direction."""
    axes = np.eye(4)
    references = [axes[0], 5 * axes[0], 2 * axes[1], 7 * axes[2]]  # lengths do not count
    prototypes = Prototypes(references, [0, 0, 1, 1], ["a", "b", "c", "d"], 2)
    half = 0.5**0.5
    got = prototypes.similarities([axes[1], axes[1], axes[0], 3 * (axes[0] + axes[3])], ["c", None, "a", None])
    np.testing.assert_allclose(got, [[0, 0], [0, half], [1, 0], [half, 0]], atol=1e-12)
    with pytest.raises(InputError, match="at least two"):
        Prototypes(references, [0, 0, 0, 1], ["a", "b", "c", "d"], 2)
    with pytest.raises(InputError, match="id of its own"):
        Prototypes(references, [0, 0, 1, 1], ["a", "a", "c", "d"], 2)


def test_score_by_hand() -> None:
    """Three sounds of three classes: one right, one wrong, one whose own class ties with another, which is a miss."""
    similarities = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.5, 0.5]])
    got = score(similarities, [0, 1, 2], ["x", "y", "z"])
    assert (got["hits"], got["sounds"]) == (1, 3)
    assert got["own"] == pytest.approx((0.9 + 0.3 + 0.5) / 3)
    assert got["other"] == pytest.approx((0.1 + 0.2 + 0.8 + 0.1 + 0.1 + 0.5) / 6)
    assert got["auc"] == pytest.approx((2 + 1 + 1.5) / 6)
    assert got["classes"] == {"x": [1, 1], "y": [0, 1], "z": [0, 1]}
    assert sorted(got["confusions"]) == [["y", "x", 1], ["z", "none", 1]]
    silent = score(np.zeros((4, 2)), [0, 0, 1, 1], ["x", "y"])  # near to no class, also not to the first
    assert silent["hits"] == 0 and silent["auc"] == 0.5


def test_sounds_of_a_class_are_one_trial() -> None:
    """25 equal sounds of each of 4 classes, two of which are taken for one another, say no more than 4 sounds do."""
    similarities, labels = np.eye(4)[[0, 1, 3, 2]], [0, 1, 2, 3]
    names = ["a", "b", "c", "d"]
    one, many = score(similarities, labels, names), score(similarities.repeat(25, axis=0), np.repeat(labels, 25), names)
    assert many["interval_by_class"] == one["interval_by_class"] == one["interval"] == list(wilson(2, 4))
    assert many["interval"] == list(wilson(50, 100))
    assert many["shuffled"] == one["shuffled"]
    assert many["shuffled"]["p"] == pytest.approx(7 / 24, abs=0.04)  # orders of 4 that leave two or more in place


def test_score_of_chance_and_of_a_perfect_match() -> None:
    """20 classes and 5 sounds each: sounds that know nothing score near 0.05, p says so; perfect ones never by luck."""
    labels = np.repeat(np.arange(20), 5)
    names = [str(i) for i in range(20)]
    blind = score(np.random.default_rng(1).standard_normal((100, 20)), labels.tolist(), names)
    assert blind["top1"] < 0.12 and blind["shuffled"]["p"] > 0.05
    assert blind["auc"] == pytest.approx(0.5, abs=0.08)
    perfect = score(np.eye(20)[labels], labels.tolist(), names)
    assert perfect["top1"] == 1 and perfect["auc"] == 1 and perfect["shuffled"]["p"] == pytest.approx(1 / 2001)
    assert perfect["shuffled"]["top1"] == pytest.approx(0.05, abs=0.005)
    assert perfect["confusions"] == []
    low, _ = perfect["interval"]
    assert low == pytest.approx(100 / (100 + 1.959964**2))


def records(count: int, label: str = "bell", folder: Path = Path("folder")) -> list[ClipRecord]:
    return [ClipRecord(f"{label}-{i}", folder / f"{label}-{i}.wav", ("a bell",), label) for i in range(count)]


def test_selection() -> None:
    """Held-out clips are queries first and never references; training clips fill up; the list's order is no matter."""
    clips = records(60) + records(30, "rain")
    picked = select(clips, PromptClass("bell", "", "procedural"), 24, 5, 0.2)
    assert picked == select(clips[::-1], PromptClass("bell", "", "procedural"), 24, 5, 0.2)
    assert len(picked.references) == 24 and len(picked.queries) == 5 and picked.held_out == 5
    assert all(is_held_out(clip.id, 0.2) for clip in picked.queries)
    assert not any(is_held_out(clip.id, 0.2) for clip in picked.references)
    assert {clip.label for clip in picked.references + picked.queries} == {"bell"}
    few = select(records(4), PromptClass("bell", "", "recordings"), 24, 5, 0)
    assert len(few.references) == 4 and len(few.queries) == 4 and few.held_out == 0
    with pytest.raises(InputError, match="3 clips of the recordings have the label 'bell'"):
        select(records(3), PromptClass("bell", "", "recordings"), 24, 5, 0)


class FakeTokens:
    """As a token set: clip i has 5 + i frames and prompt value i; classes take turns."""

    path = "fake"
    num_codebooks = 2

    def __init__(self, clips: int, classes: int) -> None:
        self.clips, self.classes = clips, classes
        self.frames = np.arange(clips) + 5

    def __len__(self) -> int:
        return self.clips

    def clip_id(self, i: int) -> str:
        return f"clip-{i // 2}#{i % 2}"

    def label(self, i: int) -> str | None:
        return f"class {i % self.classes}" if self.classes else None

    def captions(self, i: int) -> list[str]:
        return [f"caption {i % 2}"]

    def codes(self, i: int, start: int, stop: int) -> np.ndarray:
        return np.full((2, stop - start), i, np.int16)

    def prompt(self, i: int, variant: int) -> torch.Tensor:
        return torch.full((1 + i % 3, 4), float(i))


def test_held_out_rule_is_that_of_the_split() -> None:
    tokens = FakeTokens(400, 3)
    _, validation = split(tokens, 0.07)
    assert [i for i in range(400) if is_held_out(tokens.clip_id(i), 0.07)] == validation.tolist()
    assert 0 < len(validation) < 100


def test_held_out_loss() -> None:
    """A mean over frames, not over batches, of the validation clips alone; shuffled prompts are of another class."""

    class Config:
        max_seq_len, max_prompt_len = 40, 2

    class Model:
        config = Config()

        def loss(
            self, codes: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor, mask: torch.Tensor
        ) -> torch.Tensor:
            assert codes.dtype == torch.int64 and codes.shape[2] == mask.shape[1] <= 40
            assert prompt.shape[:2] == prompt_mask.shape and prompt.shape[1] <= 2
            first = codes[:, 0, 0].float()
            off = (prompt[:, 0, 0] - first).abs() % 3
            weights = mask.sum(dim=1) / mask.sum()
            return torch.stack([(first * weights).sum(), (off * weights).sum()])[None]

    tokens = FakeTokens(300, 3)
    got = held_out_loss(Model(), tokens, 0.2)
    _, clips = split(tokens, 0.2)
    frames = np.minimum(tokens.frames[clips], 40)
    assert (got["clips"], got["frames"]) == (len(clips), frames.sum())
    assert got["own"] == pytest.approx([(clips * frames).sum() / frames.sum(), 0])
    assert got["shuffled"][0] == pytest.approx(got["own"][0]) and got["shuffled"][1] > 0.9
    without_labels = FakeTokens(10, 0)
    assert other_clip(without_labels, [0, 2, 4, 5], 1) == 5  # the others share its caption
    with pytest.raises(InputError, match="too few"):
        held_out_loss(Model(), FakeTokens(300, 1), 0.2)


def test_waves_and_reconstructions(tmp_path: Path) -> None:
    """All sounds get one length at the codec's rate; what a codec adds or lacks at the end is cut or padded."""
    soundfile = pytest.importorskip("soundfile")
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 16000).astype(np.float32)
    clips = records(2, folder=tmp_path)
    soundfile.write(clips[0].path, tone, 16000, subtype="FLOAT")
    soundfile.write(clips[1].path, np.tile(tone, 4), 16000, subtype="FLOAT")
    short, long = read_waves(clips, 16000, 1.0)
    np.testing.assert_array_equal(short, np.pad(tone, (0, 8000)))
    np.testing.assert_array_equal(long, np.tile(tone, 2))
    assert [len(wave) for wave in read_waves(clips, 24000, 0.7)] == [16800, 16800]

    class FakeCodec:
        device = torch.device("cpu")

        def encode(self, wave: torch.Tensor) -> torch.Tensor:
            return wave

        def decode(self, wave: torch.Tensor) -> torch.Tensor:
            return -torch.cat([wave, wave], dim=2)[..., : 15000 if wave[0, 0, -1] == 0 else 17000]

    cut, longer = reconstruct(FakeCodec(), [short, long])
    np.testing.assert_array_equal(cut, np.pad(-short[:15000], (0, 1000)))
    np.testing.assert_array_equal(longer, -long)


def test_measure(tmp_path: Path) -> None:
    """Tones of three classes and an embedding that hears their pitch: real and coded sounds find their class, and so do
    generated ones but for two, made with another class's pitch. The codec halves the level.
    """
    soundfile = pytest.importorskip("soundfile")
    chosen = [PromptClass(name, f"a {name} tone", "procedural") for name in ("low", "middle", "high")]
    sounding = 5000  # samples of a real clip; the rest of its 8000 is padding

    def tone(kind: int, variant: int) -> np.ndarray:
        hertz = (300, 900, 2700)[kind] * (1 + 0.01 * variant)
        return np.sin(2 * np.pi * hertz * np.arange(8000) / 16000).astype(np.float32)

    selections = []
    for kind, wanted in enumerate(chosen):
        clips = records(6, wanted.label, tmp_path)
        for variant, clip in enumerate(clips):
            soundfile.write(clip.path, tone(kind, variant)[:sounding], 16000, subtype="FLOAT")
        selections.append(Selection(clips[:5], clips[4 - kind :], 1))  # of uneven numbers; some are references too

    class Events:
        def embed(self, waves: list[np.ndarray], sample_rate: int, progress: bool) -> np.ndarray:
            assert sample_rate == 16000
            spectra = np.abs(np.fft.rfft(np.stack(waves)))[:, :4000]
            return spectra.reshape(len(waves), 10, 400).max(axis=2)

    class Codec:
        device = torch.device("cpu")

        def encode(self, wave: torch.Tensor) -> torch.Tensor:
            return wave

        def decode(self, wave: torch.Tensor) -> torch.Tensor:
            return wave / 2

    made = [tone(0, 0), tone(0, 9), tone(1, 0), tone(2, 0), tone(2, 9), tone(0, 0)]  # two for each class
    audio = siren.Audio(torch.from_numpy(np.stack(made))[:, None], 16000, torch.zeros(6, 12, 25, dtype=torch.int64))
    value, examples = measure(chosen, selections, Codec(), Events(), audio, 2)
    assert value["references"] == 15 and value["held_out_queries"] == 3
    assert value["retrieval"]["real"]["classes"] == {"low": [2, 2], "middle": [3, 3], "high": [4, 4]}
    assert value["retrieval"]["codec"]["hits"] == 9
    assert value["retrieval"]["generated"]["classes"] == {"low": [2, 2], "middle": [1, 2], "high": [1, 2]}
    assert sorted(value["retrieval"]["generated"]["confusions"]) == [["high", "low", 1], ["middle", "high", 1]]
    clips = [tone(kind, variant)[:sounding] for kind in range(3) for variant in range(4 - kind, 6)]
    wanted = [log_mel_distance(*map(torch.from_numpy, (clip, clip / 2)), 16000) for clip in clips]
    assert value["codec_log_mel_db"]["mean"] == pytest.approx(np.mean(wanted), rel=1e-5)  # the padding does not count
    assert value["silent"] == 0
    plain = value["retrieval_without_noise"]  # this embedding hardly hears the noise, but it is there
    assert plain["real"]["hits"] == 9 and plain["real"]["own"] != value["retrieval"]["real"]["own"]
    for kind, (real, coded, generated) in enumerate(examples):
        np.testing.assert_array_equal(real, np.pad(tone(kind, 4 - kind)[:sounding], (0, 8000 - sounding)))
        np.testing.assert_array_equal(coded, real / 2)
        np.testing.assert_array_equal(generated, made[2 * kind])

    # The noise that silence gets is near to something, here to the low tone; it is a miss all the same.
    made[0] = np.zeros_like(made[0])
    made[1] = np.full_like(made[1], 1e-5)  # nothing in a 16-bit file
    audio = siren.Audio(torch.from_numpy(np.stack(made))[:, None], 16000, torch.zeros(6, 12, 25, dtype=torch.int64))
    value, _ = measure(chosen, selections, Codec(), Events(), audio, 2)
    assert value["silent"] == 2
    for name in ("retrieval", "retrieval_without_noise"):
        assert value[name]["generated"]["classes"] == {"low": [0, 2], "middle": [1, 2], "high": [1, 2]}
        assert ["low", "none", 2] in value[name]["generated"]["confusions"]


def test_noise() -> None:
    """Sounds differ in nothing but themselves: one peak, and the same noise 60 dB below, also under silence."""
    wave = np.zeros(16000, np.float32)
    wave[100] = -0.25
    silence = add_noise(np.zeros(16000, np.float32), 1e-3)
    assert silence.dtype == np.float32 and 20 * np.log10(silence.std()) == pytest.approx(-60, abs=0.2)
    np.testing.assert_allclose(add_noise(wave, 1e-3) - silence, 4 * wave, atol=1e-6)
    np.testing.assert_array_equal(add_noise(wave, 0), 4 * wave)


def test_picked_classes() -> None:
    assert pick_classes("") == list(CLASSES)
    assert pick_classes(f"{CLASSES[3].label}, {CLASSES[0].label}") == [CLASSES[3], CLASSES[0]]
    with pytest.raises(InputError, match="no class 'nothing'; there are"):
        pick_classes(f"{CLASSES[3].label},nothing")
    for labels in ("rain", "rain,wolf,rain"):
        with pytest.raises(InputError, match="two labels or more"):
            pick_classes(labels)


def test_files_and_prompts(tmp_path: Path) -> None:
    """What would fail after the work fails before it; prompts that training may have read are named."""
    check_files([tmp_path / "a" / "b" / "out.json"])
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(InputError, match="is a folder"):
        check_files([tmp_path / "a"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        check_files([tmp_path / "file" / "out.json"])
    chosen = [PromptClass("bell", "A bell", "recordings"), PromptClass("rain", "rain on a roof", "procedural")]
    assert known_prompts(chosen, records(2) + records(2, "rain")) == ["bell"]


def test_silence_and_padding() -> None:
    quiet = np.full(10, 1 / 32767, np.float32)
    assert not is_silent(quiet) and is_silent(quiet / 3) and is_silent(np.zeros(10, np.float32))
    assert unpadded(np.array([0, 1, 0, -1, 0, 0], np.float32)) == 4
    assert unpadded(np.zeros(5, np.float32)) == 1


def test_report_and_picture() -> None:
    """The tables hold the numbers; the picture is a small PNG."""
    similarities = np.eye(2)[[0, 0, 1, 0]]
    made = score(similarities, [0, 0, 1, 1], ["bell", "rain"])
    worse = score(similarities, [0, 1, 1, 1], ["bell", "rain"])
    options = {"model": "m", "seeds": 2, "seconds": 4.0, "temperature": 1.0, "top_k": 0, "top_p": 0.9}
    value = {
        "about": {
            "options": options | {"guidance_scale": 3.0, "first_seed": 0, "val_fraction": 0.04},
            "embedding": "aisfx-0.1.2 sha256:" + "0" * 64,
            "date": "2026-01-01T00:00",
            "commit": "abc",
        },
        "classes": [
            {"label": "bell", "prompt": "a bell", "source": "recordings"},
            {"label": "rain", "prompt": "rain", "source": "procedural"},
        ],
        "references": 9,
        "held_out_queries": 3,
        "prompts_that_are_captions": ["rain"],
        "silent": 1,
        "noise": 1e-3,
        "retrieval": {"real": made, "codec": made, "generated": made},
        "retrieval_without_noise": {"real": worse, "codec": worse, "generated": worse},
        "codec_log_mel_db": {"mean": 3.14159, "median": 2.0},
        "loss": {"clips": 7, "frames": 99, "own": [1.0, 2.0], "shuffled": [3.0, 4.0]},
    }
    text = report(value)
    assert "| generated from the prompt | 3 of 4 (0.75) | 0.30 to 0.95 | 0.20 to 0.97 |" in text
    assert "1 of 2 synthetic sound" in text and "word for word: rain." in text and "are misses: 1." in text
    assert "| generated from the prompt, without the noise | 2 of 4 (0.50) |" in text and "Noise of -60 dB" in text
    assert "| rain (procedural) | rain | 1 of 2 | 1 of 2 | 1 of 2 |" in text
    assert "rain as bell (1)" in text and "3.14 dB" in text
    assert "| another clip's prompt | 3.00 | 4.00 | 3.500 |" in text
    pytest.importorskip("matplotlib")
    noise = np.random.default_rng(0).standard_normal((6, 3, 64000)).astype(np.float32)
    picture = draw_grid([(f"prompt {i} for $5", *rows) for i, rows in enumerate(noise)], 16000)
    from PIL import Image

    assert Image.open(io.BytesIO(picture)).size[0] == 800
    assert 10_000 < len(picture) < 200_000  # noise is the worst case


def test_classes() -> None:
    """20 classes with prompts and labels of their own, at least 5 of them recordings."""
    assert len({kind.label for kind in CLASSES}) == len({kind.prompt for kind in CLASSES}) == len(CLASSES) == 20
    assert {kind.source for kind in CLASSES} == {"recordings", "procedural"}
    assert sum(kind.source == "recordings" for kind in CLASSES) >= 5
