"""The codec: Descript's file gives Descript's numbers, no damage loads silently, and nothing in a file is run."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import Payload, edit_config, edit_weights, leave_only_a_pickle
from safetensors.torch import load_file, save_file

import siren.codec as codec_module
from siren.codec import Codec
from siren.errors import CheckpointError, InputError, MissingDependencyError

transformers = pytest.importorskip("transformers")

GOLDEN = Path(__file__).parent / "data" / "descript-dac-small"
PTH = GOLDEN / "weights_16khz_small.pth"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_descript(PTH)


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "dac_vectors.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def content() -> dict:
    return torch.load(PTH, weights_only=True)


@pytest.fixture
def folder(codec: Codec, tmp_path: Path) -> Path:
    codec.save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


def noise(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed)).mul(0.3).clamp(-1, 1)


def random_codes(codec: Codec, batch: int, frames: int, seed: int = 0) -> torch.Tensor:
    shape = (batch, codec.num_codebooks, frames)
    return torch.randint(codec.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_codes_equal_those_of_descript(codec: Codec, vectors: dict) -> None:
    codes = codec.encode(torch.from_numpy(vectors["audio"])[None, None])
    assert codes.dtype == torch.int64
    np.testing.assert_array_equal(codes, vectors["codes"])


def test_sound_equals_that_of_descript_and_is_filled_up_to_whole_frames(codec: Codec, vectors: dict) -> None:
    sound = codec.decode(torch.from_numpy(vectors["codes"].astype(np.int64)))
    assert sound.shape == (1, 1, 16000)
    assert sound.dtype == torch.float32
    np.testing.assert_allclose(sound[..., :15992], vectors["decoded"], rtol=0, atol=1e-4)
    assert not sound[..., 15992:].any()


def test_decode_embeddings_equal_those_of_descript(codec: Codec, vectors: dict) -> None:
    embeddings = codec.decode_embeddings()
    assert [tuple(t.shape) for t in embeddings[0]] == [(1024, 8), (128, 8), (128,)]
    tables = torch.stack([embedding.table() for embedding in embeddings])
    np.testing.assert_allclose(tables[:, :16], vectors["embeddings_first16"], rtol=1e-6, atol=2e-6)
    codes = torch.from_numpy(vectors["codes"].astype(np.int64))[0]
    latent = sum(table[row] for table, row in zip(tables, codes, strict=True))
    np.testing.assert_allclose(latent.T[None], vectors["latent"], rtol=1e-5, atol=1e-5)


def test_decode_embeddings_are_copies(codec: Codec) -> None:
    codec.decode_embeddings()[0].codebook.zero_()
    assert codec.decode_embeddings()[0].codebook.any()


@settings(max_examples=12, deadline=None)
@given(samples=st.integers(1, 2000), seed=st.integers(0, 99))
def test_any_length_gives_whole_frames_as_if_followed_by_silence(samples: int, seed: int) -> None:
    codec = _shared()
    clip = noise(1, samples, seed)
    frames = -(-samples // codec.hop_length)
    codes = codec.encode(clip)
    assert codes.shape == (1, 12, frames)
    filled = torch.cat([clip, torch.zeros(1, 1, frames * codec.hop_length - samples)], dim=2)
    assert torch.equal(codes, codec.encode(filled))
    assert codec.decode(codes).shape == filled.shape


@functools.cache
def _shared() -> Codec:  # hypothesis and fixtures do not mix well
    return Codec.from_descript(PTH)


def test_a_clip_does_not_depend_on_its_batch_or_thread(codec: Codec) -> None:
    clips = noise(7, 1234)
    codes = codec.encode(clips)
    sound = codec.decode(codes)
    with ThreadPoolExecutor(4) as pool:
        for i, alone in enumerate(pool.map(lambda i: codec.encode(clips[i : i + 1]), range(7))):
            assert torch.equal(alone[0], codes[i])
        for i, alone in enumerate(pool.map(lambda i: codec.decode(codes[i : i + 1]), range(7))):
            assert torch.equal(alone[0], sound[i])


def test_results_can_be_used_in_training(codec: Codec) -> None:
    codes = codec.encode(noise(1, 640))
    weight = torch.ones(1024, 3, requires_grad=True)
    torch.nn.functional.embedding(codes, weight).sum().backward()  # inference-mode tensors would raise here
    assert not codec.decode(codes).requires_grad


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_equal_here_and_in_transformers(codec: Codec, folder: Path) -> None:
    codec.save_pretrained(folder)  # once more, over the first
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["codec"]
    codes = random_codes(codec, 1, 9)
    sound = codec.decode(codes)
    loaded = Codec.from_pretrained(folder)
    assert torch.equal(loaded.decode(codes), sound)
    assert torch.equal(loaded.encode(sound), codec.encode(sound))
    theirs = transformers.DacModel.from_pretrained(folder)
    assert torch.equal(theirs.decode(audio_codes=codes).audio_values, sound[:, 0, :-8])


def test_folders_that_transformers_wrote_are_read(codec: Codec, tmp_path: Path) -> None:
    codec.model.save_pretrained(tmp_path / "theirs")
    codes = random_codes(codec, 1, 3)
    assert torch.equal(Codec.from_pretrained(tmp_path / "theirs").decode(codes), codec.decode(codes))


def test_half_precision_weights_become_float32(codec: Codec, folder: Path) -> None:
    state = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    loaded = Codec.from_pretrained(str(folder))
    assert loaded.decode(random_codes(codec, 1, 2)).dtype == torch.float32
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    before = torch.get_rng_state()
    Codec.from_pretrained(folder)
    Codec.from_descript(PTH)
    assert torch.equal(before, torch.get_rng_state())


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _pickle_in_disguise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(folder / "run")))


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "cut config": (lambda f: _cut(f / "config.json", 99), "not valid JSON"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 200_000), "not valid JSON"),
    "huge config": (lambda f: (f / "config.json").write_text(" " * (5 << 20)), "larger than 4 MiB"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "other model": (lambda f: edit_config(f, model_type="encodec"), "model_type must be 'dac'"),
    "hostile size": (lambda f: edit_config(f, n_codebooks=10**9), "n_codebooks must be"),
    "text size": (lambda f: edit_config(f, sampling_rate="16000"), "sampling_rate must be"),
    "true size": (lambda f: edit_config(f, codebook_dim=True), "codebook_dim must be"),
    "odd codebook": (lambda f: edit_config(f, codebook_size=1000), "power of 2"),
    "ratios": (lambda f: edit_config(f, downsampling_ratios=[2, 0]), "downsampling_ratios must be"),
    "other ratios": (lambda f: edit_config(f, upsampling_ratios=[2, 4, 5, 8]), "reversed"),
    "fewer codebooks": (lambda f: edit_config(f, n_codebooks=11), "has unknown quantizer.quantizers.11"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle": (leave_only_a_pickle, "pytorch_model.bin is a pickle"),
    "hidden pickle": (_pickle_in_disguise, "damaged or not safetensors"),
    "cut header": (lambda f: _cut(f / "model.safetensors", 1000), "damaged or not safetensors"),
    "cut weights": (lambda f: _cut(f / "model.safetensors", 900_000), "damaged or not safetensors"),
    "empty weights": (lambda f: _cut(f / "model.safetensors", 0), "damaged or not safetensors"),
    "flipped bit": (lambda f: _flip(f / "model.safetensors", 900_000), "not those that were saved"),
    "missing": (lambda f: edit_weights(f, {"encoder.conv1.bias": None}), "lacks encoder.conv1.bias"),
    "unknown": (lambda f: edit_weights(f, {"extra": torch.ones(1)}), "has unknown extra"),
    "shape": (lambda f: edit_weights(f, {"encoder.conv1.bias": torch.ones(9)}), r"encoder.conv1.bias has shape \[9\]"),
    "integers": (lambda f: edit_weights(f, {"encoder.conv1.bias": torch.ones(8, dtype=torch.int32)}), "floating point"),
    "nan": (lambda f: edit_weights(f, {"encoder.conv1.bias": torch.full((8,), torch.nan)}), "NaN or infinity"),
    "overflow": (
        lambda f: edit_weights(f, {"encoder.conv1.bias": torch.full((8,), 1e300, dtype=torch.float64)}),
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_one_clear_error(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Codec.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "run").exists()


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no folder 'dac'"):
        Codec.from_pretrained("dac")
    with pytest.raises(CheckpointError, match="is a file"):
        Codec.from_pretrained(PTH)
    with pytest.raises(CheckpointError, match="cannot look for a codec"):
        Codec.from_pretrained("x" * 5000)

    def offline(name: str, **_: object) -> str:
        raise OSError("no network\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"no folder 'owner/name'.*\(no network\).*pass its folder"):
        Codec.from_pretrained("owner/name")


def test_a_hub_name_loads_what_the_hub_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def hub(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert Codec.from_pretrained("descript/dac_16khz").hop_length == 320
    assert asked == {"descript/dac_16khz": ["config.json", "model.safetensors"]}


def test_without_transformers_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"siren\[dac\]"):
        Codec.from_pretrained(folder)


def test_a_save_that_fails_changes_nothing(codec: Codec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(codec_module, "sync", full)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(CheckpointError, match="No space left"):
            codec.save_pretrained(target)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["codec"]


def test_saving_never_replaces_other_files(codec: Codec, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="also holds 'mine'"):
        codec.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="could not save"):
        codec.save_pretrained(tmp_path / "mine" / "codec")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# ---- Descript's file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 10_000, 1_000_000, 2_498_000, 2_498_900])
def test_a_truncated_pth_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "cut.pth").write_bytes(PTH.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        Codec.from_descript(tmp_path / "cut.pth")


def test_an_altered_pth_is_refused(tmp_path: Path, content: dict) -> None:
    """One flipped bit among the weights changes nothing that torch looks at; the archive's checksums tell."""
    path = shutil.copy(PTH, tmp_path / "bad.pth")
    changed = content["state_dict"]["quantizer.quantizers.5.codebook.weight"][321].numpy().tobytes()
    _flip(path, PTH.read_bytes().index(changed))
    with pytest.raises(CheckpointError, match="checksum"):
        Codec.from_descript(path)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, PTH.stat().st_size, 30):  # or elsewhere: refused, or harmless (names, padding)
        shutil.copy(PTH, path)
        _flip(path, position)
        try:
            loaded = Codec.from_descript(path).model.state_dict()
        except CheckpointError:
            continue
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in _shared().model.state_dict().items())


