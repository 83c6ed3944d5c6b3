"""Influence 2: how each codebook's loss falls in training (section 3, appendix D.2, figure 2d, 6, and table 5).

Read from a run's metrics.jsonl. A smoothed loss is the mean over the frames of a window of updates; the last one is
the final loss. Codebooks differ in how much there is to predict, so with a token set the losses are also given as
shares of each codebook's unigram entropy: 1 is what counting codes reaches without any model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import SirenConfig
from ..errors import DataError, InputError
from ..train.assemble import read_run
from ..train.logs import METRICS
from .features import Tokens, pick_clips, read_codes, used_codes

NEAR = 0.05  # an update is near the end when its loss is within this share of the final one

Curve = tuple[NDArray[np.int64], NDArray[np.float64]]  # updates and losses


@dataclass(frozen=True)
class Convergence:
    """What `convergence` found, by codebook: smoothed curves of training, validation losses, entropies in nats.

    reached: the first update whose smoothed loss is within 5% of the final one.
    """

    codebooks: int
    window: int
    updates: dict[int, int]
    curves: dict[int, Curve]
    validation: dict[int, Curve]
    final: dict[int, float]
    reached: dict[int, int]
    entropy: dict[int, float] | None

    @property
    def loss_ratio(self) -> float | None:
        """Final loss of the last codebook over that of the first (table 5); None unless both were trained."""
        return self._ratio(self.final)

    @property
    def loss_mean(self) -> float:
        """The smallest mean over the codebooks of the smoothed losses at one update (table 5)."""
        return _smallest_mean(self.curves)

    def _ratio(self, losses: Mapping[int, float]) -> float | None:
        first, last = losses.get(0), losses.get(self.codebooks - 1)
        return last / first if first and last is not None else None

    def numbers(self, points: int = 200) -> dict[str, Any]:
        """For JSON; curves are thinned out to `points`."""
        values: dict[str, Any] = {"window": self.window, "loss_ratio": self.loss_ratio, "loss_mean": self.loss_mean}
        if self.validation:
            last = {j: float(losses[-1]) for j, (_, losses) in self.validation.items()}
            values |= {"val_loss_ratio": self._ratio(last), "val_loss_mean": _smallest_mean(self.validation)}
        if self.entropy is not None:
            shares = {j: loss / self.entropy[j] for j, loss in self.final.items() if self.entropy[j] > 0}
            values |= {"normalised_loss_ratio": self._ratio(shares)}
        values["codebooks"] = []
        for j, (updates, losses) in self.curves.items():
            kept = np.unique(np.linspace(0, len(updates) - 1, points).round().astype(int))
            about: dict[str, Any] = {"codebook": j, "updates": self.updates[j], "final_loss": self.final[j]}
            about |= {f"updates_within_{NEAR:.0%}": self.reached[j]}
            about["reached_share"] = self.reached[j] / self.updates[j]
            if j in self.validation:
                about["final_val_loss"] = self.validation[j][1][-1]
            if self.entropy is not None and self.entropy[j] > 0:
                about |= {"entropy": self.entropy[j], "final_loss_over_entropy": self.final[j] / self.entropy[j]}
            about["curve"] = {"update": updates[kept], "loss": losses[kept]}
            if j in self.validation:
                about["validation"] = dict(zip(("update", "loss"), self.validation[j], strict=True))
            values["codebooks"].append(about)
        return values


def convergence(
    run: str | Path, tokens: Tokens | None = None, window: int = 0, clips: int = 2000, seed: int = 0
) -> Convergence:
    """Read a training run, of any number of experts, finished or not.

    window: updates that a smoothed loss is the mean of; 0 is a fiftieth of the run. tokens: of which the entropies are
    taken, from at most `clips` clips. Raises CheckpointError for a folder that is no run, DataError for metrics that
    are missing or damaged, InputError for a window that is longer than a run.
    """
    run = Path(run).expanduser()
    settings = read_run(run)["settings"]
    folders = sorted(run.glob("expert_*"), key=lambda path: _number(path.name))
    folders = [path for path in folders if (path / METRICS).is_file()]
    if not folders:
        raise DataError(f"{run} has no expert_*/{METRICS}: nothing was trained yet")
    training: dict[int, list[tuple[int, float, float]]] = {}
    validation: dict[int, list[tuple[int, float, float]]] = {}
    for folder in folders:
        for record in read_metrics(folder / METRICS):
            frames = record.get("frames", 1)  # of validations every one counts the same
            if isinstance(frames, bool) or not isinstance(frames, (int, float)) or not 0 < frames < 1e15:
                raise DataError(f"{folder / METRICS}: frames of update {record['step']} is no number above 0")
            for prefix, kept in (("ce_codebook_", training), ("val_ce_codebook_", validation)):
                for j, loss in _losses(record, prefix, folder / METRICS).items():
                    kept.setdefault(j, []).append((record["step"], loss, float(frames)))
    if not training:
        raise DataError(f"{run} has no losses by codebook in its {METRICS}")
    longest = max(len(rows) for rows in training.values())
    window = window or max(1, longest // 50)
    if not 1 <= window <= longest:
        raise InputError(f"window must be from 1 to the {longest} updates of the run, not {window}")
    curves = {j: smooth(training[j], window) for j in sorted(training)}
    final = {j: float(losses[-1]) for j, (_, losses) in curves.items()}
    reached = {j: int(updates[np.argmax(losses <= (1 + NEAR) * final[j])]) for j, (updates, losses) in curves.items()}
    entropies = None
    if tokens is not None:
        entropies = _entropies(tokens, settings, list(curves), clips, seed)
    held_out = {}
    for j in sorted(validation):
        rows = np.array(validation[j])
        held_out[j] = rows[:, 0].astype(np.int64), rows[:, 1]
    return Convergence(
        SirenConfig.from_dict(settings["config"]).num_codebooks,
        window,
        {j: int(rows[-1][0]) for j, rows in sorted(training.items())},
        curves,
        held_out,
        final,
        reached,
        entropies,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order. A last line that a kill cut short is left out. Raises DataError."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what stands behind the last end of a line is not whole
        try:
            record = json.loads(line)
            if isinstance(record["step"], bool) or not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is no record of a training run; restore the file") from error
        records.append(record)
    return records


def smooth(rows: list[tuple[int, float, float]], window: int) -> Curve:
    """Means over the last `window` of (update, loss, frames), weighted by the frames.

    The first window - 1 updates have no full window and no value, unless there are no more rows than these.
    """
    updates, losses, frames = np.array(sorted(rows)).T
    window = min(window, len(updates))
    weighted = np.cumsum(np.append(0.0, losses * frames))
    total = np.cumsum(np.append(0.0, frames))
    means = (weighted[window:] - weighted[:-window]) / (total[window:] - total[:-window])
    return updates[window - 1 :].astype(np.int64), means


def _losses(record: Mapping[str, Any], prefix: str, path: Path) -> dict[int, float]:
    found = {}
    for key, value in record.items():
        if match := re.fullmatch(rf"{prefix}(\d{{1,3}})", key):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
                raise DataError(f"{path}: {key} of update {record['step']} is no number")
            found[int(match[1])] = float(value)
    return found


def _smallest_mean(curves: Mapping[int, Curve]) -> float:
    """Over the updates that all codebooks have."""
    shared = set.intersection(*(set(updates.tolist()) for updates, _ in curves.values()))
    if not shared:
        return float("nan")
    rows = [losses[np.isin(updates, list(shared))] for updates, losses in curves.values()]
    return float(np.mean(rows, axis=0).min())


def _entropies(
    tokens: Tokens, settings: Mapping[str, Any], codebooks: list[int], clips: int, seed: int
) -> dict[int, float]:
    """Unigram entropy of each codebook's codes, nats."""
    config = SirenConfig.from_dict(settings["config"])
    wanted = (config.num_codebooks, config.codebook_size)
    given = (tokens.num_codebooks, tokens.codebook_size)  # type: ignore[attr-defined]
    if wanted != given:
        raise DataError(
            f"the run has {wanted[0]} codebooks of {wanted[1]} codes, the token set {given[0]} of {given[1]}"
        )
    identity = tokens.codec_identity  # type: ignore[attr-defined]
    if None not in (settings.get("codec"), identity) and settings["codec"] != identity:
        raise DataError(f"the token set is of another codec ({identity}) than the run ({settings['codec']})")
    codes = read_codes(tokens, pick_clips(np.arange(len(tokens)), clips, seed)).codes
    shares = used_codes(codes, wanted[1]) / codes.shape[1]
    plogp = np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0)
    return {j: float(-plogp[j].sum()) for j in codebooks}


def _number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else 0
