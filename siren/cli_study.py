"""`siren study`: the paper's pilot studies (section 3, appendix D). Each command is one function of siren.studies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The paper's pilot studies: what codebooks hold, how heads learn them.")

Data = Annotated[Path, typer.Argument(metavar="TOKENS", help="Token set.")]
CodecFolder = Annotated[str, typer.Option(help="Folder of the codec that made the codes.")]
Out = Annotated[Path, typer.Option(help="The .json file to write.")]
Picture = Annotated[
    str | None, typer.Option(metavar="[PATH.png]", help="Draw it too; without a path, beside the .json file.")
]
Clips = Annotated[int, typer.Option(help="At most so many clips, drawn by the seed; 0: all.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same numbers.")]


@app.command()
def cosine(
    data: Data, codec: CodecFolder, out: Out, picture: Picture = None, clips: Clips = 2000, seed: Seed = 0
) -> None:
    """How orthogonal the features of different codebooks are (figure 2a, 8)."""
    options = dict(locals())
    drawn = _targets(out, picture)
    from .codec import Codec
    from .data.tokens import open_tokens
    from .studies.cosine import cosine as run
    from .studies.draw_codec import draw_cosine
    from .studies.output import save_study

    found = run(open_tokens(data), Codec.from_pretrained(codec), clips, seed, sys.stderr.isatty())
    save_study(out, "cosine", options, found.numbers(), drawn, draw_cosine(found) if drawn else b"")
    whole, centred = found.overall("features"), found.overall("centred")
    typer.echo(
        f"{out}: cosine {whole.mean:+.3f} ± {whole.std:.3f}, centred {centred.mean:+.3f} ± {centred.std:.3f}, "
        f"over {found.frames} frames of {found.clips} clips"
    )


@app.command()
def semantics(
    data: Data,
    codec: CodecFolder,
    out: Out,
    picture: Picture = None,
    clips: Clips = 4000,
    classes: Annotated[int, typer.Option(help="The most frequent so many; 0: all.")] = 0,
    min_clips: Annotated[int, typer.Option(help="Classes of fewer clips are left out.")] = 20,
    test_fraction: Annotated[float, typer.Option(help="Share of the clips to test on.")] = 0.2,
    seeds: Annotated[int, typer.Option(help="Classifiers for each codebook.")] = 3,
    epochs: Annotated[int, typer.Option(help="Of each classifier.")] = 60,
    seed: Seed = 0,
) -> None:
    """How well each codebook alone tells classes of sounds apart (figure 2c, 9)."""
    options = dict(locals())
    drawn = _targets(out, picture, t_sne=True)
    from .codec import Codec
    from .data.tokens import open_tokens
    from .studies.draw_codec import draw_semantics
    from .studies.output import save_study
    from .studies.semantics import semantics as run

    shown = sys.stderr.isatty()
    tokens, sound = open_tokens(data), Codec.from_pretrained(codec)
    found = run(tokens, sound, clips, classes, min_clips, test_fraction, seeds, epochs, seed, shown)
    save_study(out, "semantics", options, found.numbers(), drawn, draw_semantics(found, seed, shown) if drawn else b"")
    accuracies = " ".join(f"{part.mean:.1%}" for part in found.codebooks)
    typer.echo(
        f"{out}: accuracy by codebook {accuracies}; together {found.together.mean:.1%}; chance {found.chance:.1%}; "
        f"{found.test_clips} test clips of {len(found.classes)} classes"
    )


@app.command()
def gradients(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder.")],
    data: Data,
    out: Out,
    picture: Picture = None,
    expert: Annotated[int, typer.Option(help="Which expert, from 0.")] = 0,
    batches: Annotated[int, typer.Option(help="Batches of clips.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Clips of a batch.")] = 8,
    seconds: Annotated[float, typer.Option(help="Length of the random crops.")] = 4.0,
    val_fraction: Annotated[float, typer.Option(help="Share of the clips that training held out.")] = 0.05,
    seed: Seed = 0,
) -> None:
    """The angles between the gradients that an expert's heads send back to its backbone (figure 2b)."""
    options = dict(locals())
    drawn = _targets(out, picture)
    from .studies.draw_training import draw_gradients
    from .studies.gradients import study_gradients
    from .studies.output import save_study

    found = study_gradients(model, data, expert, batches, batch_size, seconds, val_fraction, seed, sys.stderr.isatty())
    save_study(out, "gradients", options, found.numbers(), drawn, draw_gradients(found) if drawn else b"")
    heads, same = found.overall("averaged"), found.overall_same_head("averaged")
    typer.echo(
        f"{out}: {heads.mean:.1f} ± {heads.std:.1f} degrees between {len(found.codebooks)} heads, "
        f"{same.mean:.1f} ± {same.std:.1f} between two batches of one head"
    )


