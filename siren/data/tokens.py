"""Token sets, what training reads: codes of clips, their captions, and the captions as encoder states.

A token set is a folder with `manifest.json` and shards (see shards.py). Nothing in it is trusted: hashes, types, ranges
and paths are checked when it is opened. The official JSONL + NPZ format gives the same interface (official.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, InputError
from .shards import Shard

if TYPE_CHECKING:
    import torch

    from .official import OfficialTokens

KIND = "siren-tokens"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 64 << 20  # bytes; an entry takes 150, a shard holds some hundred clips
_LIMITS = {
    "sample_rate": (1000, 384000),
    "hop_length": (1, 1 << 20),
    "num_codebooks": (1, 64),
    "codebook_size": (2, 65536),
    "dim": (1, 65536),
}


def open_tokens(path: str | Path, reserve: bool = False) -> TokenSet | OfficialTokens:
    """Open a token set's folder, or a `.jsonl` file of the official format.

    `reserve` picks the clips that were set aside for reinforcement learning; without it they are left out. Reads and
    hashes every byte once: about a second a gigabyte. Raises DataError naming the file and what is wrong with it.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".jsonl":
        return TokenSet(path, reserve)
    from .official import OfficialTokens

    if reserve:
        raise InputError(f"{path} is in the official format, which has no reserve")
    return OfficialTokens(path)


