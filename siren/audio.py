"""What generation returns: clips with their codes and prompts, ready to save, look at and play in a notebook."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .errors import InputError, MissingDependencyError, SirenError
from .picture import draw_picture

_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
_MAX_PLAYERS = 8  # clips shown in a notebook


@dataclass(frozen=True, eq=False)
class Audio:
    """N clips of one length.

    waveform float32 [N, 1, samples] within -1..1; sample_rate in Hz; codes int64 [N, codebooks, frames]; logprobs
    float32 of the codes' shape, or None; prompts, scores (of reranking; NaN where there is none) and seeds (that make
    the clip again), one for each clip, or empty. Indexing, also by a slice, gives an Audio of those clips. Raises
    InputError if the parts do not fit together or the waveform holds NaN or infinity.
    """

    waveform: torch.Tensor
    sample_rate: int
    codes: torch.Tensor
    logprobs: torch.Tensor | None = None
    prompts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        wave, codes = self.waveform, self.codes
        if not isinstance(wave, torch.Tensor) or wave.dtype != torch.float32:
            raise InputError("waveform must be a float32 tensor")
        if wave.dim() != 3 or wave.shape[0] < 1 or wave.shape[1] != 1 or wave.shape[2] < 1:
            raise InputError(f"waveform must have shape [clips, 1, samples], not {list(wave.shape)}")
        if not bool(torch.isfinite(wave).all()):
            raise InputError("waveform holds NaN or infinity")
        if isinstance(self.sample_rate, bool) or not isinstance(self.sample_rate, int) or self.sample_rate < 1:
            raise InputError(f"sample_rate must be a whole number above 0, not {self.sample_rate!r}")
        if not isinstance(codes, torch.Tensor) or codes.dtype != torch.int64 or codes.dim() != 3:
            raise InputError("codes must be an int64 tensor of shape [clips, codebooks, frames]")
        if len(codes) != len(wave) or (self.logprobs is not None and self.logprobs.shape != codes.shape):
            raise InputError("waveform, codes and logprobs must be of the same clips")
        for name, values in (("prompts", self.prompts), ("scores", self.scores), ("seeds", self.seeds)):
            if values and len(values) != len(wave):
                raise InputError(f"there are {len(values)} {name} for {len(wave)} clips")

    @property
    def seconds(self) -> float:
        """Length of every clip."""
        return self.waveform.shape[2] / self.sample_rate

    def __len__(self) -> int:
        return len(self.waveform)

    def __getitem__(self, index: int | slice) -> Audio:
        picked = index if isinstance(index, slice) else slice(self._check_index(index), self._check_index(index) + 1)
        logprobs = None if self.logprobs is None else self.logprobs[picked]
        lists = self.prompts[picked], self.scores[picked], self.seeds[picked]
        return Audio(self.waveform[picked], self.sample_rate, self.codes[picked], logprobs, *lists)

    def __iter__(self) -> Iterator[Audio]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        clips = "1 clip" if len(self) == 1 else f"{len(self)} clips"
        return f"Audio({clips} of {self.seconds:.2f} s at {self.sample_rate} Hz)"

    def _repr_html_(self) -> str:
        """Players for a notebook."""
        parts = []
        for i in range(min(len(self), _MAX_PLAYERS)):
            sound = base64.b64encode(self._encode(i, "WAV")).decode()
            title = html.escape(self._title(i) or f"clip {i}")
            player = f'<audio controls preload="none" src="data:audio/wav;base64,{sound}"></audio>'
            parts.append(f'<figure style="margin:0 0 0.8em"><figcaption>{title}</figcaption>{player}</figure>')
        if len(self) > _MAX_PLAYERS:
            parts.append(f"<p>... and {len(self) - _MAX_PLAYERS} more</p>")
        return "".join(parts)

    def save(self, path: str | Path, index: int | None = None) -> list[Path]:
        """Write 16-bit WAV or FLAC, by the suffix, and return the paths written.

        One clip, or the one picked by `index`, goes to `path`. Several go beside it: rain.wav becomes rain-0.wav,
        rain-1.wav and so on. A clip that leaves -1..1 is turned down as a whole so that its peak is 1, never wrapped or
        clipped. Files appear whole or not at all. Raises InputError for a path or index that cannot be, SirenError if
        writing fails.
        """
        target = _check_path(path, tuple(_FORMATS))
        picked = list(range(len(self))) if index is None else [self._check_index(index)]
        paths = [target]
        if len(picked) > 1:
            width = len(str(len(picked) - 1))
            paths = [target.with_stem(f"{target.stem}-{i:0{width}}") for i in picked]
        kind = _FORMATS[target.suffix.lower()]
        write_files({path: self._encode(i, kind) for path, i in zip(paths, picked, strict=True)})
        return paths

    def picture(self, path: str | Path, index: int = 0) -> Path:
        """Draw clip `index` as a PNG: waveform and mel spectrogram, with the prompt as title. Returns the path.

        Raises MissingDependencyError without matplotlib, and what `save` raises.
        """
        target = _check_path(path, (".png",))
        i = self._check_index(index)
        wave = self.waveform[i, 0].detach().cpu().numpy()
        write_files({target: draw_picture(wave, self.sample_rate, self._title(i))})
        return target

    def _title(self, index: int) -> str:
        return self.prompts[index] if self.prompts else ""

    def _check_index(self, index: int) -> int:
        if isinstance(index, bool) or not isinstance(index, int):
            raise InputError(f"index must be a whole number, not {index!r}")
        if not -len(self) <= index < len(self):
            raise InputError(f"there is no clip {index}; there are {len(self)}")
        return index % len(self)

    def _encode(self, index: int, kind: str) -> bytes:
        try:
            import soundfile
        except (ImportError, OSError) as error:  # OSError: its library libsndfile is missing
            raise MissingDependencyError(f"soundfile does not import ({error}): pip install soundfile") from error
        wave = self.waveform[index, 0].detach().cpu()
        wave = wave / wave.abs().max().clamp(min=1.0)
        file = io.BytesIO()
        try:
            soundfile.write(file, wave.numpy(), self.sample_rate, format=kind, subtype="PCM_16")
        except soundfile.LibsndfileError as error:
            raise InputError(f"{kind} cannot hold {self.sample_rate} samples a second ({error})") from error
        return file.getvalue()


def _check_path(path: str | Path, suffixes: Sequence[str]) -> Path:
    try:
        target = Path(path).expanduser()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{path!r} is not a path ({error})") from error
    if target.suffix.lower() not in suffixes:
        raise InputError(f"{target} must end in {' or '.join(suffixes)}")
    return target


def write_files(contents: Mapping[Path, bytes], mark: str = "") -> None:
    """Write files that each appear whole or not at all; none appears if one cannot be written. Raises SirenError.

    A kill can leave files beside them, whose names begin with ".siren-" and `mark`.
    """
    temporaries: dict[Path, Path] = {}
    path = Path()
    try:
        for path, data in contents.items():
            if path.is_dir():
                raise InputError(f"cannot write {path}: it is a folder")
            temporaries[path] = path.with_name(f".siren-{mark}{secrets.token_hex(8)}")
            with temporaries[path].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except (OSError, ValueError) as error:
        if isinstance(error, SirenError):
            raise
        raise SirenError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):  # renamed, or never made
                temporary.unlink()
