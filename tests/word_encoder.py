"""A stand-in for the prompt encoder: each word has a random vector. No package, no time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from siren.errors import InputError


class WordEncoder:
    """Token states of the words of a text, with `PromptEncoder`'s names."""

    def __init__(self, dim: int = 12, identity: str = "words") -> None:
        self.dim, self.identity = dim, identity

    def __call__(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if not all(prompt.split() for prompt in prompts):
            raise InputError("the prompt is empty")
        rows = [torch.stack([self._word(word) for word in prompt.split()]) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.arange(int(lengths.max())) < lengths[
            :, None
        ]

    def _word(self, word: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(self.dim)).float()
