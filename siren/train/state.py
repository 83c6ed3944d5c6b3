"""States of a run: what a stopped training goes on from, written whole or not at all and hashed over every byte.

    RUN/expert_4/state-00001500/{state.json, model.safetensors, optimizer.safetensors}

A state is written and synced under a hidden name, state.json last, and then renamed: killed at any point, every
`state-*` folder with a state.json is whole. The one with the highest step is the latest. Nothing is unpickled; random
numbers and the order of the data are functions of the seed and the step, so neither needs saving.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint import replace_folder, sync
from ..errors import CheckpointError
from ..manifest import parse_json

LOCK = ".lock"
_INDEX = "state.json"
_FILES = ("model.safetensors", "optimizer.safetensors")
_NAME = re.compile(r"state-\d{8,}")
_VERSION = 1


@dataclass(frozen=True)
class State:
    """`model` has an expert's tensors by name; `optimizer` those of AdamW, as "exp_avg/NAME" and so on.

    values: what was written beside them (JSON): step, settings and config among it.
    """

    path: Path
    values: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def write_state(
    folder: Path, values: Mapping[str, Any], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], keep: int
) -> Path:
    """Write the state of step values["step"] into an expert's folder and delete all but the newest `keep`.

    Raises CheckpointError, in which case the states before are as they were.
    """
    step = int(values["step"])
    for name, tensor in model.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"step {step}: {name} holds NaN or infinity; the state is not saved, earlier ones are kept"
            )

    def write(temporary: Path) -> None:
        hashes = {}
        for file, tensors in zip(_FILES, (model, optimizer), strict=True):
            data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
            hashes[file] = hashlib.sha256(data).hexdigest()
            (temporary / file).write_bytes(data)
            sync(temporary / file)
        index = {"format_version": _VERSION, **values, "files": hashes}
        (temporary / _INDEX).write_text(
            json.dumps(index | {"sha256": _digest(index)}, indent=2) + "\n", encoding="utf-8"
        )
        sync(temporary / _INDEX)
        sync(temporary)

    target = folder / f"state-{step:08d}"
    try:
        _sweep(folder)
        replace_folder(target, _INDEX, _check_replaceable, write)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"{error}; make room or choose another folder and resume: earlier states are kept"
        ) from error
    for old in _states(folder)[:-keep]:
        _delete(old)
    return target


def latest_state(folder: Path) -> Path | None:
    """The newest whole state in an expert's folder, None if there is none."""
    states = _states(folder)
    return states[-1] if states else None


def read_values(path: Path) -> dict[str, Any]:
    """What state.json says, its hash checked. Raises CheckpointError."""
    try:
        values = parse_json((path / _INDEX).read_bytes(), str(path / _INDEX))
    except OSError as error:
        raise CheckpointError(f"cannot read {path / _INDEX}: {error.strerror or error}") from error
    digest = values.pop("sha256", None)
    if digest != _digest(values):
        raise CheckpointError(_altered(path, _INDEX))
    if values.get("format_version") != _VERSION:
        raise CheckpointError(f"{path / _INDEX}: format_version must be {_VERSION}; another Siren wrote it")
    return values


def read_state(path: Path) -> State:
    """Load a state, every hash checked on the very bytes that are parsed. Raises CheckpointError."""
    values = read_values(path)
    tensors = []
    for file in _FILES:
        try:
            data = (path / file).read_bytes()
            if hashlib.sha256(data).hexdigest() != values["files"][file]:
                raise CheckpointError(_altered(path, file))
            tensors.append(safetensors.torch.load(data))
        except OSError as error:
            raise CheckpointError(f"cannot read {path / file}: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{_altered(path, file)} ({error})") from error
    return State(path, values, *tensors)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises CheckpointError if another process holds it (unless `wait`) or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise CheckpointError(f"another process is training in {folder}; wait for it or stop it") from error
        except OSError as error:  # network file systems that are mounted without locks
            raise CheckpointError(
                f"cannot lock {file.name}: {error.strerror or error}; use a file system that has flock"
            ) from error
        yield


def _states(folder: Path) -> list[Path]:
    """Whole states, oldest first."""
    whole = [path for path in _named(folder) if (path / _INDEX).is_file()]
    return sorted(whole, key=lambda path: int(path.name.partition("-")[2]))


def _named(folder: Path) -> list[Path]:
    """Folders with the name of a state. Others, such as a copy that the user made of one, are not ours to touch."""
    return [path for path in folder.glob("state-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []


def _sweep(folder: Path) -> None:
    """Remove what killed saves and deletions left. Only the holder of the folder's lock may."""
    whole = set(_states(folder))
    for path in (*folder.glob(".state-*.saving-*"), *_named(folder)):
        if path not in whole:
            shutil.rmtree(path)


def _delete(state: Path) -> None:
    (state / _INDEX).unlink(missing_ok=True)  # first: one half deleted must not be taken for a whole one
    shutil.rmtree(state)


def _check_replaceable(target: Path) -> None:
    if target.exists() and {path.name for path in target.iterdir()} - {_INDEX, *_FILES}:
        raise CheckpointError(f"{target} holds other files; move them out")


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _altered(path: Path, file: str) -> str:
    return (
        f"{path / file} is damaged or was altered: its sha256 is not the one that was written; "
        f"delete {path} to go on from the state before it"
    )
