"""Parts: 64 clips of a list as one embedding model hears them, kept in a safetensors file in the work folder.

| tensor | shape | meaning |
| --- | --- | --- |
| vectors | float32 [n, D] | embeddings of the clips that were kept, one after another |
| lengths | int64 [kept] | how many of them each clip has |
| logits | float32 [kept, classes] | if the model is a classifier |
| scores | float64 [kept] | if the model embeds texts: cosine of sound and prompt; NaN without a prompt |

The header says what became of each clip. A file's name ends in its key: a hash of the model, of all that decides about
the numbers, and of the ids, prompts and bytes of the clips. So a part is used again wherever it fits (another run,
another model's reference) and never where it does not. A hash over the values shows damage; such a part is made anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ..audio import write_files
from ..data.sound import SoundError
from ..errors import SirenError
from .clip_lists import Entry
from .sounds import CLIPPED, Heard, hear

if TYPE_CHECKING:
    from .embedders import Embedder

PART = 64  # clips
_FORMAT = 1


@dataclass(frozen=True)
class Limits:
    """Which sounds are used, by length in seconds, and whether clipped ones are."""

    min_seconds: float
    max_seconds: float
    skip_clipped: bool


@dataclass(frozen=True)
class Part:
    """A finished part. Of its clips by place in it: `kept`, and of these the file's `rates` (Hz) and `clipped`;
    and `skips`, each [place, reason, detail]."""

    path: Path
    kept: list[int]
    rates: list[int]
    clipped: list[bool]
    skips: list[tuple[int, str, str]]

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """Raises SirenError if the file has gone."""
        try:
            with safe_open(self.path, "numpy") as file:
                return np.asarray(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise SirenError(f"cannot read {self.path} ({error}); run the same command again") from error


def part_path(
    work: Path,
    number: int,
    embedder: Embedder,
    limits: Limits,
    texts: bool,
    entries: Sequence[Entry],
    digests: Sequence[str],
) -> Path:
    """Where the part of these clips is; `digests` are their files' hashes, `texts` says whether prompts are scored."""
    sizes = [embedder.identity, embedder.sample_rate, embedder.dim, embedder.classes]
    clips = [[e.id, e.prompt if texts else "", digest] for e, digest in zip(entries, digests, strict=True)]
    key = json.dumps([_FORMAT, sizes, limits.min_seconds, limits.max_seconds, limits.skip_clipped, texts, clips])
    name = re.sub(r"\W", "_", embedder.name)
    return work / f"{name}-{number:05d}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def read_part(path: Path) -> Part | None:
    """The part of that file, or None if there is none, or not all of it."""
    try:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])["__metadata__"]
        if _digest(header["about"], memoryview(data)[end:]) != header["sha256"]:
            return None
        about = json.loads(header["about"])
        skips = [(place, reason, detail) for place, reason, detail in about["skips"]]
        return Part(path, about["kept"], about["rates"], about["clipped"], skips)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_part(
    path: Path, embedder: Embedder, limits: Limits, texts: bool, entries: Sequence[Entry], batch_size: int
) -> Part:
    """Read and embed the clips of a part, `batch_size` at a time, and write its file, whole or not at all."""
    kept: list[int] = []
    rates: list[int] = []
    clipped: list[bool] = []
    skips: list[tuple[int, str, str]] = []
    columns: dict[str, list[npt.NDArray[Any]]] = {"vectors": [], "lengths": []}
    for start in range(0, len(entries), batch_size):
        heard: dict[int, Heard] = {}
        for place in range(start, min(start + batch_size, len(entries))):
            try:
                heard[place] = _hear(entries[place].path, embedder, limits)
            except SoundError as error:
                skips.append((place, error.reason, str(error)))
        rows = _embed(embedder, [sound.wave for sound in heard.values()], texts, [entries[i].prompt for i in heard])
        for (place, sound), row in zip(heard.items(), rows, strict=True):
            if not all(np.isfinite(row[name]).all() for name in row if name != "scores"):
                skips.append((place, "embedding has NaN or infinity", f"{entries[place].path}: {embedder.name}"))
                continue
            kept.append(place)
            rates.append(sound.rate)
            clipped.append(sound.clipped)
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    empty: dict[str, npt.NDArray[Any]] = {
        "vectors": np.zeros((0, embedder.dim), np.float32),
        "lengths": np.zeros(0, np.int64),
    }
    tensors: dict[str, npt.NDArray[Any]] = {
        name: np.concatenate(values) if values else empty[name] for name, values in columns.items()
    }
    about = json.dumps({"kept": kept, "rates": rates, "clipped": clipped, "skips": skips})
    values = safetensors.numpy.save(tensors)
    digest = _digest(about, memoryview(values)[8 + int.from_bytes(values[:8], "little") :])
    write_files({path: safetensors.numpy.save(tensors, metadata={"about": about, "sha256": digest})})
    return Part(path, kept, rates, clipped, skips)


def _hear(path: Path, embedder: Embedder, limits: Limits) -> Heard:
    try:
        sound = hear(path, embedder.sample_rate, limits.min_seconds, limits.max_seconds)
    except OSError as error:  # it went away between two looks
        raise SoundError(f"{path} cannot be read: {error.strerror}") from error
    if sound.clipped and limits.skip_clipped:
        raise SoundError(f"{path} is clipped", CLIPPED)
    if len(sound.wave) < max(1, embedder.min_samples):
        raise SoundError(f"{path} is too short for {embedder.name}", "too short")
    return sound


def _embed(
    embedder: Embedder, waves: Sequence[npt.NDArray[np.float32]], texts: bool, prompts: Sequence[str]
) -> list[dict[str, npt.NDArray[Any]]]:
    """The tensors of each clip, with one row (of vectors: one or more) each."""
    if not waves:
        return []
    made = embedder.embed(waves)
    rows: list[dict[str, npt.NDArray[Any]]] = [
        {"vectors": np.asarray(vectors, np.float32), "lengths": np.array([len(vectors)])} for vectors in made.vectors
    ]
    if embedder.classes and made.logits is not None:
        for row, logits in zip(rows, made.logits, strict=True):
            row["logits"] = np.asarray(logits, np.float32)[None]
    if texts:
        said = [i for i, prompt in enumerate(prompts) if prompt]
        unit = dict(zip(said, embedder.embed_texts([prompts[i] for i in said]), strict=True)) if said else {}
        for i, row in enumerate(rows):
            sound = row["vectors"].astype(np.float64).mean(axis=0)
            norm = max(float(np.linalg.norm(sound)), 1e-12)
            row["scores"] = np.array([float(sound @ unit[i].astype(np.float64)) / norm if i in unit else np.nan])
    return rows


def _digest(about: str, values: memoryview) -> str:
    return hashlib.sha256(about.encode() + b"\0" + values).hexdigest()
