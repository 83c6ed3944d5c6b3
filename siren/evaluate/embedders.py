"""The embedding models of the figures, by name, and the conversion of third-party weights for them."""

from __future__ import annotations

from pathlib import Path

from ..aisfx import SoundEvents
from ..errors import InputError
from .clap import ClapEmbedder
from .cnn14 import Cnn14Embedder
from .embedding import Embedded, Embedder
from .offline import AisfxEmbedder, AlignerEmbedder
from .vggish import VggishEmbedder
from .weights import SOURCES, read_pth, write_tensors

__all__ = ["Embedded", "Embedder", "convert_embedder", "load_embedder"]

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
    if kind == "clap" and where:
        return ClapEmbedder.from_pretrained(where, device)
    if kind == "vggish" and where:
        return VggishEmbedder.from_file(_path(where), device)
    if kind == "cnn14" and where:
        return Cnn14Embedder.from_file(_path(where), device)
    if kind in SOURCES:
        raise InputError(
            f"{kind} needs a file of weights, {kind}:FILE.safetensors; make it by `siren convert-embedder {kind} "
            f"WEIGHTS.pth FILE.safetensors` from {SOURCES[kind]}"
        )
    raise InputError(f"there is no embedding {name!r}: it is {_NAMES}")


def convert_embedder(kind: str, weights: str | Path, out: str | Path) -> Embedder:
    """Turn the `.pth` file of "vggish" or "cnn14" into the file that `load_embedder` reads; returns what it will give.

    Nothing in the file is run. `out` ends in .safetensors; it appears whole or not at all, and a file that is there is
    replaced. Raises InputError for a wrong kind or path, CheckpointError for weights that do not fit.
    """
    target = _path(out)
    if kind not in SOURCES:
        raise InputError(f"there is no conversion of {kind!r}: it is {' or '.join(SOURCES)}")
    if target.suffix != ".safetensors":
        raise InputError(f"{target} must end in .safetensors")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a folder; make it first")
    source = _path(weights)
    state = read_pth(source, kind)
    embedder = VggishEmbedder if kind == "vggish" else Cnn14Embedder
    embedder(state, "", source)  # checks names, shapes and values before anything is written
    write_tensors(target, state)
    return embedder.from_file(target)


def _path(name: str | Path) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~ of a user that does not exist
        raise InputError(f"{name} is not a path ({error})") from error
