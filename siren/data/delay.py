"""The delay pattern: MusicGen's order of the codes, as a token set for a model of one transformer without decoder.

Copet et al., "Simple and Controllable Music Generation", NeurIPS 2023, section 2.1. Codebook j is shifted by j frames,
so that what a frame's deeper codebooks depend on was said in frames before. The pattern is in the data alone: any
sampler draws such a model, with num_codebooks - 1 frames more than wanted, and `undelay` puts the codes in order.
Places that no code reaches hold code 0; MusicGen has a token of its own there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint import replace_folder
from ..errors import DataError, InputError
from .shards import Clip, pack_shard
from .tokens import MANIFEST, TokenSet, read_manifest


def delay(codes: NDArray[np.integer]) -> NDArray[np.integer]:
    """codes [num_codebooks, T] -> [num_codebooks, T + num_codebooks - 1]; frame t of codebook j is at t + j."""
    count, frames = codes.shape
    delayed = np.zeros((count, frames + count - 1), codes.dtype)
    for j in range(count):
        delayed[j, j : j + frames] = codes[j]
    return delayed


def undelay(codes: Tensor) -> Tensor:
    """The inverse of `delay`, of a batch: [B, num_codebooks, T + num_codebooks - 1] -> [B, num_codebooks, T].

    Raises InputError if there are not at least num_codebooks frames.
    """
    count, frames = codes.shape[1], codes.shape[2] - codes.shape[1] + 1
    if frames < 1:
        raise InputError(f"codes of {count} codebooks must have at least {count} frames, not {codes.shape[2]}")
    return torch.stack([codes[:, j, j : j + frames] for j in range(count)], dim=1)


def delay_tokens(source: str | Path, target: str | Path) -> Path:
    """Write the token set `source` to the folder `target` with delayed codes; everything else stays as it is.

    The whole set is one shard, held in memory. Crop starts and the reserve are not taken over. Raises DataError for a
    source that is no token set, and for a target that is anything else.
    """
    tokens, target = TokenSet(source), Path(target).expanduser()
    values = read_manifest(tokens.path)
    clips = [
        Clip(
            tokens.clip_id(i),
            delay(tokens.codes(i)).T,
            tokens.captions(i),
            [tokens.prompt(i, variant).numpy() for variant in range(len(tokens.captions(i)))],
            *(tokens.label(i), tokens.licence(i), tokens.source(i), tokens.score(i)),
        )
        for i in range(len(tokens))
    ]
    data = pack_shard(clips, tokens.codebook_size)
    frames = sum(len(clip.codes) for clip in clips)
    shard = {"file": "shard-00000.safetensors", "clips": len(clips), "frames": frames}
    values |= {"clips": len(clips), "frames": frames, "reserve": [], "delayed": True}
    values["shards"] = [shard | {"sha256": hashlib.sha256(data).hexdigest()}]

    def write(folder: Path) -> None:
        (folder / shard["file"]).write_bytes(data)  # type: ignore[operator]
        (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    replace_folder(target, MANIFEST, _check_replaceable, write)
    return target


def _check_replaceable(target: Path) -> None:
    if target.exists() and not read_manifest(target).get("delayed"):
        raise DataError(f"{target} holds a token set that is not delayed; choose another folder")
