"""The offline aligner: sounds and texts to unit vectors that are close where the text says what is heard.

    similarity = audio(sound) . text(caption)

It is small and runs without network, so that alignment and reranking have a score everywhere: a convolutional network
over log-mel frames, and a head over the token states of the frozen MiniLM prompt encoder. It is trained by
aligner_training.py on clip folders. It knows the sounds and words of those only: it is no stand-in for CLAP. Left out:
other prompt encoders.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr
import torch
from torch import Tensor, nn

from .checkpoint import replace_folder, sync
from .errors import CheckpointError, InputError
from .manifest import MINI
from .mel import mel_filterbank
from .pretrained import CONFIG, WEIGHTS, check_weights, find_folder, move, read_config, read_weights, write_weights
from .text import PromptEncoder

MODEL_TYPE = "siren-aligner"
ENCODER = "minilm"
_MINI_FOLDER = Path(__file__).parent / "models" / f"{MINI}-aligner"
_SILENCE = -9.0  # log10 of a band's power below which nothing counts as heard; a full-scale sine has power 1
_RANGE = 8.0  # powers of ten below a clip's loudest band that are seen
_CACHED_TEXTS = 1024  # 0.5 KB each
# Lowest and highest value of each size, so that a hostile config cannot ask for terabytes.
_LIMITS = {
    "sampling_rate": (1000, 384000),
    "window": (32, 16384),
    "hop_length": (8, 16384),
    "n_mels": (4, 1024),
    "hidden": (1, 4096),
    "dim": (1, 4096),
    "text_dim": (1, 16384),
}
_MAX_STAGES, _MAX_CHANNELS = 8, 1024
MIN_SECONDS, MAX_SECONDS = 0.1, 60.0


@dataclass(frozen=True)
class AlignerConfig:
    """Sizes of an aligner.

    sampling_rate in Hz, window and hop_length in samples. channels: of each stage of the audio network, which halves
    frequency and time. hidden: width of the text head. dim: of the vectors. text_dim: of the encoder's token states.
    seconds: of the sounds it was trained on; shorter ones are filled up with silence.
    """

    sampling_rate: int = 16000
    window: int = 1024
    hop_length: int = 320
    n_mels: int = 64
    channels: tuple[int, ...] = (32, 64, 128, 256)
    hidden: int = 256
    dim: int = 128
    text_dim: int = 384
    seconds: float = 4.0


class AudioNetwork(nn.Module):
    """Sound [N, S] to unit vectors [N, dim].

    Each stage is a 3x3 convolution of stride 2 and a second one with a shortcut past it, both with batch normalisation
    and ReLU. Then the mean over frequency, and mean and maximum over time.
    """

    filterbank: Tensor  # [n_mels, window // 2 + 1]
    hann: Tensor  # [window]
    height: Tensor  # [n_mels, 1]

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        self.first, self.second = nn.ModuleList(), nn.ModuleList()
        inputs = 2
        for outputs in config.channels:
            self.first.append(_convolution(inputs, outputs, stride=2))
            self.second.append(_convolution(outputs, outputs, stride=1))
            inputs = outputs
        self.projection = nn.Linear(2 * inputs, config.dim)
        filterbank = torch.from_numpy(mel_filterbank(config.n_mels, config.window, config.sampling_rate))
        self.register_buffer("filterbank", filterbank, persistent=False)
        self.register_buffer("hann", torch.hann_window(config.window), persistent=False)
        self.register_buffer("height", torch.linspace(-1, 1, config.n_mels)[:, None], persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        x = self.features(waveforms).contiguous(memory_format=torch.channels_last)
        for first, second in zip(self.first, self.second, strict=True):
            x = first(x).relu()
            x = (second(x) + x).relu()
        x = x.mean(dim=2)
        return nn.functional.normalize(self.projection(torch.cat((x.mean(dim=2), x.amax(dim=2)), dim=1)), dim=1)

    def features(self, waveforms: Tensor) -> Tensor:
        """Sound [N, S], S >= 1 -> [N, 2, n_mels, frames]: how loud each band is, 0..1, and how high it lies, -1..1.

        1 is the clip's loudest band, 0 is 80 dB below it or silence: how loud the clip is as a whole does not count.
        """
        c = self.config
        spectrum = torch.stft(
            waveforms, c.window, c.hop_length, window=self.hann, pad_mode="constant", return_complex=True
        )
        power = (spectrum.abs() * (2 / self.hann.sum())).square()
        level = torch.log10(self.filterbank @ power + 10 ** (_SILENCE - _RANGE))
        peak = level.amax(dim=(1, 2), keepdim=True).clamp(min=_SILENCE)
        level = ((level - peak) / _RANGE + 1).clamp(min=0)
        return torch.stack((level, self.height.expand_as(level)), dim=1)


class TextHead(nn.Module):
    """Token states [N, P, text_dim] and their mask [N, P] to unit vectors [N, dim].

    A learned weighting of the tokens, which starts as their mean, and two linear layers.
    """

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.weighting = nn.Linear(config.text_dim, 1)
        nn.init.zeros_(self.weighting.weight)
        self.norm = nn.LayerNorm(config.text_dim)
        self.hidden = nn.Linear(config.text_dim, config.hidden)
        self.projection = nn.Linear(config.hidden, config.dim)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        scores = self.weighting(states)[..., 0].masked_fill(~mask, -torch.inf)
        pooled = (scores.softmax(dim=1)[..., None] * states).sum(dim=1)
        hidden = nn.functional.gelu(self.hidden(self.norm(pooled)))
        return nn.functional.normalize(self.projection(hidden), dim=1)


class AlignerModel(nn.Module):
    """Both networks. Weights are drawn from torch's global generator; seed it, or load weights."""

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        self.audio = AudioNetwork(config)
        self.text = TextHead(config)


