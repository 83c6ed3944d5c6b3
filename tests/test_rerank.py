"""Best of N: clips change places within their prompt only, the best first, and carry their scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from siren.audio import Audio
from siren.errors import InputError
from siren.rerank import best_first


def make(count: int, prompts: list[str]) -> Audio:
    """Clips whose first code is their number."""
    codes = torch.zeros(count * len(prompts), 12, 4, dtype=torch.int64)
    codes[:, 0, 0] = torch.arange(len(codes))
    texts = [text for text in prompts for _ in range(count)]
    return Audio(
        torch.rand(len(codes), 1, 1280), 16000, codes, codes.float(), texts, seeds=list(range(7, 7 + len(codes)))
    )


def test_each_prompts_clips_are_sorted() -> None:
    """Ties stay as they were, clips without a score come last, and sound, codes and prompts move together."""
    audio = make(4, ["rain", "wind"])
    given: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[np.ndarray], **more: Any) -> list[float | None]:
        given.update(more, prompts=prompts, completions=completions)
        return [0.1, None, 0.7, 0.1, float("nan"), -2.0, 5.0, math.inf]

    ranked = best_first(audio, 4, reward)
    assert ranked.codes[:, 0, 0].tolist() == [2, 0, 3, 1, 7, 6, 5, 4]
    assert ranked.prompts == audio.prompts == given["prompts"]
    assert ranked.scores[:3] == [0.7, 0.1, 0.1] and math.isnan(ranked.scores[3])
    for place, clip in enumerate([2, 0, 3, 1, 7, 6, 5, 4]):
        assert torch.equal(ranked.waveform[place], audio.waveform[clip])
        assert torch.equal(ranked[place].logprobs[0], audio.logprobs[clip])
        assert ranked[place].seeds == [7 + clip]
        assert np.array_equal(given["completions"][clip], audio.waveform[clip, 0].numpy())
    assert given["sample_rate"] == 16000
    assert given["codes"].shape == (8, 12, 4)


@pytest.mark.parametrize("answer", [[1.0], [1.0] * 3, ["loud"] * 2])
def test_an_answer_that_is_no_list_of_scores(answer: list[Any]) -> None:
    with pytest.raises(InputError, match="rerank"):
        best_first(make(2, ["rain"]), 2, lambda *_, **__: answer)


def test_scores_stay_with_their_clips() -> None:
    ranked = best_first(make(3, ["rain"]), 3, lambda prompts, *_, **__: [1.0, 3.0, 2.0])
    assert ranked.scores == [3.0, 2.0, 1.0]
    assert ranked[0].scores == [3.0]
    assert ranked[1:].scores == [2.0, 1.0]


@pytest.mark.parametrize("answer", [None, 0.5, [10**400, 1]])
def test_answers_that_rank_nothing(answer: Any) -> None:
    """A function that forgot to return, one number for all, one too large."""
    with pytest.raises(InputError, match="rerank"):
        best_first(make(2, ["rain"]), 2, lambda *_, **__: answer)


def test_a_reward_that_writes_into_its_arguments() -> None:
    audio = make(2, ["rain"])
    before = audio.waveform.clone(), audio.codes.clone()

    def reward(prompts: list[str], completions: list[np.ndarray], codes: np.ndarray, **_: Any) -> list[float]:
        for wave in completions:
            wave *= 0
        codes[:] = 0
        return [2.0, 1.0]

    ranked = best_first(audio, 2, reward)
    assert torch.equal(ranked.waveform, before[0]) and torch.equal(ranked.codes, before[1])


def test_the_lowest_score_is_before_none() -> None:
    ranked = best_first(make(3, ["rain"]), 3, lambda *_, **__: [None, -math.inf, 0.0])
    assert ranked.codes[:, 0, 0].tolist() == [2, 1, 0]
