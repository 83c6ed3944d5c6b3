"""`siren train-critic`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train_critic(
    data: Annotated[Path, typer.Argument(metavar="TOKENS", help="Token set whose captions are the prompts.")],
    out: Annotated[Path, typer.Option(help="Critic folder to make.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder whose sounds it will score.")] = "siren-mini",
    reward: Annotated[str, typer.Option(help="As in siren align: aligner, clap:FOLDER, package.module:function.")] = (
        "aligner"
    ),
    rollouts: Annotated[int, typer.Option(help="Sounds to train on.")] = 2000,
    generations: Annotated[int, typer.Option(help="Of them for each prompt.")] = 8,
    val_prompts: Annotated[int, typer.Option(help="Held-out prompts to measure it on, with as many sounds each.")] = 32,
    val_fraction: Annotated[float, typer.Option(help="Share of the clips whose captions are held out.")] = 0.05,
    seconds: Annotated[
        float | None, typer.Option(help="Length of a sound; by default, as the next four, the model's.")
    ] = (None),
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = 600,
    batch_size: Annotated[int, typer.Option(help="Sounds of an update.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 1e-3,
    gae_lambda: Annotated[float, typer.Option(help="1: values learn from the reward, 0: from the next value.")] = 0.95,
    dim: Annotated[int, typer.Option(help="Width of the critic.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers of its GRU.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same critic.")] = 0,
    backend: Annotated[str, typer.Option(help="Of the rollouts: auto, cpu, reference, triton or cuda.")] = "auto",
    weights: Annotated[str, typer.Option(help="Of the rollouts: fp32, bf16, int8, or fp8 on cuda.")] = "bf16",
    threads: Annotated[int | None, typer.Option(help="Of the cpu backend; all cores by default.")] = None,
) -> None:
    """Train a critic, which scores beginnings of sounds, so that generation finishes the promising ones only."""
    values = dict(locals())
    from .critic_training import train_critic as run

    critic, foresight, lost = run(**values)
    lines = [f"{out}: {critic!r}", lost, "" if foresight is None else str(foresight)]
    typer.echo("\n".join(line for line in lines if line))