@pytest.mark.parametrize("place", ["alone", "metadata", "state_dict"])
def test_a_pth_with_other_objects_is_refused_and_not_run(tmp_path: Path, content: dict, place: str) -> None:
    payload = Payload(tmp_path / "run")
    bad = {
        "alone": payload,
        "metadata": content | {"metadata": {"kwargs": payload}},
        "state_dict": content | {"state_dict": content["state_dict"] | {"x": payload}},
    }[place]
    torch.save(bad, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="objects other than tensors") as caught:
        Codec.from_descript(tmp_path / "bad.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError):
        Codec.from_descript(tmp_path / "plain.pth")
    assert not (tmp_path / "run").exists()


def _changed(content: dict, state: dict | None = None, **kwargs: object) -> dict:
    merged = content["state_dict"] | (state or {})
    return {
        "state_dict": {name: value for name, value in merged.items() if value is not None},
        "metadata": {"kwargs": content["metadata"]["kwargs"] | kwargs},
    }


def _alpha(value: object) -> dict:
    return {"decoder.model.5.alpha": value}


BAD_CONTENT = {
    "a list": (lambda c: [1], "lacks state_dict"),
    "no metadata": (lambda c: {"state_dict": c["state_dict"]}, "lacks state_dict or metadata.kwargs"),
    "missing tensor": (lambda c: _changed(c, _alpha(None)), "lacks decoder.snake1.alpha"),
    "left over": (lambda c: _changed(c, {"x.weight": torch.ones(1)}), "has unknown x.weight"),
    "shape": (lambda c: _changed(c, _alpha(torch.ones(1, 5, 1))), r"decoder.snake1.alpha has shape \[1, 5, 1\]"),
    "nan": (lambda c: _changed(c, _alpha(torch.full((1, 4, 1), torch.nan))), "NaN or infinity"),
    "integers": (lambda c: _changed(c, _alpha(torch.ones(1, 4, 1, dtype=torch.int64))), "not a floating point tensor"),
    "not a tensor": (lambda c: _changed(c, _alpha("text")), "not a floating point tensor"),
    "half a pair": (lambda c: _changed(c, {"decoder.model.6.weight_g": None}), "lacks decoder.conv2.weight"),
    "odd pair": (lambda c: _changed(c, {"decoder.model.6.weight_g": torch.ones(2, 1, 1)}), "do not belong together"),
    "no size": (lambda c: _changed(c, decoder_dim=None), "does not say its decoder_dim"),
    "hostile size": (lambda c: _changed(c, encoder_dim=10**12), "encoder_hidden_size must be"),
    "many codebooks": (lambda c: _changed(c, n_codebooks=10**12), "n_codebooks must be"),
    "huge ratios": (lambda c: _changed(c, encoder_rates=[2] * 10**6), "downsampling_ratios must be"),
    "ratio": (lambda c: _changed(c, encoder_rates=5), "encoder_rates must be a list"),
    "unequal dims": (lambda c: _changed(c, codebook_dim=[8] * 11 + [4]), "not supported"),
    "other rates": (lambda c: _changed(c, decoder_rates=[2, 4, 5, 8]), "reversed"),
}


@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_a_pth_that_is_not_a_whole_codec_is_refused(tmp_path: Path, content: dict, kind: str) -> None:
    change, message = BAD_CONTENT[kind]
    torch.save(change(content), tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=message):
        Codec.from_descript(tmp_path / "bad.pth")


def test_a_missing_pth_or_another_object() -> None:
    with pytest.raises(CheckpointError, match="no file"):
        Codec.from_descript("nowhere.pth")
    with pytest.raises(InputError, match=r"dac\.DAC object, not int"):
        Codec.from_descript(3)


def test_a_live_object_and_every_spelling_of_weight_norm(codec: Codec, content: dict) -> None:
    """A `dac.DAC` in memory may have torch's newer weight norm, or none after it was removed."""
    state = content["state_dict"]
    newer = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for name, value in state.items()
    }
    removed = dict(state)
    for name in [name for name in state if name.endswith("weight_g")]:
        g, v = removed.pop(name), removed.pop(name[:-1] + "v")
        removed[name[:-2]] = g * v / v.norm(dim=(1, 2), keepdim=True)
    codes = random_codes(codec, 1, 4)
    sound = codec.decode(codes)
    kwargs = content["metadata"]["kwargs"] | {"codebook_dim": [8] * 12}
    for spelling in (state, newer, removed):
        live = SimpleNamespace(encoder=1, quantizer=1, decoder=1, state_dict=lambda s=spelling: s, **kwargs)
        torch.testing.assert_close(Codec.from_descript(live).decode(codes), sound, rtol=0, atol=1e-6)


