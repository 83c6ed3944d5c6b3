"""A DAC learns from scratch: it starts audible, its latents keep their scale, its losses fall, and a run can go on.

The models have 32 latent channels and learn from a second or two of sound, so numbers here say nothing about quality.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import siren.dac_training as training
from siren.codec import Codec
from siren.codec_data import Crops, read_clips
from siren.dac_discriminator import Discriminators, discriminator_loss, generator_losses
from siren.dac_losses import MIN_SAMPLES, ReconstructionLoss
from siren.dac_model import DacSizes, build_dac, nearest, quantise, spherical_kmeans, start_quantisers
from siren.dac_training import train_dac, train_step
from siren.errors import CheckpointError, ConfigError, DataError, InputError, SirenError
from siren.train.stop import TrainingStoppedError

transformers = pytest.importorskip("transformers")

TINY = DacSizes(encoder_width=8, decoder_width=16, num_codebooks=3, codebook_size=16, codebook_dim=4, strides=(5, 64))
RATE = 16000
SCALES = ((256, 20), (1024, 40))  # fewer than a run has, for time


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(batch, 1, samples, generator=generator(seed))


def tones() -> list[np.ndarray]:
    """Three sounds of a fifth to a second, int16: a falling tone, noise, a fading tone."""
    time = np.arange(RATE) / RATE
    hiss = np.random.default_rng(0).uniform(-0.2, 0.2, RATE)
    sounds = [
        0.3 * np.sin(2 * np.pi * (600 * time - 150 * time**2)),
        hiss,
        0.5 * np.sin(9000 * time) * np.exp(-9 * time),
    ]
    return [(32767 * sound).astype(np.int16) for sound in (*sounds[:2], sounds[2][: RATE // 5])]


def new_run(sizes: DacSizes = TINY, discriminator: bool = False) -> training.Run:
    return training._start(sizes, 0, "cpu", discriminator)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for i, sound in enumerate(tones()):
        soundfile.write(folder / f"{i}.wav", sound, RATE)
        lines.append(json.dumps({"id": f"clip {i}", "audio": f"{i}.wav"}))
    (folder / "clips.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


# ---- the first trap: sound that vanishes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "decoder", "strides"),
    [(2, 1, (2, 4, 5, 8)), (7, 3, (2, 4, 5, 8)), (16, 9, (5, 64)), (24, 2, (3, 2, 2))],
)
def test_before_training_latent_and_sound_are_neither_faint_nor_loud(
    encoder: int, decoder: int, strides: tuple[int, ...]
) -> None:
    """At any size; the input has an RMS of 0.1."""
    sizes = DacSizes(encoder, decoder * 2 ** len(strides), 2, 16, 4, strides)
    model = build_dac(sizes, RATE, generator(1))
    with torch.no_grad():
        latent = model.encoder(noise(2, 1280))
        sound = model.decoder(latent)
    assert 0.2 < latent.std() < 5
    assert 0.02 < sound.std() < 0.6


def test_as_transformers_draws_them_weights_make_no_sound() -> None:
    """The trap is real: a small model, drawn with a standard deviation of 0.02."""
    config = build_dac(DacSizes(encoder_width=2, decoder_width=16), RATE, generator()).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.DacModel(config)
    with torch.no_grad():
        sound = model.decoder(model.encoder(noise(2, 1280)))
        # All there is are the biases of transposed convolutions, whatever goes in.
        assert (sound - model.decoder(model.encoder(noise(2, 1280, seed=1)))).abs().max() < 1e-4


def test_weights_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_dac(TINY, RATE, generator(seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.conv1.weight"], other["decoder.conv1.weight"])


# ---- the second trap: latents that run away --------------------------------------------------------------------------


def test_the_latents_scale_and_the_commitment_stay_bounded_over_100_quantised_steps() -> None:
    run, crops, loss = new_run(), Crops(tones(), 1280, 0), ReconstructionLoss(RATE, SCALES)
    for step in range(10):
        train_step(run, crops.batch(2, step), loss, 2e-3, 0, quantised=False)
    training.begin_quantised(run, crops, 0)
    probe, scales, commitments = crops.batch(8, 0, purpose=9), [], []
    for step in range(10, 110):
        if step % 5 == 0:
            with torch.no_grad():
                scales.append(float(run.model.encoder(probe).std()))
        values = train_step(run, crops.batch(2, step), loss, 2e-3, 0, quantised=True)
        commitments.append(float(values["commitment"]))
    assert 0.3 < scales[0] < 3  # it was set to 1 on all crops
    assert 0.15 * scales[0] < min(scales) and max(scales) < 2 * scales[0]
    assert max(commitments) < 15 * np.mean(commitments[:20])  # loud crops are further off than quiet ones
    assert np.mean(commitments[-20:]) < 2 * np.mean(commitments[:20])


def test_the_autoencoder_sounds_the_same_after_the_codebooks_are_set() -> None:
    model = build_dac(TINY, RATE, generator())
    sound = noise(4, 3200)
    with torch.no_grad():
        model.encoder.conv2.weight.mul_(50)
        latent = model.encoder(sound)
        before = model.decoder(latent)
        left_over = start_quantisers(model, latent.transpose(1, 2).flatten(0, 1), generator())
        latent = model.encoder(sound)
        torch.testing.assert_close(model.decoder(latent), before, rtol=1e-3, atol=1e-4)
        assert (latent - latent.mean((0, 2), keepdim=True)).square().mean().sqrt() == pytest.approx(1, rel=1e-3)
        result = quantise(model, latent)
    assert float((result["quantised"] - latent).square().mean()) == pytest.approx(left_over, rel=1e-3)
    assert left_over < 0.8


def test_every_further_codebook_leaves_less_over() -> None:
    model = build_dac(TINY, RATE, generator())
    with torch.no_grad():
        frames = model.encoder(noise(8, 6400)).transpose(1, 2).flatten(0, 1)
        start_quantisers(model, frames, generator())
        latent = model.encoder(noise(8, 6400))
        errors = [float((quantise(model, latent, [k] * 8)["quantised"] - latent).square().mean()) for k in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_an_encoder_that_says_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="same latent"):
        start_quantisers(build_dac(TINY, RATE, generator()), torch.ones(100, 32), generator())


def test_kmeans_finds_directions_and_lengths() -> None:
    directions = torch.eye(5)[:4] * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]
    vectors = directions.repeat(50, 1) + 0.05 * torch.randn(200, 5, generator=generator(1))
    centres = spherical_kmeans(vectors, 4, generator(6))
    order = nearest(directions, centres)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(centres[order], directions, rtol=0, atol=0.03)


def test_there_may_be_fewer_vectors_than_codes() -> None:
    vectors = torch.randn(3, 4, generator=generator())
    centres = spherical_kmeans(vectors, 16, generator())
    assert centres.shape == (16, 4) and bool(centres.isfinite().all())
    torch.testing.assert_close(centres[nearest(vectors, centres)], vectors, rtol=0, atol=0.1)


def test_quantising_equals_the_models_own() -> None:
    """Codes, sum and losses of transformers' quantiser in evaluation; from k codebooks as its decoder from k codes."""
    model = build_dac(TINY, RATE, generator())
    latent = torch.randn(3, 32, 7, generator=generator())
    with torch.no_grad():
        sums, codes, _, commitment, codebook = model.quantizer(latent)
        result = quantise(model, latent)
        torch.testing.assert_close(result["quantised"], sums)
        assert torch.equal(result["codes"], codes)
        torch.testing.assert_close(result["commitment"], commitment.mean())
        torch.testing.assert_close(result["codebook"], codebook.mean())
        dropped = quantise(model, latent, [1, 3, 2])
        for i, k in enumerate((1, 3, 2)):
            wanted = model.quantizer.from_codes(codes[i : i + 1, :k])[0]
            torch.testing.assert_close(dropped["quantised"][i : i + 1], wanted)
        assert dropped["commitment"] < result["commitment"]