class Aligner:
    """A frozen aligner in float32: `Aligner.from_pretrained`, or `Aligner(model)`.

    Matrices are rounded to half precision, as a file holds them: an aligner and its saved copy give the same bits.
    Every sound and text runs alone, so a score does not depend on the others' company. Threads may share one.
    `encoder` is the prompt encoder minilm; it is loaded when a text comes, if none is given.
    """

    def __init__(self, model: AlignerModel, encoder: Any = None) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for parameter in model.parameters():
            parameter.copy_(_stored(parameter))
        self._encoder = encoder
        self._encoder_identity = None if encoder is None else encoder.identity
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device = "cpu", encoder: Any = None) -> Aligner:
        """Load an aligner folder (config.json, model.safetensors), or one of that name on the model hub.

        "siren-mini" is the one in the package; a Path, or "./siren-mini", is always a folder. Raises CheckpointError
        for what is missing, damaged or does not fit, also for an `encoder` it was not trained with.
        """
        if name == MINI and not _MINI_FOLDER.is_dir():
            raise CheckpointError(
                f"the aligner of {MINI} is not in this installation: pass a folder that `siren train-aligner` made"
            )
        folder = _MINI_FOLDER if name == MINI else find_folder(name, "an aligner")
        config, identity = _check_config(read_config(folder), str(folder / CONFIG))
        weights, _ = read_weights(folder)
        with torch.random.fork_rng(devices=[]):
            try:
                model = AlignerModel(config)
            except InputError as error:  # bands that no Fourier bin falls into
                raise CheckpointError(f"{folder / CONFIG}: {error}") from error
        model.load_state_dict(check_weights(weights, _state(model), folder), strict=False)
        aligner = cls(model)
        aligner._encoder_identity = identity
        if encoder is not None:
            aligner._encoder = _check_encoder(encoder, identity, config)
        return aligner.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an aligner folder. It appears whole or not at all; an aligner that is there is replaced.

        Raises CheckpointError, also for a folder that holds anything else.
        """
        replace_folder(Path(folder), CONFIG, _check_replaceable, self._write)

    @property
    def config(self) -> AlignerConfig:
        return self.model.config

    @property
    def sample_rate(self) -> int:
        """What sounds are resampled to, in Hz."""
        return self.config.sampling_rate

    @property
    def dim(self) -> int:
        """Width of the vectors, D."""
        return self.config.dim

    @property
    def device(self) -> torch.device:
        return self.model.audio.projection.weight.device

    @property
    def identity(self) -> str:
        """What makes the scores: the sha256 of sizes and weights. Scores of different aligners are not comparable."""
        digest = hashlib.sha256(json.dumps(_values(self.config)).encode())
        for name, tensor in sorted(_state(self.model).items()):
            digest.update(f"{name} {list(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return f"aligner sha256:{digest.hexdigest()}"

    @property
    def encoder(self) -> Any:
        """The prompt encoder. Raises MissingDependencyError if minilm is not installed."""
        with self._lock:
            if self._encoder is None:
                encoder = PromptEncoder.from_pretrained(ENCODER, self.device)
                self._encoder = _check_encoder(encoder, self._encoder_identity, self.config)
            return self._encoder

    def to(self, device: str | torch.device) -> Aligner:
        """Move the weights; returns itself."""
        move(self.model, device)
        return self

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in _state(self.model).values())
        return f"Aligner({count / 1e6:.2f} M parameters, {self.dim} values, {self.sample_rate} Hz, {self.device})"

    @torch.no_grad()
    def embed_audio(self, waveforms: Sequence[npt.ArrayLike], sample_rate: int) -> npt.NDArray[np.float32]:
        """Unit vectors [N, D] of N mono sounds, each [samples] or [1, samples], of any lengths.

        Resampled by soxr; those shorter than the config's `seconds` are filled up with silence. Raises InputError for a
        sound that is empty or not mono, and for NaN and infinity.
        """
        if sample_rate < 1:
            raise InputError(f"sample_rate must be at least 1, not {sample_rate!r}")
        rows, shortest = [], round(self.config.seconds * self.sample_rate)
        for i, waveform in enumerate(waveforms):
            wave = _mono(waveform, i)
            if sample_rate != self.sample_rate:
                wave = soxr.resample(wave, sample_rate, self.sample_rate)
            wave = np.pad(wave, (0, max(0, shortest - len(wave))))
            rows.append(self.model.audio(torch.from_numpy(wave).to(self.device)[None])[0].cpu())
        return torch.stack(rows).numpy() if rows else np.zeros((0, self.dim), np.float32)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors [N, D] of N texts. Raises InputError for an empty text, or one too long for the encoder."""
        if isinstance(texts, str):
            raise InputError("texts must be a list of texts")
        with self._lock:
            found = {text: self._texts[text] for text in texts if text in self._texts}
        for text in dict.fromkeys(texts):
            if text not in found:
                states, mask = self.encoder([text])
                found[text] = self.model.text(states.to(self.device), mask.to(self.device))[0].cpu()
        with self._lock:
            self._texts.update(found)
            while len(self._texts) > _CACHED_TEXTS:
                self._texts.popitem(last=False)
        rows = [found[text] for text in texts]
        return torch.stack(rows).numpy() if rows else np.zeros((0, self.dim), np.float32)

    def similarity(
        self, texts: Sequence[str], waveforms: Sequence[npt.ArrayLike], sample_rate: int
    ) -> npt.NDArray[np.float32]:
        """Cosine similarity of text i with sound i, [N], within -1..1. Raises InputError as the two above do."""
        if len(texts) != len(waveforms):
            raise InputError(f"there are {len(texts)} texts and {len(waveforms)} waveforms")
        products = self.embed_text(texts) * self.embed_audio(waveforms, sample_rate)
        return products.sum(axis=1).clip(-1, 1)

    def _write(self, folder: Path) -> None:
        values = {"model_type": MODEL_TYPE, "prompt_encoder": self.encoder.identity} | _values(self.config)
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        state = _state(self.model)
        write_weights(folder, {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in state.items()})
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # newer safetensors write for the owner only
        for path in (folder / CONFIG, folder / WEIGHTS, folder):
            sync(path)


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