# ---- arguments -------------------------------------------------------------------------------------------------------

BAD_WAVEFORMS = {
    "numpy": (np.zeros((1, 1, 320), np.float32), "must be a torch.Tensor, not ndarray"),
    "double": (torch.zeros(1, 1, 320, dtype=torch.float64), "must be torch.float32"),
    "device": (torch.zeros(1, 1, 320, device="meta"), "is on meta but the codec is on cpu"),
    "flat": (torch.zeros(320), r"shape \[batch, 1, samples\], not \[320\]"),
    "stereo": (torch.zeros(1, 2, 320), r"not \[1, 2, 320\]"),
    "no clip": (torch.zeros(0, 1, 320), "shape"),
    "no samples": (torch.zeros(1, 1, 0), "shape"),
    "nan": (torch.full((1, 1, 320), torch.nan), "NaN or infinity"),
    "infinity": (torch.full((1, 1, 320), torch.inf), "NaN or infinity"),
    "integers in disguise": (torch.full((1, 1, 320), 12000.0), "divide 16-bit samples by 32768"),
    "too long": (torch.zeros(1, 1, 120 * 16000 + 1), "too long"),
}


@pytest.mark.parametrize("kind", BAD_WAVEFORMS)
def test_bad_waveforms(codec: Codec, kind: str) -> None:
    waveform, message = BAD_WAVEFORMS[kind]
    with pytest.raises(InputError, match=message):
        codec.encode(waveform)


