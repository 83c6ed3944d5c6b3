"""One shard of a token set: a safetensors file with the codes, prompts and descriptions of some hundred clips.

| tensor | shape | meaning |
| --- | --- | --- |
| codes | int16 [F, num_codebooks] (int32 above 32768 codes) | codes of all clips, one after another |
| offsets | int64 [clips + 1] | clip i owns the rows offsets[i] to offsets[i + 1] of `codes` |
| prompts | float16 [R, prompt_dim] | encoder states of the distinct captions, one after another |
| prompt_offsets | int64 [captions + 1] | caption j owns the rows prompt_offsets[j] to prompt_offsets[j + 1] |
| crop_starts, crop_offsets | int64 [C], [clips + 1] | with a similarity model: frames at which a crop may begin |
| description | uint8 [bytes] | JSON: {"captions": [str], "clips": [{id, captions: [index], label, licence, ...}]} |

Frames come first in `codes`, so that a random crop is one run of bytes. Prompts are float16: half the bytes of float32,
with 11 bits of precision where training in bfloat16 keeps 8, and encoder states are far from its limit of 65504.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from ..errors import DataError

_CROPS = {"crop_starts", "crop_offsets"}
_TENSORS = {"codes", "offsets", "prompts", "prompt_offsets", "description"}


@dataclass
class Clip:
    """A tokenized clip: codes int [T, num_codebooks], captions, and for each its prompt, float [P, prompt_dim].

    `crop_starts` are frames at which a training crop may begin, or None for any; `score` is the similarity of the sound
    and its best caption.
    """

    id: str
    codes: np.ndarray
    captions: list[str]
    prompts: list[np.ndarray]
    label: str | None = None
    licence: str | None = None
    source: str | None = None
    score: float | None = None
    crop_starts: np.ndarray | None = field(default=None, repr=False)


def pack_shard(clips: Sequence[Clip], codebook_size: int) -> bytes:
    """The bytes of a shard's file. The same clips give the same bytes."""
    captions: dict[str, np.ndarray] = {}
    described: list[dict[str, Any]] = []
    for clip in clips:
        for caption, prompt in zip(clip.captions, clip.prompts, strict=True):
            captions.setdefault(caption, prompt)
        order = {caption: i for i, caption in enumerate(captions)}
        values = {"label": clip.label, "licence": clip.licence, "source": clip.source, "score": clip.score}
        described.append(
            {"id": clip.id, "captions": [order[caption] for caption in clip.captions]}
            | {name: value for name, value in values.items() if value is not None}
        )
    tensors = {
        "codes": np.concatenate([clip.codes for clip in clips]).astype(code_type(codebook_size)),
        "offsets": _offsets([len(clip.codes) for clip in clips]),
        "prompts": np.concatenate(list(captions.values())).astype(np.float16),
        "prompt_offsets": _offsets([len(prompt) for prompt in captions.values()]),
    }
    starts = [clip.crop_starts for clip in clips if clip.crop_starts is not None]
    if len(starts) == len(clips):
        tensors["crop_starts"] = np.concatenate(starts).astype(np.int64)
        tensors["crop_offsets"] = _offsets([len(start) for start in starts])
    text = json.dumps({"captions": list(captions), "clips": described}, ensure_ascii=False, separators=(",", ":"))
    tensors["description"] = np.frombuffer(text.encode(), np.uint8)
    # safetensors writes the bytes of a transposed array as they lie.
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in tensors.items()})


def code_type(codebook_size: int) -> type[np.signedinteger]:
    """The smallest type that holds the codes."""
    return np.int16 if codebook_size <= 1 << 15 else np.int32


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


