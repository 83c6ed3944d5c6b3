"""The training data of the published code: a JSON Lines file beside NPZ files with codes and prompts.

    {"id": "clip-1", "npz": "npz/clip-1.npz", "codes_key": "codes", "prompt_key": "prompt_embeddings"}

codes int [num_codebooks, T] within 0..1023, prompt_embeddings float [P, prompt_dim]. The two keys may be missing and
are then as shown; other keys are ignored. The format names no codec, encoder or caption. Token sets are faster to read.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, InputError
from .clips import check_id, check_text, locate, read_json_lines

if TYPE_CHECKING:
    import torch

CODEBOOK_SIZE = 1024
_MAX_FRAMES = 1 << 20
_MAX_CODEBOOKS = 64
_MAX_PROMPT = 1 << 24  # values
_HEADER = 4096  # bytes that an array's header may take in its file


@dataclass(frozen=True)
class _Entry:
    id: str
    path: Path
    codes_key: str
    prompt_key: str


class OfficialTokens:
    """The clips of an official `.jsonl`, with the interface of `TokenSet`.

    Opening reads the header of every array; values are read and checked when they are asked for. What the format does
    not say is None: identities, rates, labels, crop starts. Raises DataError naming the file.
    """

    codec_identity: str | None = None
    encoder_identity: str | None = None
    sample_rate: int | None = None
    hop_length: int | None = None
    codebook_size = CODEBOOK_SIZE

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        root = self.path.parent
        self._entries = [_entry(root, values, where) for where, values in read_json_lines(self.path)]
        if not self._entries:
            raise DataError(f"{self.path} lists no clips")
        self.num_codebooks = self.prompt_dim = 0
        frames = []
        for entry in self._entries:
            codebooks, length, width = self._shapes(entry)
            if self.num_codebooks and (codebooks, width) != (self.num_codebooks, self.prompt_dim):
                raise DataError(
                    f"{entry.path} has {codebooks} codebooks and prompts of width {width}, earlier files have "
                    f"{self.num_codebooks} and {self.prompt_dim}; they are of different models"
                )
            self.num_codebooks, self.prompt_dim = codebooks, width
            frames.append(length)
        self.frames = np.array(frames, np.int64)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"OfficialTokens({str(self.path)!r}, {len(self)} clips, {int(self.frames.sum())} frames)"

    def codes(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames start to stop (exclusive) of a clip: int16 [num_codebooks, stop - start]."""
        stop = int(self.frames[index]) if stop is None else stop
        if not 0 <= start < stop <= self.frames[index]:
            raise InputError(f"clip {index} has {self.frames[index]} frames; {start} to {stop} are not among them")
        entry = self._entries[index]
        codes = self._array(entry, entry.codes_key)
        if codes.shape != (self.num_codebooks, self.frames[index]) or codes.dtype.kind not in "iu":
            raise DataError(f"{entry.path} has changed since it was opened")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise DataError(f"{entry.path}: {entry.codes_key} must be within 0..{self.codebook_size - 1}")
        return codes[:, start:stop].astype(np.int16)

    def captions(self, index: int) -> list[str] | None:  # noqa: ARG002
        """None: the format holds prompts without their text."""
        return None

    def prompt(self, index: int, variant: int = 0) -> torch.Tensor:
        """Encoder states of the clip's only caption: float32 [P, prompt_dim], on the CPU."""
        import torch

        if variant != 0:
            raise InputError(f"{self.path} has one prompt for each clip; there is no variant {variant}")
        entry = self._entries[index]
        prompt = self._array(entry, entry.prompt_key)
        if prompt.ndim != 2 or prompt.shape[1] != self.prompt_dim or prompt.dtype.kind != "f":
            raise DataError(f"{entry.path} has changed since it was opened")
        prompt = prompt.astype(np.float32)
        if not np.isfinite(prompt).all():
            raise DataError(f"{entry.path}: {entry.prompt_key} holds NaN or infinity")
        return torch.from_numpy(prompt)

    def crop_starts(self, index: int) -> np.ndarray | None:  # noqa: ARG002
        """None: a crop may begin anywhere."""
        return None

    def clip_id(self, index: int) -> str:
        return self._entries[index].id

    def label(self, index: int) -> str | None:  # noqa: ARG002
        """None: the format has no classes."""
        return None

    def _shapes(self, entry: _Entry) -> tuple[int, int, int]:
        """Codebooks, frames and prompt width of a clip, from the headers of its arrays."""
        try:
            with zipfile.ZipFile(entry.path) as archive:
                codes = _header(archive, entry.codes_key)
                prompt = _header(archive, entry.prompt_key)
        except Exception as error:  # a damaged archive fails in whichever line of two libraries meets it first
            raise _unreadable(entry, error) from error
        shape, kind = codes
        if (
            kind not in "iu"
            or len(shape) != 2
            or not (1 <= shape[0] <= _MAX_CODEBOOKS and 1 <= shape[1] <= _MAX_FRAMES)
        ):
            raise DataError(f"{entry.path}: {entry.codes_key} must be whole numbers [codebooks, frames], not {shape}")
        width, kind = prompt
        if (
            kind != "f"
            or len(width) != 2
            or not (width[0] >= 1 and width[1] >= 1 and width[0] * width[1] <= _MAX_PROMPT)
        ):
            raise DataError(f"{entry.path}: {entry.prompt_key} must be floats [tokens, width], not {width}")
        return shape[0], shape[1], width[1]

    def _array(self, entry: _Entry, key: str) -> np.ndarray:
        self._shapes(entry)  # sizes are checked before anything is unpacked
        try:
            with np.load(entry.path, allow_pickle=False) as arrays:
                array: np.ndarray = arrays[key]
        except Exception as error:  # as in _shapes
            raise _unreadable(entry, error) from error
        return array


def _entry(root: Path, values: dict[str, Any], where: str) -> _Entry:
    path = locate(root, check_text(values.get("npz"), "npz", where), where)
    codes_key = check_text(values.get("codes_key", "codes"), "codes_key", where)
    prompt_key = check_text(values.get("prompt_key", "prompt_embeddings"), "prompt_key", where)
    return _Entry(check_id(values.get("id"), where), path, codes_key, prompt_key)


def _header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], str]:
    """Shape and kind of an array, without unpacking it. ValueError if its member is not exactly as large as it says."""
    name = f"{key}.npy"
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{key} is in a format of its own")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file, max_header_size=_HEADER)
        size = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{key} holds Python objects, which are never read")
    # The library unpacks as much as the member gives: a small file could hold gigabytes of zeros.
    if archive.getinfo(name).file_size != size + int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError(f"{key} is cut off or too long")
    return shape, dtype.kind


def _unreadable(entry: _Entry, error: Exception) -> DataError:
    reason = str(error.args[0] if error.args else error).split("\n")[0]
    return DataError(f"{entry.path} (clip {entry.id}) cannot be read: {reason or type(error).__name__}")