BAD_CODES = {
    "list": ([[1]], "must be a torch.Tensor"),
    "int32": (torch.zeros(1, 12, 1, dtype=torch.int32), "must be torch.int64"),
    "floats": (torch.zeros(1, 12, 1), "must be torch.int64"),
    "eleven": (torch.zeros(1, 11, 1, dtype=torch.int64), r"\[batch, 12, frames\]"),
    "flat": (torch.zeros(12, 1, dtype=torch.int64), r"\[batch, 12, frames\]"),
    "no frames": (torch.zeros(1, 12, 0, dtype=torch.int64), r"\[batch, 12, frames\]"),
    "no clip": (torch.zeros(0, 12, 1, dtype=torch.int64), r"\[batch, 12, frames\]"),
    "high": (torch.full((1, 12, 1), 1024), "there is a 1024"),
    "low": (torch.full((1, 12, 1), -1), "there is a -1"),
    "too long": (torch.zeros(1, 12, 6001, dtype=torch.int64), "too long"),
}


@pytest.mark.parametrize("kind", BAD_CODES)
def test_bad_codes(codec: Codec, kind: str) -> None:
    codes, message = BAD_CODES[kind]
    with pytest.raises(InputError, match=message):
        codec.decode(codes)


def test_a_device_that_is_not_there(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "copy")
    with pytest.raises(InputError, match="cannot use device 'nonsense'"):
        Codec.from_pretrained(folder, device="nonsense")


