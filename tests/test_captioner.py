"""Captioners: any callable works, what it gives is checked, polished and cleaned, and the paper's models are driven.

The models are of the real classes, tiny and random: what they write is noise, but prompt, sound, seeds and decoding
are as with the real weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from siren.data.captioner import PROMPT, Qwen2AudioCaptioner, QwenPolisher, describe, load_captioner
from siren.errors import CheckpointError, InputError, MissingDependencyError

transformers = pytest.importorskip("transformers")

RATE = 16000
WAVES = [np.sin(np.arange(size) * 0.05).astype(np.float32) * 0.3 for size in (4000, 9000)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}<|im_start|>assistant "
)
TEXT = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}


def byte_tokenizer() -> Any:
    """A tokenizer of bytes with Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    return fast


def save_captioner(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    audio = {"num_mel_bins": 8, "d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 8}
    config = transformers.Qwen2AudioConfig(
        audio_config=audio,
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, return_attention_mask=True)
    transformers.Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captioner")
    save_captioner(path)
    return path


@pytest.fixture(scope="module")
def polisher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("polisher")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_any_callable_is_a_captioner() -> None:
    """Candidates are polished, cleaned and made distinct, and reasons are given."""

    def captioner(waveforms: Any, sample_rate: int) -> list[list[str]]:
        assert sample_rate == RATE
        return [[f"The audio contains {len(wave)} bells.", "雨", "a bell", "A bell."] for wave in waveforms]

    assert describe(captioner, WAVES, RATE) == [
        (["4000 bells", "a bell"], ["not English"]),
        (["9000 bells", "a bell"], ["not English"]),
    ]
    polished = describe(captioner, WAVES[:1], RATE, lambda texts: [text.replace("bell", "gong") for text in texts])
    assert polished == [(["4000 gongs", "a gong"], ["not English"])]
    assert describe(lambda waves, rate: [[] for _ in waves], WAVES, RATE) == [([], []), ([], [])]


@pytest.mark.parametrize("given", [None, [], [["a"]], [["a"], "b"], [["a"], [1]], (["a"], ["b"])])
def test_what_a_captioner_gives_is_checked(given: Any) -> None:
    with pytest.raises(InputError, match="the captioner must give a list of"):
        describe(lambda waves, rate: given, WAVES, RATE)
    with pytest.raises(InputError, match="the polisher must give a list of 2 str"):
        describe(lambda waves, rate: [["a", "b"], ["c", "d"]], WAVES, RATE, lambda texts: texts[:1])


def test_qwen2_audio_gets_the_prompt_and_the_sound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five candidates a clip; the model is asked with the paper's prompt and one place for every 40 ms of sound."""
    captioner = Qwen2AudioCaptioner.from_pretrained(folder, max_new_tokens=6)
    asked: list[Any] = []
    generate = captioner.model.generate
    monkeypatch.setattr(captioner.model, "generate", lambda **options: asked.append(options) or generate(**options))
    candidates = captioner(WAVES, RATE)
    assert [len(texts) for texts in candidates] == [5, 5]
    assert len(set(candidates[0])) > 1 and candidates[0] != candidates[1]
    for wave, options in zip(WAVES, asked, strict=True):
        ids = options["input_ids"][0]
        assert captioner.processor.tokenizer.decode(ids, skip_special_tokens=True) == f"user {PROMPT}assistant "
        places = int((ids == captioner.model.config.audio_token_index).sum())
        assert abs(places - len(wave) / RATE / 0.04) <= 1
        assert options["input_features"].shape[:2] == (1, 8) and options["max_new_tokens"] == 6
    assert describe(captioner, WAVES, RATE)[0][0] == describe(captioner, WAVES[:1], RATE)[0][0]


def test_candidates_depend_on_the_clip_and_the_seed_alone(folder: Path) -> None:
    captioner = Qwen2AudioCaptioner.from_pretrained(folder, max_new_tokens=6, candidates=3)
    state = torch.random.get_rng_state()
    both = captioner(WAVES, RATE)
    torch.rand(3)
    assert captioner(WAVES[1:], RATE) == both[1:]
    assert load_captioner(folder)(WAVES[:1], RATE)[0] != both[0]  # five, and longer
    torch.random.set_rng_state(state)
    captioner(WAVES[:1], RATE)
    assert torch.equal(torch.random.get_rng_state(), state)
    captioner.seed = 1
    assert captioner(WAVES[:1], RATE) != both[:1]
    assert captioner([WAVES[0].repeat(2)], 2 * RATE)[0] != []


def test_the_polisher_rewrites_each_alone(polisher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polisher = QwenPolisher.from_pretrained(polisher_folder, max_new_tokens=5)
    asked: list[str] = []
    generate = polisher.model.generate

    def record(**options: Any) -> Any:
        asked.append(polisher.tokenizer.decode(options["input_ids"][0]))
        return generate(**options)

    monkeypatch.setattr(polisher.model, "generate", record)
    together = polisher(["rain falls", "a dog"])
    assert together == [*polisher(["rain falls"]), *polisher(["a dog"])] and polisher([]) == []
    assert asked[0].endswith("\n\nrain falls<|im_end|><|im_start|>assistant ") and asked[1].count("a dog") == 1
    assert "at most 20 words" in asked[0]


def test_captioners_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_captions")
    module.loud = lambda waves, rate: [["loud"] for _ in waves]  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_captions", module)
    assert load_captioner("my_captions:loud")(WAVES, RATE) == [["loud"], ["loud"]]
    for name, reason in (
        ("my_captions:quiet", "quiet"),
        ("no_such_module:f", "no_such_module"),
        ("my_captions:number", "called"),
    ):
        with pytest.raises(InputError, match=reason):
            load_captioner(name)


def test_folders_that_hold_no_captioner(folder: Path, polisher_folder: Path, tmp_path: Path) -> None:
    """Missing files, another kind of model, and tensors that transformers would make up."""
    from safetensors.torch import load_file, save_file

    with pytest.raises(CheckpointError, match="no folder"):
        Qwen2AudioCaptioner.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        Qwen2AudioCaptioner.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not hold a captioner: model_type must be qwen2_audio, not 'qwen2'"):
        Qwen2AudioCaptioner.from_pretrained(polisher_folder)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in sorted(state) if "projector" in name)
    save_file({k: v for k, v in state.items() if k != dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks .*projector.* and 0 more"):
        Qwen2AudioCaptioner.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match="does not hold a captioner in the transformers format"):
        Qwen2AudioCaptioner.from_pretrained(tmp_path)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"siren\[text\]"):
        QwenPolisher.from_pretrained(tmp_path)
