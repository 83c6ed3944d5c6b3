"""The sound-event embedding: its network against plain layers, its front end against numpy, and the real weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from torch import nn

from siren.aisfx import CLASSES, SAMPLE_RATE, SoundEvents
from siren.errors import CheckpointError, InputError, MissingDependencyError
from siren.mel import mel_filterbank


class ConvBlock(nn.Module):
    """As the checkpoint names it: batch normalisation by torch, nothing folded."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = nn.Module()
        for i, (inputs, outputs) in enumerate([(1, 64), (64, 128), (128, 256), (256, 512)], start=1):
            setattr(blocks, f"conv_block{i}", ConvBlock(inputs, outputs))
        self.embedding_net = blocks
        head = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 81))
        self.fc = nn.ModuleList([*(nn.Sequential() for _ in range(3)), head])

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        x, net = blocks[:, None], self.embedding_net
        for i in (1, 2, 3):
            x = nn.functional.max_pool2d(getattr(net, f"conv_block{i}")(x), 2)
        return net.conv_block4(x).mean(dim=3).max(dim=2).values


@pytest.fixture(scope="module")
def plain() -> Plain:
    model = Plain().eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, (2 / max(1, tensor[0].numel())) ** 0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def model(plain: Plain) -> SoundEvents:
    """Random weights, beside tensors that are not used."""
    return SoundEvents(plain.state_dict() | {"fc.0.0.weight": torch.zeros(2, 2)}, "random")


@pytest.fixture
def front(model: SoundEvents, monkeypatch: pytest.MonkeyPatch) -> SoundEvents:
    """The same with a network that is no work: the mean of each block over its frames, then zeros."""
    monkeypatch.setattr(model, "forward", lambda blocks: torch.nn.functional.pad(blocks.mean(dim=1), (0, 512 - 96)))
    return model


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Normalised log-mel frames [frames, 96] of a clip at 44.1 kHz, one window at a time."""
    padded = np.pad(wave.astype(np.float64) / (np.abs(wave).max() or 1), 1024)
    window = np.sin(np.pi * np.arange(2048) / 2048) ** 2
    starts = range(0, len(wave) + 1, 1024)
    power = np.stack([np.abs(np.fft.rfft(window * padded[s : s + 2048])) ** 2 for s in starts])
    mel = power @ mel_filterbank(96, 2048, 44100, norm="l1").astype(np.float64).T
    return np.log10(1 + 10000 * mel) / 9.457798957824707


def test_network(plain: Plain, model: SoundEvents) -> None:
    """Folded batch normalisation gives what torch's own layers give, also for sizes that pooling cuts."""
    blocks = torch.rand(2, 30, 21, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, got = plain(blocks), model(blocks)
    assert got.shape == (2, 512) and float(wanted.std()) > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_classes(plain: Plain, model: SoundEvents) -> None:
    """A clip's logits are the mean of those torch's own layers give its blocks; its embedding is that of `embed`."""
    clips = [noise(149 * 1024, seed=3), noise(500, seed=4)]
    vectors, logits = model.embed_and_classify(clips, SAMPLE_RATE, batch_size=2)
    np.testing.assert_array_equal(vectors, model.embed(clips, SAMPLE_RATE, batch_size=2))
    assert logits.shape == (2, CLASSES) and logits.dtype == np.float32
    for clip, row in zip(clips, logits, strict=True):
        with torch.inference_mode():
            wanted = plain.fc[3](plain(model._blocks(clip, SAMPLE_RATE))).mean(dim=0)
        assert float(wanted.std()) > 0.1
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-4)
    vectors, logits = model.embed_and_classify([], SAMPLE_RATE)
    assert vectors.shape == (0, 512) and logits.shape == (0, CLASSES)


@pytest.mark.parametrize(
    ("samples", "starts"),
    [(1, [0]), (44100, [0]), (99 * 1024 - 1, [0]), (99 * 1024, [0]), (149 * 1024 - 1, [0]), (149 * 1024, [0, 50])],
)
def test_front_end(front: SoundEvents, samples: int, starts: list[int]) -> None:
    """Blocks of 100 frames that overlap by half: one of a short clip is padded, a part of one at the end is dropped."""
    wave = noise(samples)
    frames = log_mel(wave)
    assert len(frames) == 1 + samples // 1024
    frames = np.pad(frames, ((0, max(0, 100 - len(frames))), (0, 0)))
    wanted = np.mean([frames[s : s + 100].mean(axis=0) for s in starts], axis=0)
    (got,) = front.embed([wave], SAMPLE_RATE)
    np.testing.assert_allclose(got[:96], wanted, atol=1e-4)
    np.testing.assert_allclose(front.embed([0.01 * wave], SAMPLE_RATE)[0], got, atol=1e-4)  # the peak is normalised


