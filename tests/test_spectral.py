"""The spectral codec: it gives sounds back, its codes are those of the definition, and a bad folder is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from siren.codec import Codec
from siren.errors import CheckpointError, InputError
from siren.spectral import SpectralConfig, SpectralModel
from siren.spectral_training import fit_spectral, train_spectral

CONFIG = SpectralConfig(n_mels=20, window=512, n_codebooks=4, codebook_size=64, codebook_dim=6, phase_iterations=8)


def sounds(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Gliding tones in noise, of awkward lengths, with silence after them."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(rng.integers(3001, 9001))
        time = np.arange(n) / 16000
        tone = np.sin(2 * np.pi * (rng.uniform(200, 2000) * time + rng.uniform(-500, 500) * time**2))
        sound = rng.uniform(0.1, 0.6) * tone + rng.uniform(0, 0.1) * rng.standard_normal(n)
        made.append(torch.from_numpy(np.append(sound, np.zeros(700))).float().clamp(-1, 1))
    return made


@pytest.fixture(scope="module")
def codec() -> Codec:
    return fit_spectral(sounds(30), CONFIG, iterations=4, progress=False)


@pytest.fixture
def folder(codec: Codec, tmp_path: Path) -> Path:
    codec.save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


def batch(codec: Codec, sound: torch.Tensor) -> torch.Tensor:
    return codec.encode(sound[None, None])


def log_mel_error(codec: Codec, sound: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square difference of the codec's own features, in dB."""
    hop = codec.hop_length
    length = len(sound) // hop * hop
    difference = codec.model.frames(sound[:length]) - codec.model.frames(other[:length])
    return float(difference.square().mean().sqrt()) * 10 / np.log(10)


def test_codes_are_the_nearest_of_each_stage(codec: Codec) -> None:
    """Stage by stage in float64: no code is nearer to the projected residual than the one given."""
    sound = sounds(1, seed=5)[0]
    codes = batch(codec, sound)[0]
    frames = codec.model.frames(torch.nn.functional.pad(sound, (0, -len(sound) % 320)))
    residual = (frames - codec.model.mean).double()
    for stage, given_codes, embedding in zip(
        codec.model.quantizer.quantizers, codes, codec.decode_embeddings(), strict=True
    ):
        projected = residual @ stage.in_proj.weight[:, :, 0].T.double()
        distances = torch.cdist(projected, stage.codebook.weight.double())
        chosen = distances.gather(1, given_codes[:, None])[:, 0]
        assert bool((chosen <= distances.min(dim=1).values + 1e-4).all())
        residual = residual - embedding.table()[given_codes].double()  # what Siren embeds is what the decoder adds


def test_every_codebook_brings_the_sound_nearer(codec: Codec) -> None:
    """The features that 0, 1, ... stages give back come closer and closer on sounds that were not fitted."""
    errors = []
    for count in range(CONFIG.n_codebooks + 1):
        total = 0.0
        for sound in sounds(6, seed=9):
            frames = codec.model.frames(torch.nn.functional.pad(sound, (0, -len(sound) % 320)))
            codes = batch(codec, sound)[0]
            tables = [embedding.table() for embedding in codec.decode_embeddings()]
            kept = sum((tables[j][codes[j]] for j in range(count)), start=codec.model.mean)
            total += float((frames - kept).square().mean())
        errors.append(total)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_sound_without_quantiser_comes_back() -> None:
    """Mel bands and found phases alone: the features of what is synthesised are within 3 dB of those asked for."""
    model = SpectralModel(SpectralConfig(phase_iterations=32))
    for sound in sounds(3, seed=2):
        length = len(sound) // 320 * 320
        frames = model.frames(sound[:length])
        back = model.frames(model.sound(frames))
        heard = frames > frames.max() - np.log(10) * 4  # 40 dB below the loudest
        assert float((back - frames)[heard].square().mean().sqrt()) * 10 / np.log(10) < 3.0


def test_silence_stays_silent() -> None:
    """Frames of silence give exact zeros, whatever the floor."""
    model = SpectralModel(CONFIG)
    assert float(model.sound(model.frames(torch.zeros(3200))).abs().max()) < 1e-6


