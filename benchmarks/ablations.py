r"""The ablations of the paper (tables 1 and 3 to 7) at a small scale, beside its figures; a chosen table, or all.

    siren data procedural out/ablation/clips --clips 3200 --seconds 2 --scenes 0 --seed 11 \
        --labels "rain,church bell,siren,wolf,helicopter,bird,telephone,thunder"
    siren data tokenize out/ablation/clips --out out/ablation/tokens --codec siren/models/siren-mini/codec --seconds 2
    python benchmarks/ablations.py --table 6 --workers 2

Every row of a table is an arm (ablation_arms.py): a configuration of the one model, trained by `siren train` with the
same clips, updates and rates, and by `siren align` where the row is aligned. An eighth of the clips is held out. Judged
are the loss on these, and one sound for the first caption of each, by `siren evaluate` with the offline embeddings:
aiSFX for FD, IS and KL, and the aligner of siren-mini for the score of sound and text. These stand beside the paper's
figures under their own names; only the order of rows is compared (ablation_tables.py).

What it does not show: how the arms compare at another size or after longer training. A few million parameters and some
hundred updates on synthetic sounds of eight kinds are far from the paper's models; the aligner is also the reward.
Captions of held-out clips are captions of training clips word for word; their sounds are not.

What an earlier call with the same --out finished is not done again; other options need another --out.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import json_file
import machine
import numpy as np
import torch
import typer
from ablation_arms import ARMS
from ablation_report import draw, interval, report
from ablation_scoring import CODEC, figures_of, held_out, losses, reference
from ablation_tables import TABLES
from ablation_training import (
    Scale,
    align_arm,
    checkpoint_of,
    common_start,
    delayed_tokens,
    parameters_of,
    train_expert,
    training_seconds,
)
from alignment import run_all

from siren.audio import write_files
from siren.codec import Codec
from siren.data.processes import worker_pool
from siren.data.tokens import check_codec, open_tokens, split
from siren.errors import InputError
from siren.manifest import read_manifest
from siren.pretrained import missing
from siren.train.run import fingerprint


def run(
    table: Annotated[str, typer.Option(help=f"{', '.join(TABLES)}, or all.")] = "all",
    clips: Annotated[Path, typer.Option(help="Clip folder that the tokens were made of.")] = Path("out/ablation/clips"),
    tokens: Annotated[Path, typer.Option(help="Token set: clips of one length with captions.")] = Path(
        "out/ablation/tokens"
    ),
    codec: Annotated[Path, typer.Option(help="Codec that made the tokens.")] = Path("siren/models/siren-mini/codec"),
    out: Annotated[Path, typer.Option(help="Folder for runs, sounds and scores.")] = Path("out/ablation/runs"),
    seeds: Annotated[str, typer.Option(help="Of the runs, with commas between.")] = "0",
    updates: Annotated[int, typer.Option(min=10, help="Of every expert.")] = 700,
    batch_size: int = 8,
    learning_rate: Annotated[float, typer.Option(help="A cosine down to a twentieth.")] = 1e-3,
    val_fraction: Annotated[float, typer.Option(help="Share of the clips that is held out.")] = 0.125,
    align_steps: Annotated[int, typer.Option(min=1, help="Steps of 64 rollouts.")] = 24,
    align_rate: float = 3e-4,
    temperature: Annotated[float, typer.Option(help="Of rollouts and of the sounds that are judged.")] = 0.8,
    guidance_scale: Annotated[float, typer.Option(help="Of rollouts and of the sounds that are judged.")] = 3.0,
    sounds: Annotated[int, typer.Option(min=8, help="Held-out clips that are judged, at most.")] = 256,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 1,
    results: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of all tables.")] = None,
) -> None:
    """Train, align and judge the arms of a table."""
    arms = chosen_arms(table)
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds must be whole numbers with commas between, not {seeds!r}") from None
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise missing("matplotlib", "pictures")
    token_set = open_tokens(tokens)
    check_codec(token_set, Codec.from_pretrained(codec))
    if len(set(token_set.frames.tolist())) > 1:
        raise InputError(f"{tokens} holds clips of several lengths; tokenize clips of one length with --seconds")
    seconds = int(token_set.frames[0]) * token_set.hop_length / token_set.sample_rate
    scales = [
        Scale(
            tokens, codec, out, seed, updates, batch_size, learning_rate, val_fraction, align_steps, align_rate,
            seconds, temperature, guidance_scale,
        )
        for seed in numbers
    ]  # fmt: skip
    shared = _shared(scales[0], sounds)
    check_folder(out, shared, token_set)

    with worker_pool(workers, torch.set_num_threads, 1) as pool:
        train_all(pool, scales, arms)
        reference(scales[0], clips, sounds)  # before several processes want it
        judge: dict[str, Any] = {
            f"judge {arm} {scale.seed}": (judge_arm, (scale, arm, clips, sounds)) for scale in scales for arm in arms
        }
        judge |= {"judge codec": (figures_of, (scales[0], CODEC, clips, sounds))}
        judged = run_all(pool, judge, "judging")

    training, _ = split(token_set, val_fraction)
    codec_figures, embeddings = judged["judge codec"]
    value = {
        "about": machine.describe(),
        "scale": shared,
        "seeds": numbers,
        "training_clips": len(training),
        "labels": len({token_set.label(i) for i in training}),
        "clips": len(held_out(scales[0], sounds)[1]),
        "embeddings": embeddings,
        "codec": codec_figures,
        "arms": {
            arm: {
                "parameters": parameters_of(scales[0], arm),
                "runs": {str(scale.seed): judged[f"judge {arm} {scale.seed}"] for scale in scales},
            }
            for arm in arms
        },
    }
    json_file.write(results or out / "ablations.json", value)
    print(report(value))
    if picture is not None:
        write_files({picture: draw(value)})


def chosen_arms(table: str) -> list[str]:
    """The arms of a table, and those that they begin with, in the order of ARMS. Raises InputError."""
    if table not in (*TABLES, "all"):
        raise InputError(f"--table must be {', '.join(TABLES)} or all, not {table!r}")
    wanted = {row.arm for number in (TABLES if table == "all" else [table]) for row in TABLES[number].rows}
    wanted |= {base for arm in wanted if (base := ARMS[arm].base) is not None}
    return [arm for arm in ARMS if arm in wanted]


def check_folder(out: Path, shared: dict[str, Any], tokens: Any) -> None:
    """Note what the results in `out` depend on. Raises InputError if those that are there depend on something else."""
    given = shared | {"tokens": fingerprint(tokens, np.arange(len(tokens)))}
    before = json_file.read(out / "options.json")
    changed = sorted(name for name in given if before is not None and before.get(name) != given[name])
    if changed:
        raise InputError(f"{out} holds runs with other {', '.join(changed)}; choose another --out")
    json_file.write(out / "options.json", given)


def train_all(pool: Any, scales: list[Scale], arms: list[str]) -> None:
    """Train the experts of all arms that are not there, side by side; then align."""
    trained = [(scale, arm) for scale in scales for arm in arms if ARMS[arm].base is None]
    for scale, arm in trained:
        common_start(scale, arm)
    if any(ARMS[arm].delayed for arm in arms):
        delayed_tokens(scales[0])
    jobs: dict[str, Any] = {
        f"train {arm} {scale.seed} expert {index}": (train_expert, (scale, arm, index))
        for scale, arm in trained
        for index in range(ARMS[arm].model["num_experts"])
    }
    run_all(pool, jobs, "training")
    aligned = [(scale, arm) for scale in scales for arm in arms if ARMS[arm].base is not None]
    run_all(pool, {f"align {arm} {scale.seed}": (align_arm, (scale, arm)) for scale, arm in aligned}, "aligning")


def judge_arm(scale: Scale, arm: str, clips: Path, sounds: int) -> dict[str, Any]:
    """Losses and figures of one arm."""
    rows = np.array(losses(scale, arm, sounds))
    figures, _ = figures_of(scale, arm, clips, sounds)
    figures |= {
        "Loss Mean": interval(rows, np.mean),
        "Loss Ratio": interval(rows, lambda drawn: drawn[:, -1].mean() / drawn[:, 0].mean()),
    }
    return {
        "figures": figures,
        "loss_by_codebook": rows.mean(axis=0).tolist(),
        "experts": [entry.sha256 for entry in read_manifest(checkpoint_of(scale, arm)).experts],
        "seconds": {"training": training_seconds(scale, arm)},
    }


def _shared(scale: Scale, sounds: int) -> dict[str, Any]:
    values = {name: value for name, value in asdict(scale).items() if name not in ("out", "seed", "tokens", "codec")}
    return values | {"sounds": sounds}


if __name__ == "__main__":
    machine.main(run)