def test_gradients_go_where_they_should() -> None:
    """Through the look-up to the encoder; of the codebook loss to the codes only, of the commitment not to them."""
    model = build_dac(TINY, RATE, generator())
    latent = torch.randn(2, 32, 7, generator=generator()).requires_grad_()
    result = quantise(model, latent)
    code, projection = model.quantizer.quantizers[0].codebook.weight, model.quantizer.quantizers[0].in_proj.weight
    wanted = {"quantised": (True, False), "commitment": (True, False), "codebook": (False, True)}
    for name, (to_latent, to_code) in wanted.items():
        grads = torch.autograd.grad(
            result[name].sum(), [latent, code, projection], retain_graph=True, allow_unused=True
        )
        has = [grad is not None and bool(grad.any()) for grad in grads]
        if name != "codebook":  # later codebooks' losses do reach it, through what the first leaves over
            assert has[1] is to_code
        assert has[1] or not to_code
        assert has[0] or not to_latent
        assert name != "quantised" or has[2]


def test_dropout_is_a_share_of_the_batch_and_of_the_step() -> None:
    draws = [training.dropout(8, 12, 3, step) for step in range(50)]
    assert all(counts[4:] == [12] * 4 for counts in draws)
    assert {count for counts in draws for count in counts[:4]} == set(range(1, 13))
    assert draws == [training.dropout(8, 12, 3, step) for step in range(50)]
    assert training.dropout(1, 12, 0, 0) == [12]


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_the_reconstruction_loss_is_0_for_equal_sounds_and_half_for_10_db() -> None:
    loss, sound = ReconstructionLoss(RATE), noise(2, 4000)
    assert loss(sound, sound) == {"mel": 0, "wave": 0}
    quieter = loss(sound, sound * 10**-0.5)
    assert float(quieter["mel"]) == pytest.approx(0.5, rel=0.02)
    assert float(quieter["wave"]) == pytest.approx(float(sound.abs().mean()) * (1 - 10**-0.5), rel=1e-4)
    assert float(loss(sound, torch.zeros_like(sound))["mel"]) < 6  # silence is 1e-5, not minus infinity


