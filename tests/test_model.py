"""Siren: the official checkpoint's numbers, saving and loading, and what generate hands on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_models import random_experts, random_inputs

import siren
from siren import CheckpointError, InputError, Siren, SirenConfig
from siren import model as module

TINY = SirenConfig.preset("tiny")


def test_golden_logits_and_losses(golden, golden_model):
    with torch.no_grad():
        logits = golden_model(golden["codes"], golden["prompt"], golden["prompt_mask"])
        loss = golden_model.loss(golden["codes"], golden["prompt"], golden["prompt_mask"], golden["sequence_mask"])
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, golden["loss"].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("preset", "millions"), [("siren-1.6b", 273), ("siren-3.1b", 515)])
def test_sizes_of_the_presets(preset, millions):
    """Six experts of 273 and 515 million parameters: 1.6 and 3.1 billion."""
    with torch.device("meta"):
        model = Siren(SirenConfig.preset(preset))
    assert len(model.experts) == 6
    for expert in model.experts:
        assert round(sum(parameter.numel() for parameter in expert.parameters()) / 1e6) == millions


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
def test_losses_are_those_of_the_logits(count):
    """[K, m] for every K: cross-entropy of codebook k * m + i, a mean over the valid frames."""
    config = SirenConfig.from_dict(TINY.to_dict() | {"num_experts": count, "dim": 12, "codebook_size": 9})
    model = Siren(config)
    for expert, source in zip(model.experts, random_experts(config, 2), strict=True):
        expert.load_state_dict(source.state_dict())
    codes, prompt, mask = random_inputs(config, 2, 3, 4, 6)
    valid = torch.arange(6) < torch.tensor([[6], [1], [3]])
    logits, loss = model(codes, prompt, mask, valid), model.loss(codes, prompt, mask, valid)
    assert logits.shape == (3, 12, 6, 9)
    assert loss.shape == (count, 12 // count)
    logprobs = torch.log_softmax(logits, -1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    expected = -(logprobs * valid[:, None]).sum((0, 2)) / valid.sum()
    torch.testing.assert_close(loss.flatten(), expected)


def test_losses_train_their_own_expert_only():
    model = Siren(SirenConfig.from_dict(TINY.to_dict() | {"dim": 12, "codebook_size": 9}))
    model.loss(*random_inputs(model.config, 2, 2, 3, 4))[3].sum().backward()
    gradients = [[p.grad for p in expert.parameters() if p.grad is not None] for expert in model.experts]
    assert [any(bool(gradient.any()) for gradient in each) for each in gradients] == [k == 3 for k in range(6)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 3, "decoder_start": "learned", "conditioning": "residual"},
        {"num_experts": 12},
        {"factorized_layers": 0, "conditioning": "none"},
    ],
    ids=str,
)
def test_save_and_load(tmp_path, changes):
    """A saved model comes back with the same parameters, frozen where they were frozen, and in eval mode."""
    model = Siren(SirenConfig.from_dict(TINY.to_dict() | {"codebook_size": 9} | changes)).train()
    model.save_pretrained(tmp_path / "model")
    loaded = Siren.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name
    assert (loaded.codec_path, loaded.prompt_encoder_name) == (None, None)
    inputs = random_inputs(loaded.config, 1, 2, 3, 4)
    assert torch.equal(loaded(*inputs), model.eval()(*inputs))
    loaded.train().loss(*inputs).sum().backward()


def test_the_official_loader_accepts_what_is_saved(tmp_path, golden_model, golden_folder):
    """All config keys and manifest fields of a folder that the official code wrote; it refuses unknown config keys."""
    golden_model.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "manifest.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path / "saved", golden_folder))
        assert ours.keys() >= theirs.keys()
        assert name == "manifest.json" or ours == theirs
    assert ours["experts"][3].keys() == theirs["experts"][3].keys()


def test_codec_and_encoder_travel_along(tmp_path):
    """A codec folder is copied, a prompt encoder's name noted; loading and saving again keeps both."""
    codec = tmp_path / "codec"
    codec.mkdir()
    (codec / "config.json").write_text("{}")
    model = Siren(SirenConfig.from_dict(TINY.to_dict() | {"codebook_size": 9}))
    model.save_pretrained(tmp_path / "a", codec=codec, prompt_encoder="minilm")
    loaded = Siren.from_pretrained(tmp_path / "a")
    assert loaded.codec_path == tmp_path / "a" / "codec"
    assert loaded.prompt_encoder_name == "minilm"
    loaded.save_pretrained(tmp_path / "b")
    again = Siren.from_pretrained(str(tmp_path / "b"))
    assert (again.codec_path / "config.json").read_text() == "{}"
    assert again.prompt_encoder_name == "minilm"
    sampler = siren.Sampler.from_pretrained(tmp_path / "b", backend="reference")
    assert (sampler.codec_path, sampler.prompt_encoder_name) == (again.codec_path, "minilm")


def test_a_codec_object_is_saved(tmp_path, monkeypatch):
    class Fake(module.Codec):
        def __init__(self) -> None:
            pass

        def save_pretrained(self, folder: str | Path) -> None:
            Path(folder).mkdir()
            (Path(folder) / "marker").write_text("here")

    model = Siren(SirenConfig.from_dict(TINY.to_dict() | {"codebook_size": 9}))
    model.save_pretrained(tmp_path / "a", codec=Fake())
    assert (Siren.from_pretrained(tmp_path / "a").codec_path / "marker").read_text() == "here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype(golden_folder, dtype):
    model = Siren.from_pretrained(golden_folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_bad_arguments(golden_folder, golden_model, golden, tmp_path):
    for dtype in (torch.int8, "float32"):
        with pytest.raises(InputError, match=r"dtype must be a floating-point torch\.dtype"):
            Siren.from_pretrained(golden_folder, dtype=dtype)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(InputError, match=f"cannot use device '{device}'"):
            Siren.from_pretrained(golden_folder, device=device)
    with pytest.raises(CheckpointError, match="missing"):
        Siren.from_pretrained(tmp_path / "missing")
    with pytest.raises(InputError, match="codes must have shape"):
        golden_model(golden["codes"][:, :11], golden["prompt"])
    with pytest.raises(InputError, match="max_prompt_len is 16"):
        golden_model.loss(golden["codes"], golden["prompt"].repeat(1, 2, 1))


def test_decode_embeddings_reach_every_expert():
    model = Siren(SirenConfig.from_dict(TINY.to_dict() | {"codebook_size": 9}))
    embeddings = [(torch.randn(9, 8), torch.randn(64, 8), torch.randn(64)) for _ in range(12)]
    model.set_decode_embeddings(embeddings)
    for expert in model.experts:
        for layer, (codebook, weight, bias) in zip(expert.codebooks.layers, embeddings, strict=True):
            assert torch.equal(layer.codebook.weight, codebook)
            assert torch.equal(layer.dac_out.weight, weight)
            assert torch.equal(layer.dac_out.bias, bias)


def test_generate_hands_everything_on(monkeypatch, golden_model):
    seen = {}
    monkeypatch.setattr(module, "generate", lambda *args, **kwargs: seen.update(kwargs, args=args) or "sound")
    assert golden_model.generate("rain", seconds=2, top_k=5, threads=1) == "sound"
    assert seen.pop("args") == (golden_model, "rain")
    assert seen == {
        "seconds": 2, "seed": 0, "temperature": None, "top_k": 5, "top_p": None, "guidance_scale": None,
        "num_return_sequences": 1, "progress": True, "threads": 1,
    }  # fmt: skip