class TokenSet:
    """The clips of a token set, indexed from 0. Shards stay mapped; only what is asked for is read.

    len(tokens), and frames, int64 [N], the length of every clip. codec_identity and encoder_identity say what made the
    codes and the prompts; sample_rate in Hz, hop_length in samples; num_codebooks, codebook_size, prompt_dim. All
    arrays and tensors are private copies. Raises DataError, as `open_tokens`.
    """

    def __init__(self, folder: str | Path, reserve: bool = False) -> None:
        self.path = Path(folder).expanduser()
        values = read_manifest(self.path)
        codec, encoder, shards = values["codec"], values["encoder"], values["shards"]
        self.codec_identity: str | None = codec["identity"]
        self.encoder_identity: str | None = encoder["identity"]
        self.sample_rate: int | None = codec["sample_rate"]
        self.hop_length: int | None = codec["hop_length"]
        self.num_codebooks: int = codec["num_codebooks"]
        self.codebook_size: int = codec["codebook_size"]
        self.prompt_dim: int = encoder["dim"]
        sizes = (self.num_codebooks, self.codebook_size, self.prompt_dim)
        self._shards = [Shard(self.path / shard["file"], shard["sha256"], *sizes) for shard in shards]
        for shard, entry in zip(self._shards, shards, strict=True):
            if len(shard.clips) != entry["clips"] or int(shard.offsets[-1]) != entry["frames"]:
                raise DataError(f"{shard.path} does not hold the clips and frames that the manifest says")
        wanted = set(values["reserve"])
        self._places = [
            (shard, i)
            for shard in self._shards
            for i, clip in enumerate(shard.clips)
            if (clip["id"] in wanted) == reserve
        ]
        if not self._places:
            if reserve:
                raise DataError(f"{self.path} has no reserve; tokenize with one (--reserve)")
            raise DataError(f"{self.path} has no clips outside its reserve; tokenize more, or reserve fewer")
        self.frames = np.array([shard.offsets[i + 1] - shard.offsets[i] for shard, i in self._places], np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"TokenSet({str(self.path)!r}, {len(self)} clips, {int(self.frames.sum())} frames)"

    def codes(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames start to stop (exclusive) of a clip: int16 (or int32) [num_codebooks, stop - start]."""
        stop = int(self.frames[index]) if stop is None else stop
        if not 0 <= start < stop <= self.frames[index]:
            raise InputError(f"clip {index} has {self.frames[index]} frames; {start} to {stop} are not among them")
        shard, clip = self._places[index]
        return shard.codes(clip, start, stop)

    def captions(self, index: int) -> list[str]:
        """The captions of a clip, at least one."""
        shard, clip = self._places[index]
        return [shard.captions[i] for i in shard.clips[clip]["captions"]]

    def prompt(self, index: int, variant: int = 0) -> torch.Tensor:
        """Encoder states of caption `variant` of a clip: float32 [P, prompt_dim], on the CPU."""
        shard, clip = self._places[index]
        return shard.prompt(shard.clips[clip]["captions"][variant])

    def crop_starts(self, index: int) -> np.ndarray | None:
        """Frames at which a crop resembles the caption enough (paper, appendix B), rising; None if any will do."""
        shard, clip = self._places[index]
        return shard.crop_starts(clip)

    def clip_id(self, index: int) -> str:
        """The clip's id; one piece of several cut from a recording ends in #0, #1 and so on."""
        return self._description(index)["id"]

    def label(self, index: int) -> str | None:
        """The clip's class, if it has one."""
        return self._description(index).get("label")

    def licence(self, index: int) -> str | None:
        return self._description(index).get("licence")

    def source(self, index: int) -> str | None:
        return self._description(index).get("source")

    def score(self, index: int) -> float | None:
        """Similarity of the sound and its best caption, if it was measured."""
        return self._description(index).get("score")

    def _description(self, index: int) -> dict[str, Any]:
        shard, clip = self._places[index]
        return shard.clips[clip]


def split(tokens: TokenSet | OfficialTokens, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for validation, int64 each, in order.

    A clip is for validation if the sha256 of its id, as a number, modulo 1000 is below 1000 * val_fraction: clips keep
    their side when others come or go. Pieces of one recording, "id#0" and "id#1", go to the same side.
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction must be at least 0 and below 1, not {val_fraction!r}")
    recordings = (re.sub(r"#\d+$", "", tokens.clip_id(i)) for i in range(len(tokens)))
    buckets = [int(hashlib.sha256(recording.encode()).hexdigest(), 16) % 1000 for recording in recordings]
    validation = np.array(buckets) < 1000 * val_fraction
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def check_codec(tokens: TokenSet | OfficialTokens, codec: Any) -> None:
    """DataError unless `codec` made the codes. The official format names no codec: only sizes are compared then."""
    where = f"{tokens.path} holds codes of"
    wanted = f"{tokens.num_codebooks} codebooks of {tokens.codebook_size}"
    given = f"{codec.num_codebooks} codebooks of {codec.codebook_size}"
    if wanted != given:
        raise DataError(f"{where} {wanted}, the codec has {given}; tokenize again with this codec")
    if tokens.codec_identity not in (None, codec.identity):
        raise DataError(
            f"{where} another codec ({tokens.codec_identity}, not {codec.identity}); "
            "tokenize again with this codec, or use the one that made them"
        )


def check_encoder(tokens: TokenSet | OfficialTokens, encoder: Any) -> None:
    """DataError unless `encoder` made the prompts. The official format names none: only the width is compared then."""
    if tokens.prompt_dim != encoder.dim or tokens.encoder_identity not in (None, encoder.identity):
        raise DataError(
            f"{tokens.path} holds prompts of another encoder ({tokens.encoder_identity}, width {tokens.prompt_dim}; "
            f"not {encoder.identity}, width {encoder.dim}); tokenize again with this encoder"
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The parsed and checked `manifest.json` of a token set. Raises DataError naming the file and the field."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"there is no token set {str(folder)!r}; `siren data tokenize` makes one")
    values = _read_json(path)
    if values.get("kind") != KIND:
        raise DataError(f"{path}: kind must be {KIND!r}, not {_show(values.get('kind'))}; this is no token set")
    if values.get("format_version") != FORMAT_VERSION:
        shown = _show(values.get("format_version"))
        raise DataError(f"{path}: format_version must be {FORMAT_VERSION}, not {shown}; a newer Siren may read it")
    codec = _object(values, "codec", ("sample_rate", "hop_length", "num_codebooks", "codebook_size"), path)
    encoder = _object(values, "encoder", ("dim",), path)
    reserve = values.get("reserve", [])
    if not isinstance(reserve, list) or not all(isinstance(value, str) for value in reserve):
        raise DataError(f"{path}: reserve must be a list of clip ids")
    dropped = values.get("dropped")
    if not isinstance(dropped, dict) or not all(_whole(count, 1, 1 << 48) for count in dropped.values()):
        raise DataError(f"{path}: dropped must hold a count for each reason")
    shards = values.get("shards")
    if not isinstance(shards, list):
        raise DataError(f"{path}: shards must be a list")
    for i, shard in enumerate(shards):
        _check_shard(shard, f"{path}: shards[{i}]", folder)
    if not shards:
        raise DataError(f"{path}: the token set is empty; tokenize clips that pass the filters")
    names = [shard["file"] for shard in shards]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a shard appears twice")
    for total in ("clips", "frames"):
        if values.get(total) != sum(shard[total] for shard in shards):
            raise DataError(f"{path}: {total} is not the sum over the shards")
    return values | {"codec": codec, "encoder": encoder, "reserve": reserve}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MANIFEST_LIMIT + 1)
        if len(data) > _MANIFEST_LIMIT:
            raise DataError(f"{path} is larger than {_MANIFEST_LIMIT >> 20} MiB; this is no token set")
        values = json.loads(data)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; is this a token set?") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold a JSON object")
    return values


def _object(values: dict[str, Any], name: str, sizes: Sequence[str], path: Path) -> dict[str, Any]:
    part = values.get(name)
    if not isinstance(part, dict) or not isinstance(part.get("identity"), str):
        raise DataError(f"{path}: {name} must be an object with an identity")
    for size in sizes:
        low, high = _LIMITS[size]
        if not _whole(part.get(size), low, high):
            shown = _show(part.get(size))
            raise DataError(f"{path}: {name}.{size} must be a whole number from {low} to {high}, not {shown}")
    return part


def _check_shard(shard: Any, field: str, folder: Path) -> None:
    if not isinstance(shard, dict):
        raise DataError(f"{field} must be an object with file, clips, frames and sha256")
    file, digest = shard.get("file"), shard.get("sha256")
    if not isinstance(file, str) or not re.fullmatch(r"\w[\w-]*\.safetensors", file, re.ASCII):
        raise DataError(f"{field}.file must be the name of a safetensors file in the folder, not {_show(file)}")
    if (folder / file).is_symlink() and not (folder / file).resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{field}.file: {file} is a link that leaves the folder; replace it with the file itself")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise DataError(f"{field}.sha256 must be 64 hexadecimal digits, not {_show(digest)}")
    for name in ("clips", "frames"):
        if not _whole(shard.get(name), 1, 1 << 48):
            raise DataError(f"{field}.{name} must be a whole number above 0, not {_show(shard.get(name))}")


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 100
_show = _repr.repr  # never long, whatever a file holds
