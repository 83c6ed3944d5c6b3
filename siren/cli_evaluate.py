"""`siren evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    generated: Annotated[
        Path, typer.Argument(metavar="GENERATED", help="Folder of sounds, clip folder, results.jsonl, CSV or JSONL.")
    ],
    reference: Annotated[Path | None, typer.Option(help="Real sounds to compare with, as any of these.")] = None,
    embeddings: Annotated[
        list[str] | None,
        typer.Option(
            "--embedding",
            help="aisfx, aligner, vggish:FILE, cnn14:FILE, clap:FOLDER; repeatable. By default the first two.",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="FD, IS, KL or score; repeatable. All that are possible.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="RESULT.json", help="The result to write.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="RESULT.html", help="A page that shows it.")] = None,
    bootstrap: Annotated[int, typer.Option(help="Replicates of an interval; at most 200 of FD; 0: none.")] = 1000,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Clips read and embedded together.")] = 16,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Embed only every N-th part from the I-th on; no figures.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of finished parts; by default RESULT.work.")] = None,
    min_seconds: Annotated[float, typer.Option(help="Shorter sounds are skipped.")] = 0.2,
    max_seconds: Annotated[float, typer.Option(help="Longer sounds are skipped.")] = 120.0,
    skip_clipped: Annotated[
        bool, typer.Option("--skip-clipped", help="Clipped sounds are counted, or skipped.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the embedding models run.")] = "cpu",
) -> None:
    """How good generated sound is: Frechet distance, Inception Score, paired KL and text scores, with intervals.

    A run that was stopped goes on behind what it had embedded.
    """
    values = dict(locals())
    from .evaluate.run import evaluate as run
    from .evaluate.settings import EvaluateSettings
    from .evaluate.summary import summary

    typer.echo(summary(run(EvaluateSettings(**values))))


def compare_evaluations(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="Results of siren evaluate.")],
) -> None:
    """Results side by side, as a Markdown table. Figures that were made differently stand in different columns."""
    from .evaluate.compare import read_result, table

    typer.echo(table([read_result(path) for path in results]), nl=False)
