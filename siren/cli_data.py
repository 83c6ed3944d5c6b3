"""`siren data`: from sound files and captions to a token set. Each command is one function of siren.data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make training data: sounds with captions, then a token set.")


@app.command()
def recordings(
    out: Annotated[Path, typer.Argument(help="Clip folder to make.")],
    packages: Annotated[
        Path | None, typer.Option(help="Folder with the .deb files; by default apt-get gets them.")
    ] = None,
) -> None:
    """About 600 free recordings with captions, from five Debian sound packages (1 GB, downloaded now)."""
    from .data.recordings import make_recordings

    typer.echo(f"{out}: {make_recordings(out, packages)}")


@app.command()
def procedural(
    out: Annotated[Path, typer.Argument(help="Clip folder to make.")],
    clips: Annotated[int, typer.Option(help="How many.")] = 2400,
    seconds: Annotated[float, typer.Option(help="Length of a clip, 1 to 30.")] = 4.0,
    scenes: Annotated[float, typer.Option(help="Share of clips with two or three events.")] = 0.2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same clips.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each CPU by default.")] = None,
    labels: Annotated[str, typer.Option(help="Kinds of single sounds, with commas between; scenes are of all.")] = "",
) -> None:
    """Synthetic rain, bells, sirens and more, with captions: any amount, nothing downloaded."""
    from .data.procedural import CLASSES, make_procedural

    kinds = [label.strip() for label in labels.split(",")] if labels else CLASSES
    counts = make_procedural(out, clips, seed, seconds, scenes, workers, labels=kinds)
    typer.echo(f"{out}: {clips} clips of {len(counts) - ('scene' in counts)} classes, {counts.get('scene', 0)} scenes")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="The data set's folder, or its list (CSV, JSONL).")],
    out: Annotated[Path, typer.Argument(help="Clip folder to make.")],
    layout: Annotated[str, typer.Option(help="folder, csv, jsonl, audiocaps, clotho, esc50 or vggsound.")] = "folder",
    audio: Annotated[Path | None, typer.Option(help="Folder of the sounds, where it is not the layout's.")] = None,
    split: Annotated[str | None, typer.Option(help="Only this fold (esc50) or split (vggsound).")] = None,
    weak_captions: Annotated[
        str, typer.Option(help="Where nobody wrote captions: file (its name), folder (its name) or none.")
    ] = "file",
    licence: Annotated[str | None, typer.Option(help="Of clips whose list does not say it.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="FIELD=NAME of a csv or jsonl column; repeatable.")] = None,
    link: Annotated[bool, typer.Option("--link", help="Hard links in place of copies.")] = False,
) -> None:
    """A data set as it is published (AudioCaps, Clotho, ESC-50, VGGSound), or your own sounds, as a clip folder."""
    from .data.sources import import_clips

    made = import_clips(
        source,
        out,
        layout,
        link=link,
        audio=audio,
        columns=_columns(column or []),
        split=split,
        weak_captions=weak_captions,
        licence=licence,
    )
    typer.echo(f"{out}: {made}")


@app.command()
def tokenize(
    sources: Annotated[list[Path], typer.Argument(metavar="CLIPFOLDER...", help="Folders with clips.jsonl.")],
    out: Annotated[Path, typer.Option(help="Token set to make.")],
    codec: Annotated[str, typer.Option(help="Codec folder or hub name.")],
    encoder: Annotated[str, typer.Option(help="Prompt encoder: minilm, a CLAP folder or hub name.")] = "minilm",
    seconds: Annotated[float, typer.Option(help="Longer sounds are cut into pieces of this length.")] = 10.0,
    pad_seconds: Annotated[
        float | None, typer.Option(help="Silence after a shorter sound; by default it fills up --seconds.")
    ] = None,
    min_snr: Annotated[float, typer.Option(help="dB; quieter pieces are dropped.")] = 6.0,
    clap: Annotated[
        str | None, typer.Option(help="CLAP folder or hub name: filter by similarity to the caption.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Lowest similarity that is kept, 0.40 or 0.35 in the paper.")
    ] = None,
    reserve: Annotated[int, typer.Option(help="Set so many most similar clips aside for alignment.")] = 0,
    captioner: Annotated[
        str | None, typer.Option(help="Qwen2-Audio folder or hub name, for clips without captions.")
    ] = None,
    polisher: Annotated[str | None, typer.Option(help="Qwen2.5 folder or hub name, to refine those captions.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each CPU by default.")] = None,
    shard_clips: Annotated[int, typer.Option(help="Sound files of a shard.")] = 512,
    device: Annotated[str, typer.Option(help="Where the models run.")] = "cpu",
    ray: Annotated[bool, typer.Option("--ray", help="Spread the work by Ray, over a cluster if there is one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a token set that is there.")] = False,
) -> None:
    """Clip folders to a token set: codes and prompt states in shards, with a manifest; a killed run goes on."""
    from .data.pipeline import tokenize

    report = tokenize(
        sources,
        out,
        codec,
        encoder,
        seconds=seconds,
        pad_seconds=pad_seconds,
        min_snr=min_snr,
        clap=clap,
        threshold=threshold,
        reserve=reserve,
        captioner=captioner,
        polisher=polisher,
        workers=workers,
        shard_clips=shard_clips,
        device=device,
        ray=ray,
        overwrite=overwrite,
    )
    typer.echo(str(report))


def _columns(given: list[str]) -> dict[str, str] | None:
    from .errors import InputError

    pairs = [text.partition("=") for text in given]
    for text, (field, equals, name) in zip(given, pairs, strict=True):
        if not (field and equals and name):
            raise InputError(f"--column must be FIELD=NAME, not {text!r}")
    return {field: name for field, _, name in pairs} or None
