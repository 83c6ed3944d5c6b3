"""What happens to one sound file on its way into a token set (paper, appendix A).

Reading, segments, activity, captions, similarity filter, codec, prompt encoder, in this order: what is cheap drops
first. The result depends on the file and the settings alone, so clips may be spread over processes in any way.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codec import Codec
from ..errors import DataError, InputError
from ..text import PromptEncoder
from .captioner import QwenPolisher, describe, load_captioner
from .captions import clean_captions
from .clips import ClipRecord
from .shards import Clip, code_type
from .similarity import ClapSimilarity, crop_starts, select
from .sound import MIN_SECONDS, SAMPLE_RATE, activity_snr, read_sound, segments

CROP_SECONDS = 6.0  # paper, appendix B
_CROP_STEP = 0.5  # seconds
_CACHED_PROMPTS = 1024  # some 15 KB each


@dataclass(frozen=True)
class Settings:
    """What decides about a clip. `tokenize` explains the fields."""

    seconds: float = 10.0
    pad_seconds: float | None = None
    min_snr: float = 6.0
    threshold: float | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Models:
    """The models of a worker: folders or names, loaded where they are used, or objects, which are sent there."""

    codec: Any
    encoder: Any
    clap: Any = None
    captioner: Any = None
    polisher: Any = None

    def load(self, device: str) -> Models:
        """The models themselves, on the device if they are loaded here. Raises what their `from_pretrained` raises."""
        codec, encoder, clap, captioner, polisher = (getattr(self, part.name) for part in fields(self))
        if isinstance(codec, (str, Path)):
            codec = Codec.from_pretrained(codec, device)
        if isinstance(encoder, (str, Path)):
            encoder = PromptEncoder.from_pretrained(encoder, device)
        if isinstance(clap, (str, Path)):
            clap = ClapSimilarity.from_pretrained(clap, device)
        if isinstance(captioner, (str, Path)):
            captioner = load_captioner(captioner, device)
        if isinstance(polisher, (str, Path)):
            polisher = QwenPolisher.from_pretrained(polisher, device)
        return Models(codec, encoder, clap, captioner, polisher)


@dataclass
class Dropped:
    """A clip, or a piece of one, that is not in the token set, and why."""

    id: str
    reason: str
    detail: str = ""


@dataclass
class Outcome:
    """What one sound file gave."""

    clips: list[Clip] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


class ClipTokenizer:
    """Tokenizes one clip after another. `models` are loaded here, once."""

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models = models.load(settings.device)
        self.settings = settings
        self._prompts: OrderedDict[str, np.ndarray | None] = OrderedDict()

    def __call__(self, record: ClipRecord) -> Outcome:
        """The clips of one sound file. A bad file is an outcome, not an error."""
        outcome = Outcome()
        try:
            waveform = read_sound(record.path)
        except DataError as error:
            # Folders are left out of what is listed: the same data elsewhere gives the same bytes.
            detail = str(error).replace(str(record.path), record.path.name)
            outcome.dropped.append(Dropped(record.id, "unreadable", detail))
            return outcome
        pieces = segments(waveform, SAMPLE_RATE, self.settings.seconds, pad_seconds=self.settings.pad_seconds)
        if not pieces:
            outcome.dropped.append(Dropped(record.id, "too short", f"{len(waveform) / SAMPLE_RATE:.3f} s"))
            return outcome
        for i, piece in enumerate(pieces):
            name = f"{record.id}#{i}" if len(pieces) > 1 else record.id
            sound = waveform[i * len(piece) : (i + 1) * len(piece)]  # the piece without what it is padded with
            result = self._tokenize(piece, sound, name, record)
            if isinstance(result, Clip):
                outcome.clips.append(result)
            else:
                outcome.dropped.append(result)
        rest = len(waveform) - sum(len(piece) for piece in pieces)
        if rest >= MIN_SECONDS * SAMPLE_RATE:
            detail = f"{rest / SAMPLE_RATE:.3f} s at the end"
            outcome.dropped.append(Dropped(record.id, "rest shorter than a segment", detail))
        return outcome

    def _tokenize(self, piece: np.ndarray, sound: np.ndarray, name: str, record: ClipRecord) -> Clip | Dropped:
        """One piece of a file."""
        snr = activity_snr(sound, SAMPLE_RATE)
        if snr <= self.settings.min_snr:
            return Dropped(name, "no activity", f"SNR {snr:.1f} dB")
        prompts, faults = self._captions(sound, record)
        if not prompts:
            return Dropped(name, "no caption", ", ".join(faults))
        score = starts = None
        clap, threshold = self.models.clap, self.settings.threshold
        if clap is not None and threshold is not None:
            captions = list(prompts)
            scores = clap.similarity([sound] * len(captions), captions, SAMPLE_RATE)
            score = float(scores.max())
            kept = select(scores, threshold)
            if not len(kept):
                return Dropped(name, "similarity below the threshold", f"{score:.3f}")
            prompts = {captions[i]: prompts[captions[i]] for i in kept}
            starts = self._crop_starts(sound, list(prompts))
            if not len(starts):
                return Dropped(name, "no crop like its caption")
        return Clip(
            id=name,
            codes=self._codes(piece),
            captions=list(prompts),
            prompts=list(prompts.values()),
            label=record.label,
            licence=record.licence,
            source=record.source,
            score=score,
            crop_starts=starts,
        )

    def _captions(self, sound: np.ndarray, record: ClipRecord) -> tuple[dict[str, np.ndarray], list[str]]:
        """Clean captions with their prompts, and what is wrong with others."""
        if record.captions or self.models.captioner is None:
            captions, faults = clean_captions(record.captions)
        else:
            [(captions, faults)] = describe(self.models.captioner, [sound], SAMPLE_RATE, self.models.polisher)
        prompts = {}
        for caption in captions:
            prompt = self._prompt(caption)
            if prompt is None:
                faults.append("too long for the prompt encoder")
            else:
                prompts[caption] = prompt
        return prompts, faults

    def _crop_starts(self, sound: np.ndarray, captions: list[str]) -> np.ndarray:
        hop = self.models.codec.hop_length
        frames, step = (round(seconds * SAMPLE_RATE / hop) for seconds in (CROP_SECONDS, _CROP_STEP))
        return crop_starts(self.models.clap, sound, SAMPLE_RATE, captions, hop, frames, max(1, step))

    def _codes(self, waveform: np.ndarray) -> np.ndarray:
        codec = self.models.codec
        sound = torch.from_numpy(waveform.astype(np.float32))[None, None]
        codes: np.ndarray = codec.encode(sound.to(codec.device))[0].cpu().numpy()
        if codes.min() < 0 or codes.max() >= codec.codebook_size:
            raise DataError(f"the codec {codec.identity} gave codes outside 0..{codec.codebook_size - 1}")
        return np.ascontiguousarray(codes.T.astype(code_type(codec.codebook_size)))

    def _prompt(self, caption: str) -> np.ndarray | None:
        """Encoder states of a caption, float16 [P, dim]; None if it has no words or more than the encoder takes."""
        if caption not in self._prompts:
            try:
                states, mask = self.models.encoder([caption])
            except InputError:
                self._prompts[caption] = None
            else:
                prompt = states[0][mask[0]].cpu().numpy().astype(np.float16)
                if not np.isfinite(prompt).all():
                    raise DataError(f"the prompt encoder gave states that float16 cannot hold for {caption[:60]!r}")
                self._prompts[caption] = prompt
            if len(self._prompts) > _CACHED_PROMPTS:
                self._prompts.popitem(last=False)
        return self._prompts[caption]