@app.command()
def convergence(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    out: Out,
    picture: Picture = None,
    data: Annotated[Path | None, typer.Option(help="Token set, to give losses as shares of the entropy too.")] = None,
    window: Annotated[int, typer.Option(help="Updates to take the mean of; 0: a fiftieth of the run.")] = 0,
    clips: Clips = 2000,
    seed: Seed = 0,
) -> None:
    """How each codebook's loss falls in training (figure 2d, 6; Loss Ratio and Loss Mean of table 5)."""
    options = dict(locals())
    drawn = _targets(out, picture)
    from .data.tokens import open_tokens
    from .studies.convergence import convergence as study
    from .studies.draw_training import draw_convergence
    from .studies.output import save_study

    found = study(run, None if data is None else open_tokens(data), window, clips, seed)
    save_study(out, "convergence", options, found.numbers(), drawn, draw_convergence(found) if drawn else b"")
    losses = " ".join(f"{loss:.3f}" for loss in found.final.values())
    ratio = "" if found.loss_ratio is None else f"; loss ratio {found.loss_ratio:.2f}"
    typer.echo(f"{out}: final loss by codebook {losses}; loss mean {found.loss_mean:.3f}{ratio}")


@app.command("task-vectors")
def task_vectors(
    trained: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run, or a checkpoint folder.")],
    out: Out,
    picture: Picture = None,
    initial: Annotated[
        Path | None, typer.Option(help="Checkpoint that training started from; a run from random weights needs none.")
    ] = None,
) -> None:
    """How alike what training did to the experts' layers is (figure 7)."""
    options = dict(locals())
    drawn = _targets(out, picture)
    from .studies.draw_training import draw_task_vectors
    from .studies.output import save_study
    from .studies.task_vectors import MODULES
    from .studies.task_vectors import task_vectors as run

    found = run(trained, initial, sys.stderr.isatty())
    numbers = found.numbers()
    save_study(out, "task-vectors", options, numbers, drawn, draw_task_vectors(found) if drawn else b"")
    typer.echo(f"{out}: " + ", ".join(f"{name} {numbers['modules'][name]['mean']:+.3f}" for name in MODULES))
    if not found.same_start:
        typer.echo(
            "warning: the experts started from different weights, so the cosines say little; train with --init-from a "
            "checkpoint that `siren study initial` makes",
            err=True,
        )


@app.command()
def initial(
    folder: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    config: Annotated[str, typer.Option(help="Preset or JSON file.")],
    codec: Annotated[str, typer.Option(help="Codec folder.")],
    prompt_encoder: Annotated[str | None, typer.Option(help="Name of the prompt encoder, such as minilm.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """A checkpoint whose experts all have the same random weights, for `siren train --init-from` and task-vectors."""
    from .studies.task_vectors import make_initial

    sizes = make_initial(folder, config, codec, seed, prompt_encoder, overwrite)
    typer.echo(f"{folder}: {sizes.num_experts} experts of the same random weights")


def _targets(out: Path, picture: str | None, t_sne: bool = False) -> Path | None:
    """The picture's file, if there is to be one, after checks that all can be written."""
    drawn = None
    if picture is not None:  # without a path of its own cli.py passes on no .png
        drawn = Path(picture) if picture.lower().endswith(".png") else out.with_suffix(".png")
    from .studies.output import check_targets

    check_targets(out, drawn, t_sne)
    return drawn
