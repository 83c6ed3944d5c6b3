"""`siren convert-embedder`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert_embedder(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="vggish or cnn14.")],
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="WEIGHTS.pth", help="vggish-10086976.pth, Cnn14_mAP=0.431.pth or Cnn14_16k_mAP=0.438.pth."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
) -> None:
    """Turn the weights of VGGish or CNN14 into a file for evaluation. Nothing in them is run."""
    from .evaluate.embedders import convert_embedder as run

    embedder = run(kind, weights, out)
    typer.echo(f"{out}: {embedder.identity}, {embedder.sample_rate} Hz, {embedder.dim} numbers")
