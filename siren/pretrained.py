"""Model folders in the transformers format, local or from the model hub, read without running anything in them.

Only `config.json` (JSON) and `model.safetensors` are opened here; a pickle such as `pytorch_model.bin` never is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from .errors import CheckpointError, InputError, MissingDependencyError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_DIGEST = "sha256"  # key in the header of weights written here
_JSON_LIMIT = 4 << 20  # bytes; real ones are a few KB


def find_folder(name: str | Path, what: str, files: Sequence[str] = ()) -> Path:
    """The local folder of a model: `name` itself, or the hub's files fetched into the hub's cache.

    `what` names the model in errors ("a codec"); `files` are wanted from the hub beside the config and the weights.
    Without network the hub's cache is used. Raises CheckpointError that says what is missing.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{name} is a file; {what} is a folder with {CONFIG} and {WEIGHTS}")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a home folder of nobody
        raise CheckpointError(f"cannot look for {what} at {str(name)!r}: {error}") from error
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name), re.ASCII):
        raise CheckpointError(f"no folder {str(name)!r}; {what} is a local folder or a hub name such as owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing("transformers", "text") from error
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS, *files]))
    except Exception as error:  # network, proxy, access and name errors of several libraries, with no common base
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(
            f"there is no folder {str(name)!r}, and the hub did not give {what} of that name ({reason}); "
            "without network, download it elsewhere and pass its folder"
        ) from error


def missing(package: str, extra: str) -> MissingDependencyError:
    """The error for an optional package that cannot be imported."""
    return MissingDependencyError(f"{package} is not installed (or does not import): pip install 'siren[{extra}]'")


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json`. Raises CheckpointError."""
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            data = file.read(_JSON_LIMIT + 1)
        if len(data) > _JSON_LIMIT:
            raise CheckpointError(f"{path} is larger than {_JSON_LIMIT >> 20} MiB; this is not a model's config")
        values = json.loads(data)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {CONFIG}; the folder is incomplete") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """All tensors of `model.safetensors` on the CPU, and the sha256 of the very bytes they were parsed from.

    Raises CheckpointError.
    """
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        pickles = [other.name for other in sorted(folder.glob("*")) if other.suffix in (".bin", ".pth", ".pt", ".ckpt")]
        hint = f" ({pickles[0]} is a pickle, which could run code, and is never read)" if pickles else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS}{hint}; save the model as one safetensors file") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        tensors = safetensors.torch.load(data)
        end = 8 + int.from_bytes(data[:8], "little")
        wanted = json.loads(data[8:end]).get("__metadata__", {}).get(_DIGEST)
        if wanted is not None and hashlib.sha256(memoryview(data)[end:]).hexdigest() != wanted:
            raise ValueError("its values are not those that were saved")
    except (SafetensorError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{path} is damaged or not safetensors; get it again ({error})") from error
    return tensors, hashlib.sha256(data).hexdigest()


def write_weights(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write `model.safetensors` with a hash of its values in its header, which `read_weights` checks.

    In the header, because a program that changes the weights writes a new one; in config.json it would stay behind.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    data = safetensors.torch.save(tensors)
    end = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(memoryview(data)[end:]).hexdigest()
    del data
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", _DIGEST: digest})


def check_weights(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: object
) -> dict[str, torch.Tensor]:
    """`state` in float32. CheckpointError unless it has the names and shapes of `wanted`, and finite values."""
    for title, names in (("lacks", wanted.keys() - state.keys()), ("has unknown", state.keys() - wanted.keys())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise CheckpointError(f"{where} {title} {some}; it does not fit its configuration")
    checked = {}
    for name, tensor in sorted(state.items()):  # safetensors gives them in any order; an error names the first
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(tensor.shape)}, its configuration asks {list(wanted[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {name} has type {tensor.dtype}; weights must be floating point")
        checked[name] = tensor.float()
        if not bool(torch.isfinite(checked[name]).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinity; the model cannot be used")
    return checked


def move(model: torch.nn.Module, device: str | torch.device) -> None:
    """Move a model's weights. Raises InputError for a device that is not there."""
    try:
        model.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