def test_silence_has_gradients() -> None:
    estimate = torch.zeros(1, 1, 2000, requires_grad=True)
    sum(ReconstructionLoss(RATE)(noise(1, 2000), estimate + 0.0).values()).backward()
    assert estimate.grad is not None and bool(estimate.grad.isfinite().all()) and bool(estimate.grad.any())


@pytest.mark.parametrize("shapes", [((1, 1, 1000), (1, 1, 1000)), ((1, 1, 3200), (1, 1, 3192)), ((1, 3200), (1, 3200))])
def test_sounds_that_cannot_be_compared_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InputError, match=f"{MIN_SAMPLES} samples"):
        ReconstructionLoss(RATE)(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_the_reconstruction_falls_on_a_tiny_set() -> None:
    """Of sounds it is trained on, first without and then with quantiser."""
    run, loss, crops = new_run(), ReconstructionLoss(RATE, SCALES), Crops(tones(), 1280, 0)
    probe = crops.batch(6, 0, purpose=9)

    def measure(quantised: bool) -> float:
        with torch.no_grad():
            latent = run.model.encoder(probe)
            sound = run.model.decoder(quantise(run.model, latent)["quantised"] if quantised else latent)
            return float(loss(probe[..., : sound.shape[-1]], sound)["mel"])

    untrained = measure(False)
    for step in range(30):
        train_step(run, crops.batch(2, step), loss, 3e-3, 0, quantised=False)
    trained = measure(False)
    training.begin_quantised(run, crops, 0)
    started = measure(True)
    for step in range(30, 60):
        train_step(run, crops.batch(2, step), loss, 3e-3, 0, quantised=True)
    finished = measure(True)
    assert trained < 0.7 * untrained
    assert started < untrained  # what was learned is not lost
    assert finished < 0.9 * started


def test_discriminators_learn_to_tell_and_tell_the_codec() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judges = Discriminators(width=4)
    optimizer = torch.optim.Adam(judges.parameters(), lr=3e-3)
    real, decoded = noise(2, 2003), torch.zeros(2, 1, 2003)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        values.append(discriminator_loss(judges(real), judges(decoded)))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0]
    with torch.no_grad():
        assert generator_losses(judges(real), judges(real))["feature"] == 0
    estimate = (0.5 * real).requires_grad_()
    for name, value in generator_losses(judges(real), judges(estimate)).items():
        (grad,) = torch.autograd.grad(value, estimate, retain_graph=True)
        assert bool(value > 0) and bool(grad.any()) and bool(grad.isfinite().all()), name


# ---- crops -----------------------------------------------------------------------------------------------------------