def test_repr_says_what_it_is(codec: Codec) -> None:
    assert repr(codec) == "Codec(16000 Hz, 12 codebooks of 1024 codes, 320 samples a frame, cpu)"


@pytest.fixture
def all_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
def test_full_size_encodes_and_decodes_ten_seconds() -> None:
    """The sizes of DAC 16 kHz with random weights. A part decoded alone equals the whole away from its end."""
    torch.manual_seed(0)
    config = transformers.DacConfig(
        encoder_hidden_size=64, downsampling_ratios=[2, 4, 5, 8], decoder_hidden_size=1536, n_codebooks=12,
        codebook_size=1024, codebook_dim=8, sampling_rate=16000,
    )  # fmt: skip
    codec = Codec(transformers.DacModel(config))
    assert (codec.sample_rate, codec.hop_length, codec.num_codebooks, codec.codebook_size) == (16000, 320, 12, 1024)
    assert codec.decode_embeddings()[11].weight.shape == (1024, 8)
    start = time.perf_counter()
    codes = codec.encode(noise(1, 160_000))
    middle = time.perf_counter()
    sound = codec.decode(codes)
    print(f"10 s: encode {middle - start:.1f} s, decode {time.perf_counter() - middle:.1f} s")
    assert codes.shape == (1, 12, 500)
    assert sound.shape == (1, 1, 160_000)
    assert torch.isfinite(sound).all()
    assert sound.abs().max() <= 1
    kept = 20 * codec.hop_length
    torch.testing.assert_close(codec.decode(codes[:, :, :40])[..., :kept], sound[..., :kept], rtol=0, atol=1e-5)


def test_a_save_finds_what_a_killed_one_left(codec: Codec, folder: Path) -> None:
    """With NAME gone and `.NAME.previous` there, the next save starts from it and leaves only NAME."""
    folder.rename(folder.parent / f".{folder.name}.previous")
    codec.save_pretrained(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
