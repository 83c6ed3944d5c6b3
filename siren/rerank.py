"""Best of N: the clips of each prompt in the order of their scores (the paper's reject sampling)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .audio import Audio
from .errors import InputError

# f(prompts, completions, sample_rate=, codes=) -> a number for each sound, or None; see siren.align.rewards.
Reward = Callable[..., Sequence[float | None]]


def highest_first(scores: Sequence[float], size: int, keep: int) -> list[int]:
    """Places of the `keep` highest scores of each `size` in a row, the highest first.

    Of equal ones the earlier place is first, and NaN comes after everything else.
    """
    ranks = [(math.isnan(score), -score) for score in scores]
    groups = (range(first, first + size) for first in range(0, len(scores), size))
    return [place for group in groups for place in sorted(group, key=ranks.__getitem__)[:keep]]


def best_first(audio: Audio, count: int, reward: Reward) -> Audio:
    """The same clips with `scores`, each `count` in a row sorted: the highest score first, equal ones as they were.

    reward(prompts, completions, sample_rate=, codes=) is called once, with copies: completions are float32 [samples],
    codes int64 [N, codebooks, T]. A clip without a score (None or NaN) comes last. Raises InputError if it does not
    give a number or None for every clip.
    """
    waves = [wave.numpy() for wave in audio.waveform[:, 0].clone()]
    found = reward(list(audio.prompts), waves, sample_rate=audio.sample_rate, codes=audio.codes.clone().numpy())
    try:
        scores = [math.nan if value is None else float(value) for value in found]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"rerank must give a list with a number or None for each clip ({error})") from error
    if len(scores) != len(audio):
        raise InputError(f"rerank gave {len(scores)} scores for {len(audio)} clips")
    order = highest_first(scores, count, count)
    picked = torch.tensor(order)
    return Audio(
        audio.waveform[picked],
        audio.sample_rate,
        audio.codes[picked],
        None if audio.logprobs is None else audio.logprobs[picked],
        [audio.prompts[i] for i in order],
        [scores[i] for i in order],
        [audio.seeds[i] for i in order] if audio.seeds else [],
    )
