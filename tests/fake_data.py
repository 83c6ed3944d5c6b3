"""A tiny codec and prompt encoder, clip folders and token sets for the tests of the data engine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from siren.data.clip_tokenizer import Outcome
from siren.data.shards import Clip
from siren.data.unfinished import Unfinished, pack_group
from siren.errors import InputError

RATE = 16000


class FakeCodec:
    """Codes of a frame are its first samples, scaled: what goes in can be told from what comes out."""

    sample_rate, hop_length, num_codebooks, codebook_size = RATE, 320, 12, 1024
    device = torch.device("cpu")

    def __init__(self, name: str = "fake", delay: float = 0.0) -> None:
        self.identity = f"{name} sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        self.delay = delay

    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay)
        frames = -(-waveform.shape[2] // self.hop_length)
        padded = torch.nn.functional.pad(waveform, (0, frames * self.hop_length - waveform.shape[2]))
        first = padded.reshape(len(waveform), frames, self.hop_length)[..., : self.num_codebooks]
        return (first.abs() * (self.codebook_size - 1)).round().long().clamp(max=1023).transpose(1, 2)


class FakeEncoder:
    """A word is a row of numbers from its hash; more than eight words are too many, as in a real encoder."""

    def __init__(self, name: str = "words", dim: int = 8) -> None:
        self.identity, self.dim = f"{name} sha256:{hashlib.sha256(name.encode()).hexdigest()}", dim

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        words = texts[0].split()
        if len(texts) != 1 or not 1 <= len(words) <= 8:
            raise InputError(f"the prompt has {len(words)} tokens and the limit is 8")
        digests = [hashlib.sha256(f"{self.identity} {word}".encode()).digest()[: self.dim] for word in words]
        states = torch.tensor([[byte / 64 - 2 for byte in digest] for digest in digests])
        return states[None], torch.ones(1, len(words), dtype=torch.bool)


class FakeClap:
    """A caption's similarity is as given, to whatever is loud enough; silence resembles nothing."""

    identity = "fake clap"

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = scores

    def similarity(self, waveforms: Sequence[np.ndarray], captions: Sequence[str], sample_rate: int) -> np.ndarray:
        assert sample_rate == RATE
        loud = [float(np.sqrt(np.mean(waveform**2))) > 0.02 for waveform in waveforms]
        pairs = zip(loud, captions, strict=True)
        return np.array([self.scores[caption] if heard else 0.0 for heard, caption in pairs], np.float32)


class FakeCaptioner:
    """The same captions for every sound."""

    def __init__(self, given: Sequence[str]) -> None:
        self.given = list(given)

    def __call__(self, waveforms: Sequence[np.ndarray], sample_rate: int) -> list[list[str]]:
        assert sample_rate == RATE and all(waveform.ndim == 1 for waveform in waveforms)
        return [self.given for _ in waveforms]


def burst(seconds: float, seed: int = 0, level: float = 0.5) -> np.ndarray:
    """A decaying noise, float32 [S] at 16 kHz: a sound with activity, other for another seed."""
    samples = round(seconds * RATE)
    noise = np.random.default_rng(seed).uniform(-level, level, samples)
    return (noise * np.exp(-np.arange(samples) / (0.3 * samples + 1))).astype(np.float32)


def clip_folder(folder: Path, clips: Sequence[Mapping[str, Any]]) -> Path:
    """A clip folder. Each clip is its line, with "sound": waveform, bytes or None (no file) instead of "audio"."""
    folder.mkdir()
    lines = []
    for i, clip in enumerate(clips):
        values = dict(clip)
        sound = values.pop("sound")
        values.setdefault("audio", f"{i}.wav")
        path = folder / values["audio"]
        if isinstance(sound, bytes):
            path.write_bytes(sound)
        elif sound is not None:
            soundfile.write(path, sound, RATE, subtype="PCM_16")
        lines.append(json.dumps(values) + "\n")
    (folder / "clips.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def plain_clips(folder: Path, count: int, seconds: float = 0.3) -> Path:
    """A clip folder of `count` different bursts with a caption of their own and one they share."""
    return clip_folder(
        folder,
        [
            {"id": f"clip-{i}", "caption": [f"burst {i}", "a burst"], "label": f"c{i % 3}", "sound": burst(seconds, i)}
            for i in range(count)
        ],
    )


def random_clips(count: int, seed: int = 0, codebooks: int = 12, dim: int = 8) -> list[Clip]:
    """Clips of 1 to 9 frames with random codes and one or two captions."""
    rng = np.random.default_rng(seed)
    encoder = FakeEncoder(dim=dim)
    clips = []
    for i in range(count):
        captions = [f"sound {i}", "a sound of any kind"][: int(rng.integers(1, 3))]
        prompts = [encoder([caption])[0][0].numpy() for caption in captions]
        codes = rng.integers(0, 1024, (int(rng.integers(1, 10)), codebooks))
        clips.append(Clip(f"clip-{seed}-{i}", codes, captions, prompts, label=f"c{i % 3}" if i % 2 else None))
    return clips


def write_tokens(folder: Path, shards: Sequence[Sequence[Clip]], dim: int = 8, reserve: int = 0) -> Path:
    """A token set of these clips, made by `FakeCodec` and `FakeEncoder` as far as its manifest says."""
    codec, encoder = FakeCodec(), FakeEncoder(dim=dim)
    sizes = ("identity", "sample_rate", "hop_length", "num_codebooks", "codebook_size")
    job = {
        "format_version": 1,
        "kind": "siren-tokens",
        "codec": {name: getattr(codec, name) for name in sizes},
        "encoder": {"identity": encoder.identity, "dim": encoder.dim},
        "settings": {"reserve": reserve},
    }
    unfinished = Unfinished(folder, job, 0.0)
    for i in unfinished.open(len(shards), overwrite=False):
        unfinished.write(i, *pack_group(i, [Outcome(clips=list(shards[i]))], codec.codebook_size))
    unfinished.finish(len(shards))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
