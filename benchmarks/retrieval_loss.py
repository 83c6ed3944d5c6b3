"""The loss of every codebook on clips that training did not see, with their prompts and with those of other clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import siren
from siren.data.official import OfficialTokens
from siren.data.tokens import TokenSet, split
from siren.errors import InputError

_FRAMES = 300  # 6 s, the default crop of `siren train`
_BATCH = 16
_MOST = 512  # clips


@torch.inference_mode()
def held_out_loss(model: siren.Siren, tokens: TokenSet | OfficialTokens, val_fraction: float) -> dict[str, Any]:
    """Cross-entropy in nats of every codebook, a mean over the first 6 s of the validation clips, at most 512.

    `shuffled` is the same with the prompt of a clip of another class (or with other captions): what the prompt tells is
    the difference. Raises InputError if there are not two such clips.
    """
    _, held_out = split(tokens, val_fraction)
    clips = [int(i) for i in held_out[:: -(-len(held_out) // _MOST) or 1]]
    others = [other_clip(tokens, clips, i) for i in range(len(clips))]
    frames = min(_FRAMES, model.config.max_seq_len)
    result: dict[str, Any] = {"clips": len(clips)}
    for name, prompts in (("own", clips), ("shuffled", others)):
        total, count = torch.zeros(tokens.num_codebooks, dtype=torch.float64), 0
        for first in tqdm(range(0, len(clips), _BATCH), desc=f"loss, {name} prompts", disable=None):
            rows = slice(first, first + _BATCH)
            codes, mask = pad_codes([tokens.codes(i, 0, min(frames, int(tokens.frames[i]))) for i in clips[rows]])
            prompt, prompt_mask = pad_prompts(
                [tokens.prompt(i, 0)[: model.config.max_prompt_len] for i in prompts[rows]]
            )
            seen = int(mask.sum())
            total += model.loss(codes, prompt, prompt_mask, mask).flatten().double() * seen
            count += seen
        result[name] = (total / count).tolist()
        result["frames"] = count
    return result


def other_clip(tokens: TokenSet | OfficialTokens, clips: Sequence[int], position: int) -> int:
    """The next of `clips` that is of another class, or where classes are not known shares no caption."""
    own, label = clips[position], tokens.label(clips[position])
    for step in range(1, len(clips)):
        other = clips[(position + step) % len(clips)]
        same = (
            tokens.label(other) == label if label else not set(tokens.captions(own)).isdisjoint(tokens.captions(other))
        )
        if not same:
            return other
    raise InputError(f"{tokens.path}: the validation clips are too few, or all of one class; raise --val-fraction")


def pad_codes(codes: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, codebooks, T] int64 and their mask [B, T] bool of codes [codebooks, T_b]."""
    longest = max(rows.shape[1] for rows in codes)
    padded = [np.pad(rows, ((0, 0), (0, longest - rows.shape[1]))) for rows in codes]
    mask = torch.tensor([[t < rows.shape[1] for t in range(longest)] for rows in codes])
    return torch.from_numpy(np.stack(padded)).long(), mask


def pad_prompts(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, P, prompt_dim] and its mask [B, P] bool of prompts [P_b, prompt_dim]."""
    mask = [torch.ones(len(prompt), dtype=torch.bool) for prompt in prompts]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(list(prompts), batch_first=True), pad(mask, batch_first=True)
