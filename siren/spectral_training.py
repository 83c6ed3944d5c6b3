"""Fitting a spectral codec: PCA and k-means, stage by stage, on log-mel frames. Minutes on a CPU; no gradient."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .codec import Codec
from .codec_data import read_clips
from .data.sound import SAMPLE_RATE
from .errors import CheckpointError, InputError
from .spectral import Codebook, SpectralConfig, SpectralModel, nearest

_KEEP_SILENCE = 20  # one in so many silent frames is kept: the others say nothing new


def train_spectral(
    sources: Sequence[str | Path],
    out: str | Path,
    max_frames: int = 150_000,
    iterations: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> Codec:
    """Fit a spectral codec to the sounds of clip folders and write it to the folder `out`; see `fit_spectral`.

    Raises InputError and DataError for arguments and sources, CheckpointError if `out` holds something already.
    """
    out = Path(out).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; choose another folder for the codec")
    config = SpectralConfig(sampling_rate=SAMPLE_RATE)
    _check_arguments(config, max_frames, iterations, seed)
    clips = read_clips(sources, progress)
    sounds = (torch.from_numpy(clip).float() / 32767 for clip in clips)
    codec = fit_spectral(sounds, config, max_frames, iterations, seed, progress)
    codec.save_pretrained(out)
    return codec


@torch.no_grad()
def fit_spectral(
    waveforms: Iterable[Tensor],
    config: SpectralConfig | None = None,
    max_frames: int = 150_000,
    iterations: int = 12,
    seed: int = 0,
    progress: bool = True,
) -> Codec:
    """A spectral codec fitted to sounds, float32 [S] each, at the config's sampling rate.

    Every stage takes the residual's leading `codebook_dim` principal directions and clusters the frames there
    (Lloyd's algorithm from a random sample of frames, `iterations` rounds; an empty cluster moves to a random frame).
    At most `max_frames` frames are used, drawn by `seed`. The same sounds and arguments give the same codec. Raises
    InputError if there are fewer frames than codes.
    """
    config = config or SpectralConfig()
    _check_arguments(config, max_frames, iterations, seed)
    model = SpectralModel(config)
    generator = torch.Generator().manual_seed(seed)
    residual = _sample(_frames(model, waveforms), max_frames, config.floor, generator)
    if len(residual) < config.codebook_size:
        raise InputError(
            f"the sounds hold {len(residual)} frames that are not silent, and {config.codebook_size} codes need at "
            "least as many: give more sound"
        )
    model.mean.copy_(residual.mean(dim=0))
    residual -= model.mean
    stages = tqdm(model.quantizer.quantizers, desc="codebooks", disable=not progress or not sys.stderr.isatty())
    for stage in stages:
        assert isinstance(stage, Codebook)
        _fit_stage(stage, residual, iterations, generator)
        residual -= stage.look_up(stage.nearest(residual))
        stages.set_postfix(rms=f"{residual.square().mean().sqrt():.3f}")
    return Codec(model)


def _check_arguments(config: SpectralConfig, max_frames: int, iterations: int, seed: int) -> None:
    for name, value, least in (("max_frames", max_frames, config.codebook_size), ("iterations", iterations, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise InputError(f"seed must be a whole number from 0 to 2^32 - 1, not {seed!r}")


def _frames(model: SpectralModel, waveforms: Iterable[Tensor]) -> Tensor:
    hop = model.config.hop_length
    parts = []
    for waveform in waveforms:
        padded = torch.nn.functional.pad(waveform, (0, -len(waveform) % hop))
        parts.append(model.frames(padded))
    if not parts:
        raise InputError("there is no sound to fit a codec to")
    return torch.cat(parts)


def _sample(frames: Tensor, count: int, floor: float, generator: torch.Generator) -> Tensor:
    """At most `count` frames in random order, most of the silent ones left out."""
    quietest = math.log(floor) + 0.1
    silent = (frames < quietest).all(dim=1)
    kept = torch.cat((frames[~silent], frames[silent][::_KEEP_SILENCE]))
    return kept[torch.randperm(len(kept), generator=generator)[:count]]


def _fit_stage(stage: Codebook, residual: Tensor, iterations: int, generator: torch.Generator) -> None:
    size, dim = stage.codebook.weight.shape
    # eigh sorts upwards. The covariance is summed in float64: its small eigenvalues would drown in float32's rounding.
    covariance = torch.zeros(residual.shape[1], residual.shape[1], dtype=torch.float64)
    for part in residual.split(65536):
        covariance += part.T.double() @ part.double()
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -dim:].flip(1).float()
    points = residual @ directions
    centres = points[:size].clone()  # the frames are in random order
    for _ in range(iterations):
        codes = nearest(points, centres)
        counts = torch.bincount(codes, minlength=size)
        centres = torch.zeros_like(centres).index_add_(0, codes, points) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = points[torch.randint(len(points), (len(empty),), generator=generator)]
    stage.codebook.weight.copy_(centres)
    stage.in_proj.weight.copy_(directions.T[:, :, None])
    stage.out_proj.weight.copy_(directions[:, :, None])
    assert stage.in_proj.bias is not None and stage.out_proj.bias is not None
    stage.in_proj.bias.zero_()
    stage.out_proj.bias.zero_()
