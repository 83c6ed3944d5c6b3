"""The prompts of an alignment: captions of a token set as texts and encoder states, in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..train.batches import random_words

_ORDER, _ROLLOUTS, _HELD_OUT = range(100, 103)  # what a stream of random words is for; training has the numbers below


@dataclass(frozen=True)
class Prompt:
    """`states` float32 [P, prompt_dim] of the text."""

    text: str
    states: Tensor


class PromptSet:
    """Different captions of the clips `indices` of a token set.

    Raises InputError if there is none: the official format keeps no texts, and a reward needs them.
    """

    def __init__(self, tokens: Any, indices: NDArray[np.int64], without: PromptSet | None = None) -> None:
        self.tokens = tokens
        self.places: dict[str, tuple[int, int]] = {}
        for index in indices.tolist():
            for variant, text in enumerate(tokens.captions(index) or ()):
                if without is None or text not in without.places:
                    self.places.setdefault(text, (index, variant))
        if not self.places and without is None:
            raise InputError(f"{tokens.path} has no captions to align on; tokenize clips with captions")
        self.texts = list(self.places)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, place: int) -> Prompt:
        text = self.texts[place]
        return Prompt(text, self.tokens.prompt(*self.places[text]))

    def of_step(self, step: int, count: int, seed: int) -> list[Prompt]:
        """The `count` prompts of a step. Every epoch has all of them once, in a new order."""
        size = len(self.texts)
        places = []
        for i in range(step * count, (step + 1) * count):
            epoch, place = divmod(i, size)
            places.append(int(self._order(epoch, seed)[place]))
        return [self[place] for place in places]

    def some(self, count: int) -> list[Prompt]:
        """Always the same `count` of them, or all if there are fewer."""
        order = np.argsort(random_words(len(self.texts), _HELD_OUT), kind="stable")
        return [self[place] for place in order[:count].tolist()]

    def _order(self, epoch: int, seed: int) -> NDArray[np.int64]:
        return np.argsort(random_words(len(self.texts), seed, _ORDER, epoch), kind="stable")


def rollout_seeds(count: int, *key: int) -> list[int]:
    """Seeds of `count` rollouts of one prompt, 64 bits each."""
    return [int(word) for word in random_words(count, _ROLLOUTS, *key)]


def pad(prompts: Sequence[Prompt], copies: int) -> tuple[Tensor, Tensor]:
    """prompt [N, P, prompt_dim] and prompt_mask [N, P] of `copies` rows for each prompt, side by side."""
    longest = max(len(prompt.states) for prompt in prompts)
    states = torch.zeros(len(prompts), longest, prompts[0].states.shape[1])
    for row, prompt in zip(states, prompts, strict=True):
        row[: len(prompt.states)] = prompt.states
    lengths = torch.tensor([len(prompt.states) for prompt in prompts])
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    return states.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
