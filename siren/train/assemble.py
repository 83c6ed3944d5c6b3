"""From the experts of a run to one checkpoint in the contract's format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import save_checkpoint
from ..config import SirenConfig
from ..errors import CheckpointError, InputError
from ..manifest import parse_json
from .settings import CHECKPOINT_DTYPES
from .state import latest_state, read_state, read_values

RUN = "run.json"


def expert_folder(run: Path, start_codebook: int) -> Path:
    """Where a run keeps the expert that begins at a codebook."""
    return run / f"expert_{start_codebook}"


def read_run(run: Path) -> dict[str, Any]:
    """The parsed run.json: `settings` (those the result depends on) and `prompt_encoder`. Raises CheckpointError."""
    path = run / RUN
    try:
        values = parse_json(path.read_bytes(), str(path))
        SirenConfig.from_dict(values["settings"]["config"])
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}; is {run} a training run?") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no description of a training run (it lacks {error})") from error
    return values


def unfinished(run: Path) -> list[int]:
    """First codebooks of the experts that are not trained to the end."""
    settings = read_run(run)["settings"]
    config = SirenConfig.from_dict(settings["config"])
    missing = []
    for start in range(0, config.num_codebooks, config.codes_per_expert):
        path = latest_state(expert_folder(run, start))
        if path is None or read_values(path)["step"] < settings["total_steps"]:
            missing.append(start)
    return missing


def assemble(run: str | Path, out: str | Path, dtype: str = "float32", partial: bool = False) -> None:
    """Write the checkpoint `out` from the latest states of a run, with its codec and prompt encoder.

    dtype: "float32" or "bfloat16". partial: also from experts that are still in training. Raises CheckpointError.
    """
    run = Path(run).expanduser()
    if dtype not in CHECKPOINT_DTYPES:
        raise InputError(f"dtype must be one of {', '.join(CHECKPOINT_DTYPES)}, not {dtype!r}")
    values = read_run(run)
    missing = unfinished(run)
    if missing and not partial:
        names = ", ".join(expert_folder(run, start).name for start in missing)
        raise CheckpointError(f"{run} is not trained to the end: {names}; resume it, or ask for a partial checkpoint")
    config = SirenConfig.from_dict(values["settings"]["config"])

    def experts() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for start in range(0, config.num_codebooks, config.codes_per_expert):
            path = latest_state(expert_folder(run, start))
            if path is None:
                raise CheckpointError(f"{expert_folder(run, start)} has no state yet")
            state = read_state(path)
            yield start, {name: tensor.to(CHECKPOINT_DTYPES[dtype]) for name, tensor in state.model.items()}

    codec = run / "codec"
    save_checkpoint(out, config, experts(), codec if codec.is_dir() else None, values.get("prompt_encoder"))
