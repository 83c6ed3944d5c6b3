"""Ways to spoil a model folder in the transformers format, for the tests of what reads such folders."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Payload:
    """Pickled, it creates the file `path` when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Replace or add tensors, or remove those given as None."""
    state = load_file(folder / "model.safetensors") | tensors
    save_file({name: t for name, t in state.items() if t is not None}, folder / "model.safetensors")


def leave_only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "run")))