def test_silence(front: SoundEvents) -> None:
    assert not front.embed([np.zeros(50000)], 16000).any()


def test_resampling(front: SoundEvents) -> None:
    """Clips at another rate are those that soxr makes of them at 44.1 kHz; tensors and [1, samples] are clips too."""
    wave = noise(16000)
    wanted = front.embed([soxr.resample(wave, 16000, 44100)], 44100)
    np.testing.assert_array_equal(front.embed([wave], 16000), wanted)
    np.testing.assert_array_equal(front.embed(torch.from_numpy(wave)[None, None], 16000), wanted)
    low, high = wanted[0, [40, 90]]
    assert low > 0.2 and high < 0.05  # nothing above 8 kHz


def test_batches(model: SoundEvents) -> None:
    """An embedding does not depend on the clips beside it: lengths of 1, 3 and 1 blocks, in batches of 2."""
    clips = [noise(9000, 1), noise(3 * 51200 + 60000, 2), noise(100, 3)]

    def read() -> Iterator[np.ndarray]:
        yield from clips

    together = model.embed(read(), SAMPLE_RATE, batch_size=2)
    assert together.shape == (3, 512) and together.dtype == np.float32
    for clip, row in zip(clips, together, strict=True):
        np.testing.assert_allclose(model.embed([clip], SAMPLE_RATE)[0], row, rtol=1e-4, atol=1e-5)
    assert model.embed([], SAMPLE_RATE).shape == (0, 512)


@pytest.mark.parametrize(
    ("clip", "words"),
    [(np.zeros(0), "shape"), (np.zeros((2, 5)), "shape"), (np.array([0, np.nan]), "clip 1 holds NaN"), (0.0, "shape")],
)
def test_clips_that_are_refused(front: SoundEvents, clip: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        front.embed([noise(10), clip], 16000)
    with pytest.raises(InputError, match="at least 1"):
        front.embed([noise(10)], 0)


def test_tensors_that_do_not_fit(plain: Plain) -> None:
    state = plain.state_dict()
    name = "embedding_net.conv_block3.conv2.weight"
    with pytest.raises(CheckpointError, match=name):
        SoundEvents({key: value for key, value in state.items() if key != name}, "cut")
    with pytest.raises(CheckpointError, match=name):
        SoundEvents(state | {name: state[name][:-1]}, "cut")
    with pytest.raises(CheckpointError, match=r"fc\.3\.4\.bias"):
        SoundEvents(state | {"fc.3.4.bias": torch.zeros(10)}, "another library's")


def test_package_that_is_missing_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install; a checkpoint with another hash is not even parsed."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(MissingDependencyError, match="pip install --no-deps aisfx"):
        SoundEvents.from_installed()
    (tmp_path / "aisfx" / "models").mkdir(parents=True)
    (tmp_path / "aisfx" / "__init__.py").write_text("raise AssertionError('the package was run')")
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match="cannot read"):
        SoundEvents.from_installed()
    (tmp_path / "aisfx" / "models" / "checkpoint.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match="not the checkpoint of aisfx"):
        SoundEvents.from_installed()


def chirp(seconds: float) -> np.ndarray:
    t = np.arange(int(seconds * 44100)) / 44100
    wave = np.sin(2 * np.pi * (200 * t + 300 * t * t)) * (1 + 0.5 * np.sin(2 * np.pi * 5 * t)) * np.exp(-0.5 * t)
    return (0.3 * wave).astype(np.float32)


@pytest.mark.skipif(importlib.util.find_spec("aisfx") is None, reason="the package aisfx is not installed")
def test_installed_weights() -> None:
    """What the package's own code computes with librosa 0.11: two blocks, and a short clip that is padded."""
    model = SoundEvents.from_installed()
    long, short = model.embed([chirp(4.3), chirp(0.7)], 44100)
    picked = [0, 1, 2, 3, 100, 200, 300, 400, 511]
    wanted = [1.885351, 1.2988775, 0.42513216, 0.23521659, 0.10915796, 0.61792743, 1.3944271, 1.4163591, 1.3266761]
    np.testing.assert_allclose(long[picked], wanted, atol=2e-4)
    wanted = [2.5232341, 0.3145095, 1.2077762, 0.20693661, 0.15678908, 0.25235936, 1.7018223, 1.4805121, 1.4971906]
    np.testing.assert_allclose(short[picked], wanted, atol=2e-4)
    assert np.linalg.norm(long) == pytest.approx(33.577736, rel=1e-4)
    assert np.linalg.norm(short) == pytest.approx(34.231777, rel=1e-4)
