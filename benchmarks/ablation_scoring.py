"""How the arms of the ablations are judged: loss on held-out clips, and sounds for their captions.

The loss is that of `siren train`, per clip, so that intervals can be given. Sounds and the clips they are compared with
go through `siren evaluate`. What was finished by an earlier call is not done again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import json_file
import numpy as np
import torch
from ablation_arms import ARMS
from ablation_tables import COLUMNS
from ablation_training import Scale, checkpoint_of, delayed_tokens, folder_of
from numpy.typing import NDArray
from torch import Tensor

from siren.align.prompts import Prompt, pad
from siren.audio import Audio, write_files
from siren.codec import Codec
from siren.data.clips import CLIPS, read_clip_folder, write_clip_folder
from siren.data.delay import undelay
from siren.data.tokens import TokenSet, open_tokens, split
from siren.errors import InputError
from siren.evaluate import EvaluateSettings, evaluate
from siren.manifest import read_manifest
from siren.model import Siren
from siren.sampler import Sampler

CODEC = "codec"  # in place of an arm: the held-out clips after the codec, what a perfect model could reach
LISTED = "sounds.jsonl"
_BATCH = 32


def held_out(scale: Scale, most: int) -> tuple[TokenSet, list[int]]:
    """The token set and the places of its held-out clips, evenly picked if there are more than `most`."""
    tokens = open_tokens(scale.tokens)
    assert isinstance(tokens, TokenSet)
    places = split(tokens, scale.val_fraction)[1]
    picked = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).astype(int))
    return tokens, places[picked].tolist()


@torch.no_grad()
def losses(scale: Scale, arm: str, most: int) -> list[list[float]]:
    """Cross-entropy in nats per code (eq. 6) of every held-out clip and codebook: [clips, num_codebooks].

    Each clip's first caption is its prompt. A delayed model is asked for the codes alone, not for the places that the
    delay leaves empty, so its numbers are of the same events as the others'.
    """
    path = folder_of(scale, arm) / "losses.json"
    depends = {"experts": [entry.sha256 for entry in read_manifest(checkpoint_of(scale, arm)).experts], "most": most}
    kept = json_file.read(path)
    if kept is not None and kept["depends"] == depends:
        return list(kept["losses"])
    _, places = held_out(scale, most)
    tokens = open_tokens(delayed_tokens(scale) if ARMS[arm].delayed else scale.tokens)
    model = Siren.from_pretrained(checkpoint_of(scale, arm))
    rows: list[NDArray[np.float64]] = []
    for first in range(0, len(places), _BATCH):
        batch = places[first : first + _BATCH]
        prompt, mask = pad(_prompts(tokens, batch), 1)
        codes = torch.from_numpy(np.stack([tokens.codes(i, 0, int(tokens.frames[i])) for i in batch])).long()
        logprobs = torch.cat([expert.logprobs(codes, prompt, mask) for expert in model.experts], dim=1)
        logprobs = undelay(logprobs) if ARMS[arm].delayed else logprobs
        rows.append(-logprobs.double().mean(dim=2).numpy())
    values = np.concatenate(rows).tolist()
    json_file.write(path, {"depends": depends, "losses": values})
    return values


def sounds(scale: Scale, arm: str, most: int) -> Path:
    """A sound for the first caption of every held-out clip, each with its own seed; the list of the files."""
    folder = folder_of(scale, arm) / "sounds"
    tokens, places = held_out(scale, most)
    codec = Codec.from_pretrained(scale.codec)
    if (folder / LISTED).exists():
        return folder / LISTED
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for first in range(0, len(places), _BATCH):
        batch = places[first : first + _BATCH]
        if arm == CODEC:
            codes = torch.from_numpy(np.stack([tokens.codes(i, 0, int(tokens.frames[i])) for i in batch])).long()
        else:
            codes = _sample(scale, arm, tokens, batch, first)
        audio = Audio(codec.decode(codes), codec.sample_rate, codes)
        for clip, place in zip(audio, batch, strict=True):
            name = f"{tokens.clip_id(place)}.wav"
            clip.save(folder / name)
            lines.append({"id": tokens.clip_id(place), "audio": name, "caption": tokens.captions(place)[0]})
    write_files({folder / LISTED: "".join(json.dumps(line) + "\n" for line in lines).encode()})
    return folder / LISTED


def reference(scale: Scale, clips: Path, most: int) -> Path:
    """A clip folder of the recordings of the same held-out clips, before the codec; made once."""
    folder = scale.out / f"reference-{most}"
    if not (folder / CLIPS).exists():
        tokens, places = held_out(scale, most)
        wanted = {tokens.clip_id(place) for place in places}
        records = [replace(clip, path=clip.path.resolve()) for clip in read_clip_folder(clips) if clip.id in wanted]
        if len(records) < len(wanted) or write_clip_folder(folder, records, clips.resolve(), progress=False):
            raise InputError(f"{clips} lacks sounds of {scale.tokens}; give the clips that the tokens were made of")
    return folder


def figures_of(scale: Scale, arm: str, clips: Path, most: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """What `siren evaluate` says of an arm's sounds: value, low and high of each figure; and the embeddings' hashes."""
    settings = EvaluateSettings(
        sounds(scale, arm, most),
        folder_of(scale, arm) / "evaluation.json",
        reference(scale, clips, most),
        ["aisfx", "aligner"],
        bootstrap=200,
        progress=False,
    )
    figures = evaluate(settings)["figures"]
    wanted = {label for _, label in COLUMNS.values()}
    kept = {figure["label"]: figure for figure in figures if figure["label"] in wanted}
    values = {label: {name: figure[name] for name in ("value", "low", "high")} for label, figure in kept.items()}
    return values, {figure["embedding"]: figure["identity"] for figure in kept.values()}


def _sample(scale: Scale, arm: str, tokens: TokenSet, batch: list[int], first: int) -> Tensor:
    manifest = read_manifest(checkpoint_of(scale, arm))
    prompt, mask = pad(_prompts(tokens, batch), 1)
    extra = tokens.num_codebooks - 1 if ARMS[arm].delayed else 0
    codes = (
        Sampler(manifest, "auto", "fp32", 1)
        .sample(
            prompt,
            mask,
            int(tokens.frames[batch[0]]) + extra,
            [1_000_000 + first + i for i in range(len(batch))],
            temperature=scale.temperature,
            guidance_scale=scale.guidance_scale,
        )
        .codes
    )
    return undelay(codes) if ARMS[arm].delayed else codes


def _prompts(tokens: TokenSet, places: list[int]) -> list[Prompt]:
    return [Prompt(tokens.captions(i)[0], tokens.prompt(i)) for i in places]