def _stored(tensor: Tensor) -> Tensor:
    """A tensor as a file gives it back: matrices and kernels go through half precision."""
    return tensor.half().float() if tensor.dim() > 1 else tensor


def _state(model: AlignerModel) -> dict[str, Tensor]:
    """The tensors of a file: all but the counters of batch normalisation, which only training reads."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def _values(config: AlignerConfig) -> dict[str, Any]:
    return asdict(config) | {"channels": list(config.channels)}


def _check_config(values: dict[str, Any], where: str) -> tuple[AlignerConfig, str]:
    """The config of untrusted values, and the prompt encoder's identity."""
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{where}: model_type must be '{MODEL_TYPE}', not {values.get('model_type')!r}")
    known = {field.name for field in fields(AlignerConfig)} | {"model_type", "prompt_encoder"}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise CheckpointError(f"{where}: unknown fields {', '.join(unknown)}")
    for name, (low, high) in _LIMITS.items():
        if not _whole(values.get(name), low, high):
            raise CheckpointError(
                f"{where}: {name} must be a whole number from {low} to {high}, not {values.get(name)!r}"
            )
    channels = values.get("channels")
    if (
        not isinstance(channels, list)
        or not 1 <= len(channels) <= _MAX_STAGES
        or not all(_whole(count, 1, _MAX_CHANNELS) for count in channels)
    ):
        raise CheckpointError(
            f"{where}: channels must be 1 to {_MAX_STAGES} whole numbers up to {_MAX_CHANNELS}, not {channels!r}"
        )
    if values["hop_length"] > values["window"]:
        raise CheckpointError(f"{where}: hop_length must be at most window")
    seconds = values.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise CheckpointError(
            f"{where}: seconds must be a number from {MIN_SECONDS:g} to {MAX_SECONDS:g}, not {seconds!r}"
        )
    identity = values.get("prompt_encoder")
    if not isinstance(identity, str):
        raise CheckpointError(f"{where}: prompt_encoder must be the identity of an encoder, not {identity!r}")
    sizes = {name: values[name] for name in _LIMITS}
    return AlignerConfig(**sizes, channels=tuple(channels), seconds=float(seconds)), identity


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_encoder(encoder: Any, identity: str | None, config: AlignerConfig) -> Any:
    if identity not in (None, encoder.identity) or encoder.dim != config.text_dim:
        raise CheckpointError(
            f"the aligner reads token states of {identity} (width {config.text_dim}), "
            f"not of {encoder.identity} (width {encoder.dim})"
        )
    return encoder


def _check_replaceable(target: Path) -> None:
    others = {path.name for path in target.iterdir()} - {CONFIG, WEIGHTS} if target.exists() else set()
    if others:
        raise CheckpointError(f"{target} also holds {min(others)!r}; choose another folder for the aligner")


def _mono(waveform: npt.ArrayLike, index: int) -> npt.NDArray[np.float32]:
    wave = np.asarray(waveform, dtype=np.float32)
    wave = wave[0] if wave.ndim == 2 and len(wave) == 1 else wave
    if wave.ndim != 1 or not len(wave):
        raise InputError(f"sound {index} must have shape [samples] or [1, samples], not {list(wave.shape)}")
    if not np.isfinite(wave).all():
        raise InputError(f"sound {index} holds NaN or infinity")
    return np.ascontiguousarray(wave)
