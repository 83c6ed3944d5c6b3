"""The delay pattern: every code is where MusicGen puts it, none is seen before its time, and it is undone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_data import random_clips, write_tokens
from hypothesis import given
from hypothesis import strategies as st

from siren.config import SirenConfig
from siren.data.delay import delay, delay_tokens, undelay
from siren.data.tokens import open_tokens, split
from siren.errors import DataError, InputError
from siren.expert import Expert


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_undelay_gives_back_what_was_delayed(codebooks: int, frames: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(1, 1024, (codebooks, frames))
    delayed = delay(codes)
    assert delayed.shape == (codebooks, frames + codebooks - 1)
    assert (delayed > 0).sum() == codes.size  # no code is lost or doubled; the rest is 0
    np.testing.assert_array_equal(undelay(torch.from_numpy(delayed)[None])[0], codes)


def test_codebook_j_is_j_frames_late() -> None:
    delayed = delay(np.array([[1, 2, 3], [4, 5, 6]]))
    np.testing.assert_array_equal(delayed, [[1, 2, 3, 0], [0, 4, 5, 6]])


def test_too_few_frames() -> None:
    with pytest.raises(InputError, match="12 codebooks must have at least 12 frames, not 11"):
        undelay(torch.zeros(1, 12, 11, dtype=torch.long))


def test_what_a_delayed_model_sees_of_a_frame() -> None:
    """Codebook j of frame t depends on the codes before j of frame t and on none of the later ones."""
    config = SirenConfig(
        dim=16, n_heads=2, n_kv_heads=2, spatial_layers=1, factorized_layers=0, conditioning="none", num_experts=1,
        num_codebooks=4, codebook_size=32, prompt_dim=8, dac_code_dim=4, dac_feature_dim=8, ffn_multiple_of=8,
        dropout=0.0, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    expert = Expert(config, 0).eval()
    for layer in expert.codebooks.layers:
        torch.nn.init.normal_(layer.codebook.weight)
    codes, prompt = np.random.default_rng(0).integers(0, 32, (4, 6)), torch.randn(1, 3, 8)

    def logprobs(codes: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return undelay(expert.logits(torch.from_numpy(delay(codes))[None], prompt, None, None).movedim(3, 0)[:, 0])

    before = logprobs(codes)  # [32, 4, 6]
    frame, changed = 2, 1
    other = codes.copy()
    other[changed, frame] = (other[changed, frame] + 1) % 32
    moved = (logprobs(other) != before).any(dim=0)
    assert moved[2:, frame].all() and not moved[: changed + 1, frame].any()
    assert not moved[:, :frame][: changed + 1].any()


def test_a_delayed_token_set(tmp_path: Path) -> None:
    """The same clips on the same sides, longer by the delay, with captions, prompts and labels."""
    source = open_tokens(write_tokens(tmp_path / "tokens", [random_clips(5), random_clips(3, seed=1)]))
    delayed = open_tokens(delay_tokens(source.path, tmp_path / "delayed"))
    assert [delayed.clip_id(i) for i in range(8)] == [source.clip_id(i) for i in range(8)]
    assert delayed.codec_identity == source.codec_identity and delayed.encoder_identity == source.encoder_identity
    np.testing.assert_array_equal(delayed.frames, source.frames + 11)
    for ours, theirs in zip(split(delayed, 0.4), split(source, 0.4), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for i in range(8):
        codes = torch.from_numpy(delayed.codes(i, 0, int(delayed.frames[i])).astype(np.int64))
        np.testing.assert_array_equal(undelay(codes[None])[0], source.codes(i, 0, int(source.frames[i])))
        assert delayed.captions(i) == source.captions(i) and delayed.label(i) == source.label(i)
        for variant in range(len(source.captions(i) or ())):
            assert torch.equal(delayed.prompt(i, variant), source.prompt(i, variant))


def test_it_replaces_its_own_and_nothing_else(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens", [random_clips(2)])
    other = write_tokens(tmp_path / "other", [random_clips(3, seed=1)])
    delay_tokens(folder, tmp_path / "delayed")
    delay_tokens(other, tmp_path / "delayed")
    assert len(open_tokens(tmp_path / "delayed")) == 3
    with pytest.raises(DataError, match="not delayed; choose another folder"):
        delay_tokens(folder, other)
    with pytest.raises(DataError, match="there is no token set"):
        delay_tokens(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()
