"""`siren align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError


def align(
    data: Annotated[Path, typer.Argument(metavar="TOKENS", help="Token set whose captions are the prompts.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the checkpoint comes to OUT/checkpoint.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder to begin with.")] = "siren-mini",
    reward_funcs: Annotated[
        list[str] | None,
        typer.Option("--reward", help="aligner, clap:FOLDER, imagebind, package.module:function; several are added."),
    ] = None,
    reward_weights: Annotated[str, typer.Option(help="One number for each reward, with commas between.")] = "",
    reward_timeout: Annotated[float, typer.Option(help="Seconds a reward may take for a batch; 0: any.")] = 0.0,
    max_failures: Annotated[int, typer.Option(help="Steps in a row without any reward that end the run.")] = 10,
    experts: Annotated[str, typer.Option(help="0: anti-causal; 0,1: the first two; 5: causal.")] = "0",
    reserve: Annotated[bool, typer.Option("--reserve", help="Prompts of the clips that were set aside.")] = False,
    val_fraction: Annotated[float, typer.Option(help="Share of the clips whose captions are held out.")] = 0.05,
    prompts_per_step: Annotated[int, typer.Option(help="Prompts of a step.")] = 8,
    num_generations: Annotated[int, typer.Option(help="Rollouts of each prompt, G.")] = 8,
    seconds: Annotated[float, typer.Option(help="Length of a rollout.")] = 4.0,
    temperature: Annotated[float, typer.Option(help="Of the rollouts.")] = 1.0,
    guidance_scale: Annotated[float, typer.Option(help="Of the rollouts; the objective is on what was drawn.")] = 1.0,
    num_iterations: Annotated[int, typer.Option(help="Updates on the rollouts of a step, mu.")] = 1,
    loss: Annotated[str, typer.Option(help="grpo, or dpo on the best and the worst of each group.")] = "grpo",
    epsilon: Annotated[float, typer.Option(help="Ratios are clipped below 1 - epsilon.")] = 0.2,
    epsilon_high: Annotated[float, typer.Option(help="Ratios are clipped above 1 + epsilon_high.")] = 0.28,
    advantage_threshold: Annotated[float, typer.Option(help="Smaller advantages teach nothing, gamma.")] = 0.0,
    beta: Annotated[float, typer.Option(help="Weight of the KL divergence from the model at the beginning.")] = 0.0,
    dpo_beta: Annotated[float, typer.Option(help="How sharply DPO tells pairs apart.")] = 0.1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-5,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    min_lr_ratio: Annotated[float, typer.Option(help="Below 1: a cosine down to this share of the rate.")] = 1.0,
    grad_clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: none.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of the updates.")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Rollouts whose gradients are computed at once.")] = 16,
    rollout_weights: Annotated[str, typer.Option(help="fp32, bf16 or int8, of the sampler.")] = "fp32",
    rollout_batch_size: Annotated[int, typer.Option(help="Rollouts sampled at once.")] = 64,
    seed: int = 0,
    max_steps: Annotated[int, typer.Option(help="Steps: rollouts, rewards, updates.")] = 100,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: only at both ends.")] = 25,
    eval_prompts: Annotated[int, typer.Option(help="Held-out prompts of an evaluation.")] = 64,
    eval_generations: Annotated[int, typer.Option(help="Sounds of each of them.")] = 1,
    save_every: Annotated[int, typer.Option(help="Steps between saves.")] = 25,
    keep: Annotated[int, typer.Option(help="States that are kept.")] = 2,
    resume: Annotated[bool, typer.Option(help="Go on from the last state.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    backend: Annotated[str, typer.Option(help="Of the rollouts: auto, cpu, reference, triton or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of the cpu backend.")] = None,
    checkpoint_activations: bool = False,
    tensorboard: Annotated[bool | None, typer.Option(help="By default if it is installed.")] = None,
    wandb: Annotated[bool, typer.Option(help="Log to Weights & Biases.")] = False,
    checkpoint_dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Align experts with what the others make good sound of, by reinforcement learning on rewards of the sound."""
    values = dict(locals())
    from .align.run import align as run
    from .align.settings import AlignSettings

    values["experts"] = _numbers("--experts", experts, int)
    values["reward_weights"] = _numbers("--reward-weights", reward_weights, float) if reward_weights else None
    values["reward_funcs"] = reward_funcs or ["aligner"]
    typer.echo(str(run(AlignSettings(**values))))


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{name} must be numbers with commas between, not {text!r}") from error
