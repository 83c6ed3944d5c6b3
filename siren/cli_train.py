"""`siren train`, `siren train-codec` and `siren train-aligner`: each is one function of the module that trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import InputError


def train(
    data: Annotated[Path, typer.Argument(help="Token set folder, or an official .jsonl of NPZ files.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the model will be in its checkpoint/.")],
    config: Annotated[str | None, typer.Option(help="siren-1.6b, siren-3.1b, tiny, or a config.json.")] = None,
    init_from: Annotated[Path | None, typer.Option(help="Checkpoint folder to start from.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="Codec that made the codes; by default that of --init-from.")
    ] = None,
    allow_random_codebooks: Annotated[
        bool, typer.Option(help="Do without a codec: for tests of the machinery.")
    ] = False,
    prompt_encoder: Annotated[str | None, typer.Option(help="Name for the checkpoint; by default the data's.")] = None,
    experts: Annotated[str, typer.Option(help="all, a list such as 0,2, or rank: one for each process.")] = "all",
    max_steps: Annotated[int | None, typer.Option(help="Updates; comes before --epochs.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Clips a process computes at once.")] = 24,
    accumulate: Annotated[int, typer.Option(help="Batches a process adds up before it updates.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 3e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.05,
    warmup_steps: Annotated[int, typer.Option(help="Linear warm-up.")] = 100,
    min_lr_ratio: Annotated[float, typer.Option(help="Where the cosine ends, as a share of the peak.")] = 0.1,
    grad_clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: any.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (autocast).")] = "fp32",
    crop_seconds: Annotated[float, typer.Option(help="Length of the random crops; 0: whole clips.")] = 6.0,
    prompt_dropout: Annotated[float, typer.Option(help="Share of prompts left out, for guidance.")] = 0.0,
    bucket: Annotated[int, typer.Option(help="Updates whose clips are sorted by length together.")] = 1,
    seed: Annotated[int, typer.Option(help="Of weights, order, crops and dropout.")] = 0,
    val_data: Annotated[Path | None, typer.Option(help="Validation data; by default a share of the data.")] = None,
    val_fraction: Annotated[float, typer.Option(help="That share.")] = 0.05,
    val_every: Annotated[int, typer.Option(help="Updates between validations; 0: only at the end.")] = 500,
    save_every: Annotated[int, typer.Option(help="Updates between saves; 0: only at the end.")] = 500,
    keep: Annotated[int, typer.Option(help="States kept of each expert.")] = 2,
    log_every: Annotated[int, typer.Option(help="Updates between two looks at a GPU's losses.")] = 10,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last state.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    compile: Annotated[bool, typer.Option(help="torch.compile.")] = False,  # noqa: A002
    checkpoint_activations: Annotated[bool, typer.Option(help="Compute blocks again and save memory.")] = False,
    fsdp: Annotated[bool, typer.Option(help="Shard weights over the processes of torchrun (FSDP2).")] = False,
    attention: Annotated[str, typer.Option(help="auto, sdpa or flash.")] = "auto",
    kernels: Annotated[bool | None, typer.Option(help="siren.kernels; by default on a GPU with Triton.")] = None,
    workers: Annotated[int, typer.Option(help="Batches made ahead.")] = 4,
    tensorboard: Annotated[bool | None, typer.Option(help="By default if it is installed.")] = None,
    wandb: Annotated[bool, typer.Option(help="Log to Weights & Biases.")] = False,
    checkpoint_dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Train the experts of a model on a token set. The same command goes on after a stop, bit for bit on a CPU."""
    from .train import TrainSettings
    from .train import train as run

    values = dict(locals())
    del values["TrainSettings"], values["run"]
    checkpoint = run(TrainSettings(**values | {"experts": _experts(experts)}))
    done = "; train the other experts into the same folder to get its checkpoint" if checkpoint is None else ""
    typer.echo(f"{checkpoint or out}{done}")


def train_codec(
    sources: Annotated[list[Path], typer.Argument(metavar="CLIPFOLDER...", help="Folders with clips.jsonl.")],
    out: Annotated[Path, typer.Option(help="Codec folder to make.")],
    kind: Annotated[
        str, typer.Option(help="spectral: minutes on a CPU. dac: a neural codec, wants a GPU.")
    ] = "spectral",
    seed: Annotated[int, typer.Option(help="The same seed gives the same codec.")] = 0,
    max_frames: Annotated[int, typer.Option(help="spectral: frames that are clustered.")] = 150_000,
    iterations: Annotated[int, typer.Option(help="spectral: rounds of k-means.")] = 12,
    steps: Annotated[int, typer.Option(help="dac: updates.")] = 100_000,
    batch_size: Annotated[int, typer.Option(help="dac: crops of an update.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="dac: peak of the schedule.")] = 1e-3,
    encoder_width: Annotated[int, typer.Option(help="dac: channels of the encoder's first stage; Descript's 64.")] = 16,
    decoder_width: Annotated[
        int, typer.Option(help="dac: channels of the decoder's first stage; Descript's 1536.")
    ] = 192,
    discriminator: Annotated[bool, typer.Option(help="dac: with discriminators.")] = False,
    save_every: Annotated[int, typer.Option(help="dac: updates between saves.")] = 1000,
    device: Annotated[str, typer.Option(help="dac: cpu, cuda ...")] = "cpu",
) -> None:
    """Train a codec on the sounds of clip folders: 12 codebooks of 1024 codes, 50 frames a second, 16 kHz."""
    if kind == "spectral":
        from .spectral_training import train_spectral

        typer.echo(f"{out}: {train_spectral(sources, out, max_frames, iterations, seed)!r}")
    elif kind == "dac":
        from .dac_model import DacSizes
        from .dac_training import train_dac

        losses = train_dac(
            sources,
            out,
            DacSizes(encoder_width=encoder_width, decoder_width=decoder_width),
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
            discriminator=discriminator,
            save_every=save_every,
        )
        last = ", ".join(f"{name} {value:.4g}" for name, value in losses[-1].items() if isinstance(value, float))
        typer.echo(f"{out}: {last}")
    else:
        raise InputError(f"--kind must be spectral or dac, not {kind!r}")


def train_aligner(
    sources: Annotated[list[Path], typer.Argument(metavar="CLIPFOLDER...", help="Folders with clips.jsonl.")],
    out: Annotated[Path, typer.Option(help="Aligner folder to make.")],
    codec: Annotated[
        str | None, typer.Option(help="Codec folder: half of the sounds are what it makes of them.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the clips.")] = 25,
    batch_size: Annotated[int, typer.Option(help="Clips that are told apart at once.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 1e-3,
    seconds: Annotated[float, typer.Option(help="Of a sound that are heard.")] = 4.0,
    val_fraction: Annotated[float, typer.Option(help="Share of the clips that is held out, as in train.")] = 0.05,
    seed: Annotated[int, typer.Option(help="The same seed gives the same aligner.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Train an aligner, which says offline how well a sound fits a text, on the sounds and captions of clip folders."""
    from .aligner import AlignerConfig
    from .aligner_training import train_aligner as run

    aligner, scores = run(
        sources,
        out,
        codec,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        val_fraction=val_fraction,
        seed=seed,
        device=device,
        config=AlignerConfig(seconds=seconds),
    )
    typer.echo("\n".join([f"{out}: {aligner!r}", *(f"{name}: {score}" for name, score in scores.items())]))


def _experts(text: str) -> str | list[int]:
    if text in ("all", "rank"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--experts must be all, rank, or numbers such as 0,2, not {text!r}") from error
