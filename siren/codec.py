"""The codec: sound to codes and back. DAC 16 kHz by transformers' `DacModel`, or the spectral codec of spectral.py.

Both have 12 codebooks and 50 frames a second. Training is elsewhere: spectral_training.py and dac_training.py. A codec
keeps nothing between calls, so threads may share one.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checkpoint import replace_folder, sync
from .descript import convert, read_descript
from .errors import CheckpointError, InputError
from .pretrained import (
    CONFIG,
    WEIGHTS,
    check_weights,
    find_folder,
    missing,
    move,
    read_config,
    read_weights,
    write_weights,
)
from .spectral import MODEL_TYPE, SpectralConfig, SpectralModel

MAX_SECONDS = 120  # a full-size decoder needs about 35 MB of memory for each second of sound
_MAX_PEAK = 4.0

# Lowest and highest value of each size, so that a hostile config cannot ask for terabytes.
_LIMITS = {
    "encoder_hidden_size": (1, 1024),
    "decoder_hidden_size": (1, 16384),
    "n_codebooks": (1, 64),
    "codebook_size": (2, 65536),
    "codebook_dim": (1, 1024),
    "sampling_rate": (1000, 384000),
}
_SPECTRAL_LIMITS = {
    "sampling_rate": (1000, 384000),
    "steps_per_frame": (1, 16),
    "step": (8, 4096),
    "window": (32, 16384),
    "n_mels": (1, 1024),
    "n_codebooks": (1, 64),
    "codebook_size": (2, 65536),
    "codebook_dim": (1, 1024),
    "phase_iterations": (1, 1024),
}


class DecodeEmbedding(NamedTuple):
    """One codebook's way from a code to the decoder: `weight @ codebook[code] + bias` (float32, CPU, private copies).

    codebook [V, code_dim], weight [feature_dim, code_dim], bias [feature_dim].
    """

    codebook: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def table(self) -> torch.Tensor:
        """The embedding of every code, [V, feature_dim]."""
        return self.codebook @ self.weight.T + self.bias


class Codec:
    """A frozen codec in float32: `Codec.from_pretrained`, `Codec.from_descript`, or `Codec(model)`.

    The model is a transformers `DacModel` or a `SpectralModel`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.float().eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder_or_name: str | Path, device: str | torch.device = "cpu") -> Codec:
        """Load a codec folder (config.json, model.safetensors), or one of that name on the model hub.

        The folder is a `DacModel`'s or a spectral codec's. Raises CheckpointError for what is missing, damaged or does
        not fit.
        """
        folder = find_folder(folder_or_name, "a codec")
        values = read_config(folder)
        kind = values.get("model_type")
        if kind not in ("dac", MODEL_TYPE):
            raise CheckpointError(f"{folder / CONFIG}: model_type must be 'dac' or '{MODEL_TYPE}', not {kind!r}")
        check = _check_config if kind == "dac" else _check_spectral
        config = check(values, str(folder / CONFIG))
        weights, _ = read_weights(folder)
        return _build(config, weights, str(folder)).to(device)

    @classmethod
    def from_descript(cls, source: Any, device: str | torch.device = "cpu") -> Codec:
        """Load Descript's own `weights_16khz.pth` (nothing in it is run) or take over a live `dac.DAC` object.

        Raises CheckpointError if a tensor is missing, left over, or of another shape than the file's own sizes say.
        """
        values, state, where = read_descript(source)
        config = _check_config(values, where)
        weights = convert(state, len(config.downsampling_ratios), config.n_codebooks, where)
        return _build(config, weights, where).to(device)

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return int(self.model.config.sampling_rate)

    @property
    def hop_length(self) -> int:
        """Samples a frame."""
        if isinstance(self.model, SpectralModel):
            return self.model.config.hop_length
        return math.prod(self.model.config.downsampling_ratios)

    @property
    def num_codebooks(self) -> int:
        return int(self.model.config.n_codebooks)

    @property
    def codebook_size(self) -> int:
        """Codes in each codebook, V."""
        return int(self.model.config.codebook_size)

    @property
    def device(self) -> torch.device:
        parameter: torch.Tensor = next(self.model.parameters())
        return parameter.device

    @property
    def identity(self) -> str:
        """What makes the codes: the kind and the sha256 of the sizes and weights. Codes of another one mean nothing."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        if isinstance(self.model, SpectralModel):  # a DAC's sizes follow from its weights' shapes
            digest.update(json.dumps(self.model.config.to_dict()).encode())
        kind = MODEL_TYPE if isinstance(self.model, SpectralModel) else "dac"
        return f"{kind} {self.sample_rate} Hz sha256:{digest.hexdigest()}"

    def to(self, device: str | torch.device) -> Codec:
        """Move the weights; returns itself."""
        move(self.model, device)
        return self

    def __repr__(self) -> str:
        return (
            f"Codec({self.sample_rate} Hz, {self.num_codebooks} codebooks of {self.codebook_size} codes, "
            f"{self.hop_length} samples a frame, {self.device})"
        )

    @torch.no_grad()
    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        """Sound, float32 [B, 1, S] within about -1..1, to codes, int64 [B, num_codebooks, ceil(S / hop_length)].

        The sound must be at `sample_rate`. The last frame is filled up with silence. Raises InputError.
        """
        _check_tensor("waveform", waveform, torch.float32, self.device)
        if waveform.dim() != 3 or waveform.shape[0] < 1 or waveform.shape[1] != 1 or waveform.shape[2] < 1:
            raise InputError(f"waveform must have shape [batch, 1, samples], not {list(waveform.shape)}")
        self._check_length(waveform.shape[2])
        peak = float(waveform.abs().amax())
        if not math.isfinite(peak):
            raise InputError("waveform holds NaN or infinity")
        if peak > _MAX_PEAK:
            raise InputError(f"waveform reaches {peak:.4g} but must be within -1..1; divide 16-bit samples by 32768")
        frames = -(-waveform.shape[2] // self.hop_length)
        padded = torch.nn.functional.pad(waveform, (0, frames * self.hop_length - waveform.shape[2]))
        # One clip at a time: its codes do not depend on its neighbours, and memory does not grow with the batch.
        return torch.cat([self.model.encode(clip[None]).audio_codes for clip in padded])

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes, int64 [B, num_codebooks, T], to sound, float32 [B, 1, hop_length * T] within -1..1.

        Raises InputError.
        """
        _check_tensor("codes", codes, torch.int64, self.device)
        if codes.dim() != 3 or codes.shape[0] < 1 or codes.shape[1] != self.num_codebooks or codes.shape[2] < 1:
            raise InputError(f"codes must have shape [batch, {self.num_codebooks}, frames], not {list(codes.shape)}")
        samples = codes.shape[2] * self.hop_length
        self._check_length(samples)
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            bad = low if low < 0 else high
            raise InputError(f"codes must be within 0..{self.codebook_size - 1}; there is a {bad}")
        sound = torch.cat([self.model.decode(audio_codes=clip[None]).audio_values for clip in codes])
        # A transposed convolution of odd stride s crops (s + 1) / 2 samples at either end, one more than it should, so
        # every stage of stride 5 ends one sample early: 8 samples at 16 kHz. They are the last ones; silence stands in.
        return torch.nn.functional.pad(sound, (0, samples - sound.shape[-1]))[:, None]

    def decode_embeddings(self) -> list[DecodeEmbedding]:
        """The frozen codebook and output projection of each codebook, which a Siren's code embeddings start from."""
        return [
            DecodeEmbedding(
                part.codebook.weight.detach().cpu().clone(),
                part.out_proj.weight.detach().cpu().squeeze(-1).clone(),
                part.out_proj.bias.detach().cpu().clone(),
            )
            for part in self.model.quantizer.quantizers
        ]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a codec folder; a DAC's is one that transformers reads too. It appears whole or not at all.

        An existing codec is replaced; a folder that holds anything else is refused. A save that was killed leaves the
        old codec in its place or as `.NAME.previous`, which the next save finds. Raises CheckpointError.
        """
        replace_folder(Path(folder), CONFIG, _check_replaceable, self._write)

    def _write(self, folder: Path) -> None:
        values = self.model.config.to_dict()
        if not isinstance(self.model, SpectralModel):
            values |= {"architectures": ["DacModel"]}
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        write_weights(folder, self.model.state_dict())
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # newer safetensors write for the owner only
        for path in (folder / CONFIG, folder / WEIGHTS, folder):
            sync(path)

    def _check_length(self, samples: int) -> None:
        if samples > MAX_SECONDS * self.sample_rate:
            seconds = samples / self.sample_rate
            raise InputError(f"a clip of {seconds:.1f} s is too long for one call; the limit is {MAX_SECONDS} s")


def _check_replaceable(target: Path) -> None:
    others = {path.name for path in target.iterdir()} - {CONFIG, WEIGHTS} if target.exists() else set()
    if others:
        raise CheckpointError(f"{target} also holds {min(others)!r}; choose another folder for the codec")


def _check_config(values: dict[str, Any], where: str) -> Any:
    """The DacConfig of untrusted values."""
    try:
        from transformers import DacConfig
    except ImportError as error:
        raise missing("transformers", "dac") from error
    ratios = values.get("downsampling_ratios")
    if not isinstance(ratios, list) or not 1 <= len(ratios) <= 8 or not all(_whole(ratio, 1, 64) for ratio in ratios):
        raise CheckpointError(f"{where}: downsampling_ratios must be 1 to 8 whole numbers up to 64, not {ratios!r}")
    if values.get("upsampling_ratios", ratios[::-1]) != ratios[::-1]:
        raise CheckpointError(f"{where}: upsampling_ratios must be downsampling_ratios reversed")
    for name, (low, high) in _LIMITS.items():
        if not _whole(values.get(name), low, high):
            raise CheckpointError(
                f"{where}: {name} must be a whole number from {low} to {high}, not {values.get(name)!r}"
            )
    if values["codebook_size"] & (values["codebook_size"] - 1):
        raise CheckpointError(f"{where}: codebook_size must be a power of 2, not {values['codebook_size']}")
    # Hidden size and hop follow from these; older files state a stale hop, so what they say of it is not read.
    return DacConfig(downsampling_ratios=ratios, **{name: values[name] for name in _LIMITS})


def _check_spectral(values: dict[str, Any], where: str) -> SpectralConfig:
    """The SpectralConfig of untrusted values."""
    values = {name: value for name, value in values.items() if name != "model_type"}
    for name, (low, high) in _SPECTRAL_LIMITS.items():
        if not _whole(values.get(name), low, high):
            raise CheckpointError(
                f"{where}: {name} must be a whole number from {low} to {high}, not {values.get(name)!r}"
            )
    floor = values.get("floor")
    if isinstance(floor, bool) or not isinstance(floor, float) or not 1e-12 <= floor <= 1e-2:
        raise CheckpointError(f"{where}: floor must be a number from 1e-12 to 0.01, not {floor!r}")
    unknown = sorted(values.keys() - _SPECTRAL_LIMITS.keys() - {"floor"})
    if unknown:
        raise CheckpointError(f"{where}: unknown fields {', '.join(unknown)}")
    if (values["window"] - values["step"]) % 2 or values["window"] < 2 * values["step"]:
        raise CheckpointError(f"{where}: window must be at least twice step, and their difference even")
    return SpectralConfig(**values)


def _build(config: Any, weights: dict[str, torch.Tensor], where: str) -> Codec:
    if isinstance(config, SpectralConfig):
        try:
            spectral = SpectralModel(config)
        except InputError as error:  # bands that no Fourier bin falls into
            raise CheckpointError(f"{where}: {error}") from error
        spectral.load_state_dict(check_weights(weights, spectral.state_dict(), where))
        return Codec(spectral)
    from transformers import DacModel

    with torch.device("meta"):  # names and shapes only: no memory, no random numbers drawn
        model = DacModel(config)
    model.load_state_dict(check_weights(weights, model.state_dict(), where), assign=True)
    return Codec(model)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_tensor(name: str, value: Any, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.dtype != dtype:
        raise InputError(f"{name} must be {dtype}, not {value.dtype}")
    if value.device != device:
        raise InputError(f"{name} is on {value.device} but the codec is on {device}; move one with .to()")
