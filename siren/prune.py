"""Prefix pruning: begin more sounds than are wanted, let a critic score the beginnings, and finish the best.

For each prompt N prefixes of t frames are sampled and K of them go on to T frames: N t + K (T - t) frames in all. A
sequence's noise depends on nothing but its seed, so a kept sound is bit for bit what its seed gives without pruning.
See `generate(..., prune=)`. Left out: several stages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

from torch import Tensor

from .codec import MAX_SECONDS, Codec
from .errors import InputError, SamplingError
from .rerank import highest_first
from .sampler import Session
from .sampling import renumber


class Scorer(Protocol):
    """What scores prefixes: a siren.critic.Critic, or anything with its two methods."""

    def score(self, codes: Tensor, prompt: Tensor, prompt_mask: Tensor, /) -> Tensor:
        """One number for each sound that begins so, [B]: codes [B, C, t], prompt [B, P, prompt_dim], mask [B, P]."""

    def check(self, codec: Codec, prompt_dim: int, /) -> None:
        """Raise InputError if it cannot score what this codec's codes or prompts of this width make."""


@dataclass(frozen=True)
class Pruning:
    """Of each prompt's `prefixes` sounds of `prefix_seconds`, the `keep` with the best scores are finished.

    Raises InputError for values out of range.
    """

    critic: Scorer
    prefixes: int = 10
    prefix_seconds: float = 1.0
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("prefixes", "keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.keep > self.prefixes:
            raise InputError(f"keep is {self.keep}, more than the {self.prefixes} prefixes there are")
        seconds = self.prefix_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds <= MAX_SECONDS:
            raise InputError(f"prefix_seconds must be a number above 0 and at most {MAX_SECONDS}, not {seconds!r}")
        for name in ("score", "check"):
            if not callable(getattr(self.critic, name, None)):
                raise InputError(f"the critic must be a siren.critic.Critic, or have its {name}, not {self.critic!r}")

    def prefix_frames(self, frame_rate: float) -> int:
        """Frames of a prefix, at least 1, at `frame_rate` frames a second."""
        return max(1, round(self.prefix_seconds * frame_rate))

    def check(self, codec: Codec, prompt_dim: int, frames: int, count: int, most: int) -> None:
        """Raise InputError unless `count` sounds a prompt of `frames` frames can be had by it, `most` at once."""
        if count != self.keep:
            raise InputError(
                f"num_return_sequences is {count} and the pruning keeps {self.keep} sounds of each prompt: make them "
                "the same"
            )
        if self.prefixes > most:
            raise InputError(f"{self.prefixes} prefixes of a prompt are sampled together; batch_size is {most}")
        self._prefix_of(frames, codec.sample_rate / codec.hop_length)
        self.critic.check(codec, prompt_dim)

    def sample(
        self,
        session: Session,
        prompt: Tensor,
        prompt_mask: Tensor,
        frames: int,
        frame_rate: float,
        on_frame: Callable[[int, int], None] | None = None,
    ) -> list[int]:
        """Take a session at frame 0, `prefixes` sequences for each prompt side by side, to `frames` frames of the best.

        prompt [B, P, prompt_dim] and prompt_mask [B, P] are those it was started with. Returns which of its sequences
        are left, those of a prompt side by side, the best prefix first. Raises SamplingError with the number that the
        sequence began with; InputError if the critic does not give a number for each sequence.
        """
        prefix = self._prefix_of(frames, frame_rate)
        session.step(prefix, on_frame)
        found = self.critic.score(session.codes, prompt, prompt_mask)
        if not isinstance(found, Tensor) or found.shape != (session.batch,):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the critic must give a tensor [{session.batch}] of scores, not {shape}")
        scores = found.tolist()
        kept = highest_first(scores, self.prefixes, self.keep)
        session.select(kept)
        if prefix < frames:
            try:
                session.step(frames - prefix, on_frame)
            except SamplingError as error:
                raise SamplingError(renumber(str(error), kept)) from error
        return kept

    def _prefix_of(self, frames: int, frame_rate: float) -> int:
        prefix = self.prefix_frames(frame_rate)
        if prefix > frames:
            raise InputError(f"a prefix of {prefix} frames is longer than the sound, which has {frames}")
        return prefix