class Shard:
    """A shard's file, checked when opened and mapped into memory from then on. Raises DataError naming the file.

    Attributes: offsets int64 [clips + 1], captions (list of str), clips (list of dict: see the module).
    """

    def __init__(self, path: Path, sha256: str, num_codebooks: int, codebook_size: int, prompt_dim: int) -> None:
        self.path = path
        altered = f"{path} is damaged, cut off or was altered; copy it again, or tokenize again"
        try:
            if sha256_file(path) != sha256:
                raise DataError(f"{altered} (its sha256 is not the one in the manifest)")
            self._file = safe_open(path, framework="pt", device="cpu")
            self._check(num_codebooks, codebook_size, prompt_dim)
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing; copy the whole folder again") from error
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{altered} ({_first_line(error)})") from error

    def codes(self, clip: int, start: int, stop: int) -> np.ndarray:
        """Frames start to stop of a clip: int [num_codebooks, stop - start], a private copy."""
        begin = int(self.offsets[clip])
        rows: np.ndarray = self._file.get_slice("codes")[begin + start : begin + stop].numpy()
        return rows.T.copy()  # the slice may be a view of the file

    def prompt(self, caption: int) -> Any:
        """Encoder states of a caption: float32 torch tensor [P, prompt_dim], a private copy."""
        rows = self._file.get_slice("prompts")[self._prompt_offsets[caption] : self._prompt_offsets[caption + 1]]
        prompt = rows.float()
        if not bool(prompt.isfinite().all()):
            raise DataError(f"{self.path}: the prompt of {self.captions[caption][:60]!r} holds NaN or infinity")
        return prompt

    def crop_starts(self, clip: int) -> np.ndarray | None:
        """Frames at which a crop of a clip may begin, or None for any; a private copy."""
        if self._crops is None:
            return None
        starts, offsets = self._crops
        return starts[offsets[clip] : offsets[clip + 1]].copy()

    def _check(self, num_codebooks: int, codebook_size: int, prompt_dim: int) -> None:
        names = set(self._file.keys())
        if not _TENSORS <= names <= _TENSORS | _CROPS or len(names & _CROPS) == 1:
            raise ValueError(f"it holds the tensors {sorted(names)[:8]}, which is no shard")
        arrays = {name: self._file.get_tensor(name).numpy() for name in names - {"prompts"}}
        codes, prompts = arrays["codes"], self._file.get_slice("prompts")
        if codes.dtype != code_type(codebook_size) or codes.ndim != 2 or codes.shape[1] != num_codebooks:
            raise ValueError(f"codes have type {codes.dtype} and shape {list(codes.shape)}")
        if not len(codes) or int(codes.min()) < 0 or int(codes.max()) >= codebook_size:
            raise ValueError(f"there are no codes, or one is outside 0..{codebook_size - 1}")
        shape = prompts.get_shape()
        if prompts.get_dtype() != "F16" or len(shape) != 2 or shape[1] != prompt_dim:
            raise ValueError(f"prompts have type {prompts.get_dtype()} and shape {shape}")
        self.offsets = _check_offsets(arrays["offsets"], len(codes))
        self._prompt_offsets = _check_offsets(arrays["prompt_offsets"], shape[0]).tolist()
        self._crops = None
        if "crop_starts" in arrays:
            starts = arrays["crop_starts"].copy()
            offsets = _check_offsets(arrays["crop_offsets"], len(starts)).tolist()
            if starts.dtype != np.int64 or len(offsets) != len(self.offsets) or not (starts >= 0).all():
                raise ValueError("the crop starts do not fit the clips")
            if not (starts < np.repeat(np.diff(self.offsets), np.diff(offsets))).all():
                raise ValueError("a crop starts after the end of its clip")
            self._crops = starts, offsets
        description = json.loads(arrays["description"].tobytes())
        self.captions = _strings(description["captions"])
        if len(self.captions) + 1 != len(self._prompt_offsets):
            raise ValueError("captions and prompts differ in number")
        self.clips: list[dict[str, Any]] = description["clips"]
        if not isinstance(self.clips, list) or len(self.clips) + 1 != len(self.offsets):
            raise ValueError("clips and codes differ in number")
        for clip in self.clips:
            _check_clip(clip, len(self.captions))


def _check_offsets(offsets: np.ndarray, end: int) -> np.ndarray:
    if offsets.dtype != np.int64 or offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError("offsets must be a list of int64")
    if offsets[0] != 0 or offsets[-1] != end or not (np.diff(offsets) > 0).all():
        raise ValueError("offsets do not rise from 0 to the end")
    return offsets.copy()  # get_tensor may give a view of the file


def _check_clip(clip: Mapping[str, Any], captions: int) -> None:
    if not isinstance(clip, dict):
        raise ValueError("a clip's description is not an object")
    _strings([clip["id"], *(clip.get(name, "") for name in ("label", "licence", "source"))])
    indices = clip["captions"]
    if not isinstance(indices, list) or not indices or not all(type(i) is int and 0 <= i < captions for i in indices):
        raise ValueError(f"clip {str(clip['id'])[:60]!r} has no captions, or captions that are not there")


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("a text in the description is not a string")
    return values


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a whole file. Raises OSError; ValueError for an empty file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