@settings(max_examples=12, deadline=None, derandomize=True)
@given(samples=st.integers(1, 5000), others=st.integers(0, 2))
def test_a_clip_does_not_depend_on_its_batch(codec: Codec, samples: int, others: int) -> None:
    """Any length, beside any neighbours: the same codes, the same sound, hop_length samples a frame."""
    clip = torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(samples)).mul(0.2).clamp(-1, 1)
    alone = codec.encode(clip)
    assert alone.shape == (1, 4, -(-samples // 320))
    rows = torch.cat((clip, *[-clip.flip(2)] * others))
    assert torch.equal(codec.encode(rows)[:1], alone)
    sound = codec.decode(alone)
    assert sound.shape == (1, 1, 320 * alone.shape[2])
    assert float(sound.abs().max()) <= 1
    assert torch.equal(codec.decode(torch.cat((alone, codec.encode(rows)[-1:])))[:1], sound)


def test_random_codes_give_finite_sound(codec: Codec) -> None:
    """Codes that no sound has, such as an untrained model draws, still decode."""
    codes = torch.randint(0, 64, (2, 4, 37), generator=torch.Generator().manual_seed(0))
    assert bool(codec.decode(codes).isfinite().all())


def test_fitting_is_deterministic_and_beats_a_random_codec(codec: Codec) -> None:
    """The same sounds give the same bytes; a codec fitted to other sounds has another identity."""
    again = fit_spectral(sounds(30), CONFIG, iterations=4, progress=False)
    assert again.identity == codec.identity
    other = fit_spectral(sounds(30, seed=1), CONFIG, iterations=4, progress=False)
    assert other.identity != codec.identity
    sound = sounds(1, seed=7)[0]
    fitted = log_mel_error(codec, sound, codec.decode(batch(codec, sound))[0, 0])
    random = Codec(SpectralModel(CONFIG))
    assert fitted < 0.5 * log_mel_error(random, sound, random.decode(batch(random, sound))[0, 0])


def test_saved_and_loaded_is_the_same(codec: Codec, folder: Path) -> None:
    """Codes, sound and identity survive the folder; the sizes come from its config."""
    loaded = Codec.from_pretrained(folder)
    sound = sounds(1, seed=3)[0]
    assert torch.equal(batch(loaded, sound), batch(codec, sound))
    assert torch.equal(loaded.decode(batch(codec, sound)), codec.decode(batch(codec, sound)))
    assert loaded.identity == codec.identity
    assert (loaded.sample_rate, loaded.hop_length, loaded.num_codebooks, loaded.codebook_size) == (16000, 320, 4, 64)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("window", 1 << 30, "window"),
        ("window", 513, "window"),
        ("step", 0, "step"),
        ("n_mels", 900, "band"),  # bands between the bins of a 512 sample window
        ("floor", float("nan"), "floor"),
        ("floor", 1, "floor"),
        ("codebook_size", True, "codebook_size"),
        ("codebook_dim", 7, "shape"),
        ("model_type", "other", "model_type"),
        ("extra", 1, "extra"),
    ],
)
def test_a_bad_config_is_refused(folder: Path, field: str, value: object, word: str) -> None:
    """One clear error names the field."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=word):
        Codec.from_pretrained(folder)


@pytest.mark.parametrize("change", ["missing", "nan", "shape", "cut"])
def test_bad_weights_are_refused(folder: Path, change: str) -> None:
    """Tensors that are missing, not finite or of another shape, and a file that is cut off."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "quantizer.quantizers.2.codebook.weight"
    if change == "missing":
        del tensors[name]
    elif change == "nan":
        tensors[name][3, 1] = float("nan")
    elif change == "shape":
        tensors[name] = tensors[name][:5].contiguous()
    save_file(tensors, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        Codec.from_pretrained(folder)


def test_too_little_sound_is_refused() -> None:
    """Fewer frames than codes, silence and nothing at all are errors before anything is fitted."""
    for given_sounds in ([], [torch.zeros(100_000)], sounds(1)):
        with pytest.raises(InputError, match="sound"):
            fit_spectral(given_sounds, CONFIG, progress=False)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("max_frames", 1023), ("iterations", 0), ("iterations", True), ("seed", -1), ("seed", 1 << 70)],
)
def test_bad_arguments_are_refused_before_reading(tmp_path: Path, argument: str, value: int) -> None:
    """A codebook has 1024 codes, so fewer frames than that cannot be asked for."""
    with pytest.raises(InputError, match=f"{argument} must be"):
        train_spectral([tmp_path / "nothing"], tmp_path / "out", **{argument: value}, progress=False)
    with pytest.raises(InputError, match=f"{argument} must be"):
        fit_spectral(sounds(1), SpectralConfig(), **{argument: value}, progress=False)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    """train_spectral looks at its target before it reads any sound."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="exists"):
        train_spectral([tmp_path / "nothing"], tmp_path / "out")
