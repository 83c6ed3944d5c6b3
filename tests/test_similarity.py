"""CLAP similarity: it is transformers' CLAP, alone and in any company, and what the thresholds and crops keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import edit_config, edit_weights, leave_only_a_pickle
from safetensors.torch import load_file, save_file

from siren.data.similarity import (
    CROP_THRESHOLD,
    THRESHOLD_1_6B,
    THRESHOLD_3_1B,
    ClapSimilarity,
    crop_starts,
    reserve_top,
    select,
)
from siren.errors import CheckpointError, InputError

transformers = pytest.importorskip("transformers")

RATE = 16000
WORDS = ["a", "dog", "barks", "rain", "on", "tin", "roof"]


def save_clap(folder: Path, fusion: bool) -> None:
    """A tiny CLAP with random weights that hears 2 s, its tokenizer and its extractor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    text = {"vocab_size": 16, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio = {"hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2]}
    audio |= {"num_mel_bins": 16, "spec_size": 64, "enable_fusion": fusion, "fusion_type": "aff_2d" if fusion else None}
    text |= {"intermediate_size": 20, "max_position_embeddings": 14}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.ClapModel(config)
        for parameter in model.parameters():  # with the default's small numbers all texts look alike
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    truncation = "fusion" if fusion else "rand_trunc"
    transformers.ClapFeatureExtractor(feature_size=16, max_length_s=2, truncation=truncation).save_pretrained(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["unfused", "fused"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("claps") / "tiny-clap"
    save_clap(path, request.param)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The folder's files, to be spoilt."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def sounds(*seconds: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal(round(s * RATE)) * np.sin(np.arange(round(s * RATE)) * s)).astype("f") for s in seconds
    ]


def test_similarity_is_that_of_transformers(folder: Path) -> None:
    """The cosine of transformers' own features, sound by sound and text by text, at 48 kHz."""
    clap = ClapSimilarity.from_pretrained(folder)
    model = transformers.ClapModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    waves, captions = sounds(2, 0.7, 1.3), ["a dog barks", "rain on a tin roof", "rain"]
    wanted = []
    for wave, caption in zip(waves, captions, strict=True):
        inputs = extractor(soxr.resample(wave, RATE, 48000), sampling_rate=48000, return_tensors="pt")
        inputs["is_longer"] = torch.tensor([[False]])
        inputs["input_features"] = inputs["input_features"].float()
        with torch.no_grad():
            sound = model.get_audio_features(**inputs)
            text = model.get_text_features(**tokenizer(caption, return_tensors="pt"))
        sound, text = (f if isinstance(f, torch.Tensor) else f.pooler_output for f in (sound, text))
        wanted.append(float(torch.nn.functional.cosine_similarity(sound, text)))
    scores = clap.similarity(waves, captions, RATE)
    assert scores.dtype == np.float32 and np.ptp(scores) > 0.01  # the model tells them apart
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
    assert clap.identity.startswith("tiny-clap sha256:") and clap.max_seconds == 2


def test_a_score_does_not_depend_on_company_or_global_randomness(folder: Path) -> None:
    clap = ClapSimilarity.from_pretrained(folder)
    waves, captions = sounds(0.4, 2, 1), ["rain", "a dog", "rain"]
    state = torch.random.get_rng_state()
    together = clap.similarity(waves, captions, RATE)
    for seed, i in enumerate([2, 0, 1]):
        np.random.seed(seed)  # noqa: NPY002 -- the extractor draws from it
        fresh = ClapSimilarity.from_pretrained(folder)
        assert fresh.similarity([waves[i]], [captions[i]], RATE)[0] == together[i]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert clap.similarity([], [], RATE).shape == (0,)


def test_long_captions_are_cut_and_any_rate_is_resampled(folder: Path) -> None:
    clap = ClapSimilarity.from_pretrained(folder)
    (wave,) = sounds(1)
    short, long = "rain " * 10, "rain " * 50  # 12 tokens fit, two of them are the ends
    assert clap.similarity([wave], [short], RATE) == clap.similarity([wave], [long], RATE)
    assert np.isfinite(clap.similarity([wave], ["rain"], 44100)).all()
    assert np.isfinite(clap.similarity([np.ones(1, np.float32)], ["rain"], RATE)).all()


def test_wrong_sounds_and_captions_are_refused(folder: Path) -> None:
    clap = ClapSimilarity.from_pretrained(folder)
    (wave,) = sounds(2)
    broken = wave.copy()
    broken[5] = np.nan
    for waves, captions, reason in (
        ([wave], ["a", "b"], "1 waveforms and 2 captions"),
        ([np.append(wave, wave[:160])], ["a"], "hears 2 s at most, not 2.01 s"),
        ([wave[:0]], ["a"], "one or more samples"),
        ([wave[None]], ["a"], "one or more samples"),
        ([wave.astype(np.int16)], ["a"], "floating-point"),
        ([broken], ["a"], "NaN"),
        ([wave], [" "], "a caption is empty"),
    ):
        with pytest.raises(InputError, match=reason):
            clap.similarity(waves, captions, RATE)


def no_extractor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def other_extractor(folder: Path) -> None:
    transformers.ClapFeatureExtractor(feature_size=64).save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def flipped(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[9] ^= 255
    (folder / "model.safetensors").write_bytes(data)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (leave_only_a_pickle, "pytorch_model.bin is a pickle"),
    "other model": (lambda f: edit_config(f, model_type="bert"), "model_type must be clap, not 'bert'"),
    "wrong sizes": (lambda f: edit_config(f, projection_dim=9), "shape"),
    "no sizes": (lambda f: edit_config(f, audio_config={"depths": 3}), "does not describe a CLAP model"),
    "missing": (lambda f: edit_weights(f, {"text_projection.linear1.weight": None}), "lacks text_projection"),
    "unknown": (lambda f: edit_weights(f, {"other": torch.zeros(1)}), "has unknown other"),
    "NaN": (lambda f: edit_weights(f, {"logit_scale_a": torch.tensor(math.nan)}), "NaN"),
    "damaged": (flipped, "damaged"),
    "no extractor": (no_extractor, r"no usable preprocessor_config.json"),
    "other extractor": (other_extractor, "gives 64 mel bands, its model has 16"),
    "no tokenizer": (no_tokenizer, "no usable tokenizer"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_spoilt_folders_are_refused(copied: Path, spoilt: str) -> None:
    """One clear line; above all no model whose tensors are made up."""
    spoil, reason = SPOILT[spoilt]
    spoil(copied)
    with pytest.raises(CheckpointError, match=reason) as caught:
        ClapSimilarity.from_pretrained(copied)
    assert "\n" not in str(caught.value) and not (copied / "run").exists()


def test_older_files_load(copied: Path) -> None:
    """Position tables and half precision, as in older checkpoints; fields that name code are not followed."""
    before = ClapSimilarity.from_pretrained(copied)
    state = load_file(copied / "model.safetensors")
    halves = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    halves["text_model.embeddings.position_ids"] = torch.arange(14)[None]
    save_file(halves, copied / "model.safetensors")
    edit_config(copied, auto_map={"AutoModel": "owner/code--model.Model"}, attn_implementation="owner/kernel")
    after = ClapSimilarity.from_pretrained(copied)
    args = (sounds(1), ["a dog"], RATE)
    assert abs(before.similarity(*args) - after.similarity(*args)) < 0.02
    assert before.identity != after.identity


def test_thresholds_of_the_paper() -> None:
    scores = np.array([0.41, 0.40, 0.399, 0.35, 0.349, np.nan, -1], np.float64)
    assert select(scores, THRESHOLD_1_6B).tolist() == [0, 1]
    assert select(scores, THRESHOLD_3_1B).tolist() == [0, 1, 2, 3]
    assert CROP_THRESHOLD == 0.20 and select([], 0.4).tolist() == []


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.5]), max_size=30), st.integers(0, 35))
def test_the_reserve_is_the_best(scores: list[float], count: int) -> None:
    """As many as asked for, none below one that is left, the earlier of equals, in order."""
    kept = reserve_top(scores, count).tolist()
    assert kept == sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def test_the_reserve_refuses_nan() -> None:
    with pytest.raises(InputError, match="numbers"):
        reserve_top([0.1, math.nan], 1)
    with pytest.raises(InputError, match="0 or more"):
        reserve_top([0.1], -1)
    assert len(reserve_top(np.arange(1500.0))) == 1000


class Loudness:
    """A stand-in for CLAP: the similarity is the crop's mean, less what the caption says."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def similarity(self, waveforms: Sequence[np.ndarray], captions: Sequence[str], sample_rate: int) -> np.ndarray:
        self.lengths += [len(wave) for wave in waveforms]
        return np.array([w.mean() - float(c) for w, c in zip(waveforms, captions, strict=True)], np.float32)


def test_crops_start_where_they_sound_like_every_caption() -> None:
    """Crops of 6 frames on a grid of 5 over 20 frames; the sound is in frames 8 to 14."""
    wave = np.zeros(20 * 4 + 3, np.float32)
    wave[8 * 4 : 15 * 4] = 1
    clap = Loudness()
    starts = crop_starts(clap, wave, RATE, "0", hop_length=4, crop_frames=6, step_frames=5)
    assert starts.tolist() == [5, 10] and starts.dtype == np.int64
    assert clap.lengths == [24] * 4  # starts 0, 5, 10 and 14, the last that fits
    options = {"hop_length": 4, "crop_frames": 6, "step_frames": 5}
    assert crop_starts(clap, wave, RATE, ["0", "0.4"], **options).tolist() == [10]
    assert crop_starts(clap, wave, RATE, "0", threshold=-1, **options).tolist() == [0, 5, 10, 14]
    assert crop_starts(clap, wave, RATE, "2", **options).tolist() == []
    assert crop_starts(clap, wave[32:56], RATE, "0", **options).tolist() == [0]  # just one crop
    assert crop_starts(clap, wave[32:40], RATE, "0", **options).tolist() == [0]  # less than one
    for wrong, reason in (({"step_frames": 0}, "above 0"), ({"captions": []}, "no caption")):
        with pytest.raises(InputError, match=reason):
            crop_starts(clap, wave, RATE, **({"captions": "0"} | options | wrong))  # type: ignore[arg-type]


def test_the_default_grid_is_nine_crops_of_ten_seconds() -> None:
    clap = Loudness()
    starts = crop_starts(clap, np.ones(160_000, np.float32), RATE, "0", hop_length=320)
    assert starts.tolist() == list(range(0, 201, 25)) and set(clap.lengths) == {96_000}


def test_crops_by_clap(folder: Path) -> None:
    clap = ClapSimilarity.from_pretrained(folder)
    (wave,) = sounds(2)
    score = [clap.similarity([wave[s * 320 : (s + 50) * 320]], ["rain"], RATE)[0] for s in (0, 25, 50)]
    threshold = float(sorted(score)[1])
    wanted = [s for s, value in zip((0, 25, 50), score, strict=True) if value >= threshold]
    assert crop_starts(clap, wave, RATE, "rain", 320, 50, threshold=threshold).tolist() == wanted
