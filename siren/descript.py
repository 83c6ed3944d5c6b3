"""Descript's own DAC, from its `.pth` file or a live `dac.DAC`, as the tensors of a transformers `DacModel`.

The two libraries build the same network under other names. Descript's has weight normalisation, w = g * v / |v|,
which is multiplied out here. The package `dac` is not needed.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, InputError

# DacConfig's name of each size, and Descript's.
_SIZES = {
    "encoder_hidden_size": "encoder_dim",
    "downsampling_ratios": "encoder_rates",
    "decoder_hidden_size": "decoder_dim",
    "upsampling_ratios": "decoder_rates",
    "n_codebooks": "n_codebooks",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "sampling_rate": "sample_rate",
}
# Magnitude and direction of a normalised weight, in torch's older and newer spelling.
_WEIGHT_NORM = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


def read_descript(source: Any) -> tuple[dict[str, Any], Mapping[str, Any], str]:
    """Read a `.pth` path or a `dac.DAC`: unchecked DacConfig values, its own state dict, and a name for errors.

    Raises CheckpointError if the file is missing, damaged, not Descript's, or holds more than tensors and plain values.
    """
    if isinstance(source, (str, Path)):
        where = str(source)
        state, kwargs = _read_pth(Path(source).expanduser())
    elif all(hasattr(source, name) for name in ("encoder", "quantizer", "decoder", "state_dict")):
        where = "the dac.DAC object"
        state = source.state_dict()
        kwargs = {name: getattr(source, name, None) for name in (*_SIZES.values(), "latent_dim")}
    else:
        raise InputError(f"from_descript takes a .pth path or a dac.DAC object, not {type(source).__name__}")
    return _sizes(kwargs, where), state, where


def _read_pth(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"no file {path}; Descript's weights are one .pth file, such as weights_16khz.pth")
    try:
        if zipfile.is_zipfile(path):  # torch reads past wrong checksums, so that flipped bits become other weights
            with zipfile.ZipFile(path) as archive:
                altered = archive.testzip()
            if altered is not None:
                raise ValueError(f"the checksum of {altered} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about files that are refused a moment later
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds objects other than tensors and plain values, which could run code; "
            "it was not loaded, use Descript's original file"
        ) from error
    except Exception as error:  # a damaged archive raises whatever the bytes happen to trip over
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} is damaged or not a .pth file; get it again ({reason})") from error
    if not isinstance(content, Mapping):
        content = {}
    state, metadata = content.get("state_dict"), content.get("metadata")
    kwargs = metadata.get("kwargs") if isinstance(metadata, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(kwargs, Mapping):
        raise CheckpointError(f"{path} is not one of Descript's files: it lacks state_dict or metadata.kwargs")
    return state, kwargs


def _sizes(kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    lacking = [name for name in _SIZES.values() if kwargs.get(name) is None]
    if lacking:
        raise CheckpointError(f"{where} does not say its {', '.join(lacking)}")
    values = {ours: kwargs[theirs] for ours, theirs in _SIZES.items()}
    for name in ("downsampling_ratios", "upsampling_ratios"):
        if not isinstance(values[name], (list, tuple)):
            raise CheckpointError(f"{where}: {_SIZES[name]} must be a list, not {values[name]!r}")
        values[name] = list(values[name])
    dims = values["codebook_dim"]  # Descript allows one for each codebook
    if isinstance(dims, (list, tuple)):
        if not dims or any(dim != dims[0] for dim in dims):
            raise CheckpointError(f"{where}: codebooks of different codebook_dim ({list(dims)}) are not supported")
        values["codebook_dim"] = dims[0]
    return values


def _modules(blocks: int, codebooks: int) -> Iterator[tuple[str, str]]:
    """(name in DacModel, name in Descript's model) of every module with weights."""

    def residual_unit(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        for i, name in enumerate(("snake1", "conv1", "snake2", "conv2")):
            yield f"{ours}.{name}", f"{theirs}.block.{i}"

    for ours, theirs in (("encoder", "encoder.block"), ("decoder", "decoder.model")):
        yield f"{ours}.conv1", f"{theirs}.0"
        yield f"{ours}.snake1", f"{theirs}.{blocks + 1}"
        yield f"{ours}.conv2", f"{theirs}.{blocks + 2}"
    for b in range(blocks):
        ours, theirs = f"encoder.block.{b}", f"encoder.block.{b + 1}.block"
        for unit in range(3):
            yield from residual_unit(f"{ours}.res_unit{unit + 1}", f"{theirs}.{unit}")
        yield f"{ours}.snake1", f"{theirs}.3"
        yield f"{ours}.conv1", f"{theirs}.4"
        ours, theirs = f"decoder.block.{b}", f"decoder.model.{b + 1}.block"
        yield f"{ours}.snake1", f"{theirs}.0"
        yield f"{ours}.conv_t1", f"{theirs}.1"
        for unit in range(3):
            yield from residual_unit(f"{ours}.res_unit{unit + 1}", f"{theirs}.{unit + 2}")
    for j in range(codebooks):
        for name in ("in_proj", "out_proj", "codebook"):
            yield f"quantizer.quantizers.{j}.{name}", f"quantizer.quantizers.{j}.{name}"


def convert(state: Mapping[str, Any], blocks: int, codebooks: int, where: str) -> dict[str, torch.Tensor]:
    """Rename and multiply out: a DacModel state dict in float32 on the CPU.

    What has no counterpart keeps its name, so that the caller's comparison with the model reports it.
    """
    left = dict(state)
    for name, value in left.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{where}: {name!r} is not a floating point tensor")
    result = {}
    for ours, theirs in _modules(blocks, codebooks):
        for leaf in ("alpha", "bias", "weight"):
            if f"{theirs}.{leaf}" in left:
                result[f"{ours}.{leaf}"] = left.pop(f"{theirs}.{leaf}").detach().float().cpu().contiguous()
        for g, v in _WEIGHT_NORM:
            if f"{theirs}.{g}" in left and f"{theirs}.{v}" in left:
                scale = left.pop(f"{theirs}.{g}").detach().float().cpu()
                direction = left.pop(f"{theirs}.{v}").detach().float().cpu()
                if direction.dim() != 3 or scale.shape != (len(direction), 1, 1):
                    raise CheckpointError(f"{where}: {theirs}.{g} and {v} have shapes that do not belong together")
                result[f"{ours}.weight"] = scale * direction / direction.norm(dim=(1, 2), keepdim=True)
    return result | left