def test_crops_reach_every_sample_and_the_silence_around_it() -> None:
    sound = np.arange(1, 501, dtype=np.int16)  # shorter than two crops; every sample is known by its value
    crops = Crops([sound], 320, 0)
    rows = np.concatenate([crops.batch(8, step)[:, 0].numpy() for step in range(60)]) * 32767
    assert set(np.rint(rows).astype(int).ravel()) == set(range(501))
    assert np.all((rows[:, 0] == 0) | (rows[:, -1] == 0) | (np.diff(np.rint(rows)) == 1).all(1))
    assert np.all((rows > 0).sum(1) >= 160)  # half of a crop is never silence alone
    assert {bool(row[0] == 0) for row in rows} == {bool(row[-1] == 0) for row in rows} == {True, False}


def test_sounds_shorter_than_a_crop_stand_anywhere_in_its_first_half() -> None:
    rows = Crops([np.full(40, 32767, np.int16)], 320, 0).batch(200, 0)[:, 0]
    assert bool(((rows == 1).sum(1) == 40).all())
    starts = {int(row.argmax()) for row in rows}
    assert min(starts) < 20 and max(starts) > 140 and max(starts) <= 160


def test_crops_are_a_function_of_seed_and_step() -> None:
    first = Crops(tones(), 640, 5).batch(4, 7)
    assert first.shape == (4, 1, 640) and first.dtype == torch.float32
    assert torch.equal(first, Crops(tones(), 640, 5).batch(4, 7))
    for other in (Crops(tones(), 640, 5).batch(4, 8), Crops(tones(), 640, 6).batch(4, 7)):
        assert not torch.equal(first, other)
    assert not torch.equal(first, Crops(tones(), 640, 5).batch(4, 7, purpose=2))


def test_the_digest_is_of_every_sample() -> None:
    changed = tones()
    changed[1][77] += 1
    moved = [np.concatenate(tones()[:2]), tones()[2]]
    digests = {Crops(sounds, 320, 0).digest() for sounds in (tones(), changed, moved)}
    assert len(digests) == 3 and Crops(tones(), 640, 1).digest() in digests


def test_sounds_that_cannot_be_read_are_left_out_and_named(
    clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    lines = ['{"id": "bad", "audio": "bad.wav"}', '{"id": "gone", "audio": "gone.wav"}']
    (tmp_path / "clips.jsonl").write_text("\n".join(lines))
    sounds = read_clips([clip_folder, tmp_path], progress=False)
    assert [len(sound) for sound in sounds] == [16000, 16000, 3200]
    assert "2 of 5 sounds left out" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"none of the 2 sounds.*bad\.wav"):
        read_clips([tmp_path], progress=False)
    for none in ([], str(clip_folder)):
        with pytest.raises(InputError, match="list of clip folders"):
            read_clips(none, progress=False)


# ---- whole runs ------------------------------------------------------------------------------------------------------


SETTINGS: dict[str, Any] = {
    "sizes": TINY,
    "steps": 6,
    "autoencoder_steps": 3,
    "batch_size": 2,
    "seconds": 0.1,
    "save_every": 2,
    "progress": False,
}


def digest(folder: Path) -> str:
    """Of all weights; the file's own bytes differ, because the library writes metadata in any order."""
    weights = load_file(folder / "model.safetensors")
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


@functools.cache
def whole_run(clip_folder: Path, discriminator: bool) -> tuple[str, list[dict[str, Any]]]:
    """The hash of the weights of a run that nothing stopped, and its losses."""
    out = clip_folder.parent / f"whole-{clip_folder.name}-{discriminator}"
    losses = train_dac([clip_folder], out, discriminator=discriminator, **SETTINGS)
    return digest(out), losses


