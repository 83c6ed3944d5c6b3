"""Where the numbers of a run go: metrics.jsonl always, TensorBoard if it is installed, wandb if it is asked for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ..audio import write_files
from ..errors import MissingDependencyError, SirenError
from ..pretrained import missing

METRICS = "metrics.jsonl"


def check_loggers(tensorboard: bool | None, wandb: bool) -> None:
    """Raise MissingDependencyError for a logger that was asked for and is not installed."""
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise missing("tensorboard", "train")
    if wandb and importlib.util.find_spec("wandb") is None:
        raise MissingDependencyError("wandb is not installed: pip install wandb")


class Logs:
    """The loggers of one expert. What an earlier run wrote of updates after `step` is dropped: they come again."""

    def __init__(
        self, folder: Path, step: int, tensorboard: bool | None, wandb: bool, settings: dict[str, Any]
    ) -> None:
        path = folder / METRICS
        if path.exists():
            write_files({path: b"".join(_until(path.read_bytes(), step))})
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard or (tensorboard is None and importlib.util.find_spec("tensorboard") is not None):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._wandb: Any = None
        if wandb:
            import wandb as library

            name = f"{folder.parent.name}-{folder.name}"
            self._wandb = library.init(project="siren", name=name, id=name, resume="allow", config=settings)

    def write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl; record["step"] counts updates done. Raises SirenError if the disk is full."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise SirenError(f"cannot write {self._file.name}: {error.strerror}; make room and resume") from error
        numbers = {key: value for key, value in record.items() if key != "step" and not isinstance(value, str)}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _until(data: bytes, step: int) -> list[bytes]:
    """The whole lines of a metrics file up to an update; a kill may have cut the last one short."""
    lines = []
    for line in data.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return lines
