"""Weights of VGGish and CNN14: third-party `.pth` files become safetensors files once, which then are what is read."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from ..audio import write_files
from ..errors import CheckpointError

# What the field uses, and where it is.
SOURCES = {
    "vggish": "vggish-10086976.pth, a release of the project harritaylor/torchvggish",
    "cnn14": "Cnn14_mAP=0.431.pth (32 kHz) or Cnn14_16k_mAP=0.438.pth of PANNs (project "
    "qiuqiangkong/audioset_tagging_cnn, which names the Zenodo record)",
}
_DIGEST = "sha256"  # key in the header of files written here


def read_pth(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """The tensors of a `.pth` file: a state dict, or one under "model" as in PANNs' files.

    Nothing in the file is run. Counters of batch normalisation are left out. Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {path}; the weights are {SOURCES[kind]}")
    # Beside the tensors, PANNs' files hold the state of a sampler: numpy arrays of whole numbers. Nothing else is
    # allowed.
    array = np.zeros(0, np.int64)
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # of numpy 1 and 2
    allowed: list[Any] = [(array.__reduce__()[0], name) for name in names]
    allowed += [np.ndarray, np.dtype, type(array.dtype)]
    try:
        if zipfile.is_zipfile(path):  # torch reads past wrong checksums, so that flipped bits become other weights
            with zipfile.ZipFile(path) as archive:
                altered = archive.testzip()
            if altered is not None:
                raise ValueError(f"the checksum of {altered} is wrong")
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # they are about files that are refused a moment later
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds objects other than tensors, arrays and plain values, which could run code; "
            f"it was not loaded, use {SOURCES[kind]}"
        ) from error
    except Exception as error:  # a damaged archive raises whatever the bytes happen to trip over
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} is damaged or not a .pth file; get it again ({reason})") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no tensors by name; use {SOURCES[kind]}")
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()):
        raise CheckpointError(f"{path} holds other things than tensors by name; use {SOURCES[kind]}")
    return {name: tensor for name, tensor in content.items() if not name.endswith(".num_batches_tracked")}


def write_tensors(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all, with a hash of its values in the header.

    The same tensors give the same bytes, so that its own sha256 names the weights. Raises SirenError.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    digest = hashlib.sha256(_values(safetensors.torch.save(tensors))).hexdigest()
    write_files({path: safetensors.torch.save(tensors, metadata={_DIGEST: digest})})


def read_tensors(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a file that `siren convert-embedder` made, and the sha256 of the file. Raises CheckpointError."""
    command = f"siren convert-embedder {kind} WEIGHTS.pth {path.with_suffix('.safetensors')}"
    try:
        if path.is_file() and path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
            raise CheckpointError(
                f"{path} may be a pickle, which could run code, and is not read here: convert it once by "
                f"`{command.replace('WEIGHTS.pth', str(path))}`"
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"no file {path}; make it by `{command}` from {SOURCES[kind]}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : len(data) - len(_values(data))])
        if header.get("__metadata__", {}).get(_DIGEST) != hashlib.sha256(_values(data)).hexdigest():
            raise ValueError("its values are not those that were written")
    except (SafetensorError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{path} is damaged, or not of `siren convert-embedder` ({error})") from error
    return tensors, hashlib.sha256(data).hexdigest()


def _values(data: bytes) -> memoryview:
    """The bytes of a safetensors file after its header."""
    return memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
