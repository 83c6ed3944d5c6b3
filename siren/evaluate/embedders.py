"""The embedding models of the figures, by name."""

from __future__ import annotations

from ..aisfx import SoundEvents
from ..errors import InputError
from .embedding import Embedded, Embedder
from .offline import AisfxEmbedder, AlignerEmbedder

__all__ = ["Embedded", "Embedder", "load_embedder"]

_NAMES = "aisfx, aligner, aligner:FOLDER, vggish:FILE, cnn14:FILE or clap:FOLDER"


def load_embedder(name: str, device: str = "cpu") -> Embedder:
    """The embedding model of a name; weights are checked, and what is missing is said, before any sound is read.

    "aisfx"            sound-event embedding with 81 classes, 44.1 kHz; offline
    "aligner"          sound and text, the aligner beside siren-mini; "aligner:FOLDER" another; offline
    "vggish:FILE"      VGGish, 16 kHz, of a file that `siren convert-embedder` made
    "cnn14:FILE"       PANNs CNN14 with 527 classes, 16 or 32 kHz, likewise
    "clap:FOLDER"      a CLAP in the transformers format, or its name on the model hub; sound and text, 48 kHz

    Raises InputError for another name, CheckpointError for weights that are missing or do not fit, and
    MissingDependencyError for a package that is not installed.
    """
    kind, colon, where = name.partition(":")
    if name == "aisfx":
        return AisfxEmbedder(SoundEvents.from_installed(device))
    if kind == "aligner" and bool(colon) == bool(where):
        return AlignerEmbedder.from_pretrained(where or None, device)
    raise InputError(f"there is no embedding {name!r}: it is {_NAMES}")