def test_a_run_gives_a_codec_and_its_losses(clip_folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    losses = train_dac([clip_folder], tmp_path / "codec", **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)
    codec = Codec.from_pretrained(tmp_path / "codec")
    assert (codec.sample_rate, codec.hop_length, codec.num_codebooks, codec.codebook_size) == (16000, 320, 3, 16)
    codes = codec.encode(noise(2, 1000))
    assert codes.shape == (2, 3, 4) and codec.decode(codes).shape == (2, 1, 1280)
    phases = ["autoencoder"] * 3 + ["codebooks"] + ["quantised"] * 3
    assert [row["phase"] for row in losses] == phases
    assert [row["step"] for row in losses] == [1, 2, 3, 3, 4, 5, 6]
    assert 0 < losses[3]["left_over"] < 1
    assert losses[-1].keys() == {"step", "phase", "mel", "wave", "commitment", "codebook"}
    assert (digest(tmp_path / "codec"), losses) == whole_run(clip_folder, False)
    again = train_dac([clip_folder], tmp_path / "codec", **SETTINGS)  # nothing left to do
    assert again == losses


@pytest.mark.parametrize(("stop", "discriminator"), [(1, False), (3, False), (5, True)])
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    stop: int, discriminator: bool, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGTERM after step `stop`: in a phase, between the phases, and with discriminators."""
    train_step = training.train_step

    def step_and_stop(run: training.Run, *args: Any) -> dict[str, torch.Tensor]:
        values = train_step(run, *args)
        if run.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(TrainingStoppedError, match=f"after step {stop} of 6"):
        patch.setattr(training, "train_step", step_and_stop)
        train_dac([clip_folder], tmp_path / "codec", discriminator=discriminator, **SETTINGS)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "codec").exists()
    losses = train_dac([clip_folder], tmp_path / "codec", discriminator=discriminator, **SETTINGS)
    assert (digest(tmp_path / "codec"), losses) == whole_run(clip_folder, discriminator)


def test_a_run_that_was_killed_loses_the_steps_since_the_last_save(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    train_step = training.train_step

    def step_and_die(run: training.Run, *args: Any) -> dict[str, torch.Tensor]:
        steps.append(run.step)
        if steps == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return train_step(run, *args)

    monkeypatch.setattr(training, "train_step", step_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_dac([clip_folder], tmp_path / "codec", **SETTINGS)
    losses = train_dac([clip_folder], tmp_path / "codec", **SETTINGS)
    assert steps == [0, 1, 2, 3, 4, 4, 5]
    assert (digest(tmp_path / "codec"), losses) == whole_run(clip_folder, False)
    # A state that was altered is refused.
    weights = sorted((tmp_path / "codec.training").glob("state-*/model.safetensors"))[-1]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or was altered"):
        train_dac([clip_folder], tmp_path / "codec", **SETTINGS)


def test_what_was_saved_with_other_settings_or_sounds_is_not_gone_on_with(clip_folder: Path, tmp_path: Path) -> None:
    train_dac([clip_folder], tmp_path / "codec", **SETTINGS)
    saved = digest(tmp_path / "codec")
    with pytest.raises(CheckpointError, match=r"other steps, seed; delete it"):
        train_dac([clip_folder], tmp_path / "codec", **SETTINGS | {"steps": 7, "seed": 1})
    with pytest.raises(CheckpointError, match="other sounds"):
        train_dac([clip_folder, clip_folder], tmp_path / "codec", **SETTINGS)
    assert digest(tmp_path / "codec") == saved


def test_a_folder_that_holds_something_is_not_replaced(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="choose another folder"):
        train_dac([clip_folder], tmp_path / "codec", **SETTINGS)
    assert [path.name for path in tmp_path.rglob("*")] == ["codec", "notes.txt"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"autoencoder_steps": 6}, "autoencoder_steps must be below steps"),
        ({"autoencoder_steps": 0}, "autoencoder_steps must be a whole number"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"save_every": True}, "save_every must be a whole number"),
        ({"seconds": 0.05}, "seconds must be within"),
        ({"seconds": float("nan")}, "seconds must be within"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"device": "nowhere"}, "cannot use device 'nowhere'"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_is_written(
    values: dict[str, Any], words: str, clip_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        train_dac([clip_folder], tmp_path / "codec", **SETTINGS | values)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values",
    [
        {"codebook_size": 100},
        {"decoder_width": 30},
        {"codebook_dim": 33},
        {"strides": (320, 1)},
        {"strides": ()},
        {"num_codebooks": 0},
        {"encoder_width": 2.0},
    ],
)
def test_sizes_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        dataclasses.replace(TINY, **values)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    run, crops = new_run(), Crops(tones(), 1920, 0)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}

    def broken(sound: torch.Tensor, decoded: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mel": (sound - decoded).mean() * float("nan")}

    with pytest.raises(SirenError, match="step 1 is not finite; lower learning_rate"):
        train_step(run, crops.batch(2, 0), broken, 1e-3, 0, quantised=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
