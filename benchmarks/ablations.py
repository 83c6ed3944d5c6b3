r"""The ablations of the paper (tables 1 and 3 to 7) at a small scale, beside its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import json_file
import machine
import torch
import typer
from ablation_arms import ARMS
from ablation_training import Scale, align_arm, common_start, delayed_tokens, train_expert
from alignment import run_all

from siren.data.processes import worker_pool


def run(
    tokens: Annotated[Path, typer.Option(help="Token set of clips with captions.")] = Path("out/ablation/tokens"),
    codec: Path = Path("siren/models/siren-mini/codec"),
    out: Path = Path("out/ablation/runs"),
    arms: str = ",".join(ARMS),
    seed: int = 0,
    updates: int = 700,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    val_fraction: float = 0.125,
    align_steps: int = 24,
    align_rate: float = 3e-4,
    seconds: float = 2.0,
    temperature: float = 0.8,
    guidance_scale: float = 3.0,
    workers: int = 1,
) -> None:
    """Train."""
    scale = Scale(
        tokens, codec, out, seed, updates, batch_size, learning_rate, val_fraction, align_steps, align_rate,
        seconds, temperature, guidance_scale,
    )  # fmt: skip
    chosen = arms.split(",")
    for arm in chosen:
        if ARMS[arm].base is None:
            common_start(scale, arm)
    delayed_tokens(scale)
    with worker_pool(workers, torch.set_num_threads, 1) as pool:
        jobs = {
            f"train {arm} {k}": (train_expert, (scale, arm, k))
            for arm in chosen
            if ARMS[arm].base is None
            for k in range(ARMS[arm].model["num_experts"])
        }
        run_all(pool, jobs, "training")
        jobs = {f"align {arm}": (align_arm, (scale, arm)) for arm in chosen if ARMS[arm].base is not None}
        run_all(pool, jobs, "aligning")
    json_file.write(out / "done.json", {"arms": chosen})


if __name__ == "__main__":
    machine.main(run)
