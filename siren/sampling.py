"""The sampling contract in plain PyTorch and NumPy: counter-based noise and the draw of one code.

Every backend draws the same code from the same logits. Noise is a function of (seed, frame, codebook, code) alone, so
it does not depend on the batch, on the position in it, or on what was drawn before. The code is the argmax over the
allowed v of logit_v / temperature + gumbel_v, which draws v with probability softmax(logits / temperature)_v.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .errors import InputError, SamplingError

_WORD = np.uint64(0xFFFFFFFF)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MIN_TEMPERATURE = 1e-6  # below, logits / temperature could overflow float32


@dataclass(frozen=True)
class SamplingSettings:
    """How codes are drawn.

    temperature 0 is greedy (the lowest index wins a tie). top_k keeps the k largest logits (0: all; the lower index
    wins a tie), then top_p the smallest set of most probable codes whose probability reaches p. guidance_scale s
    draws from uncond + s * (cond - uncond); 1 is no guidance. Raises InputError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "guidance_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, not {value!r}")
            object.__setattr__(self, name, float(value))
        if self.temperature != 0 and not self.temperature >= _MIN_TEMPERATURE:
            raise InputError(f"temperature must be 0 or at least {_MIN_TEMPERATURE}, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, (int, np.integer)) or self.top_k < 0:
            raise InputError(f"top_k must be a whole number from 0, not {self.top_k!r}")
        object.__setattr__(self, "top_k", int(self.top_k))

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1


def expand_seeds(seed: int | Sequence[int] | NDArray[np.integer] | Tensor, batch: int) -> NDArray[np.uint64]:
    """Seeds [batch], uint64: an integer s gives sequence i the seed s + i, a list gives one each.

    Raises InputError unless all are whole numbers from 0 to 2^64 - 1.
    """
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    try:
        if isinstance(seed, (Sequence, np.ndarray)) and not isinstance(seed, (str, bytes)):
            values = [_whole(value) for value in seed]
        else:
            first = _whole(seed)
            values = list(range(first, first + batch))
    except TypeError as error:
        raise InputError(f"seed must be a whole number or a list of them, not {seed!r}") from error
    if len(values) != batch:
        raise InputError(f"seed lists {len(values)} values for {batch} sequences; give one each, or one number")
    if min(values) < 0 or max(values) >= 1 << 64:
        raise InputError(f"seeds must be from 0 to 2^64 - 1, got {min(values)} to {max(values)}")
    return np.array(values, dtype=np.uint64)


def _whole(value: object) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


def philox4x32(counter: Sequence[ArrayLike], key: Sequence[ArrayLike]) -> tuple[NDArray[np.uint64], ...]:
    """Philox4x32-10 (Salmon et al. 2011): four counter words and two key words that broadcast -> four words.

    Words are 32-bit values in uint64 arrays.
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _WORD, (product0 >> 32) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def gumbel_noise(seeds: NDArray[np.uint64], frames: ArrayLike, codebooks: ArrayLike, codebook_size: int) -> Tensor:
    """Gumbel noise of sequences at their frames: float32 [B, n, codebook_size] on the CPU.

    seeds [B]; frames [B] or one number; codebooks [n]. Key = the seed (low word first), counter =
    (frame, codebook, v // 4, 0), word v % 4, u = ((word >> 8) + 0.5) * 2^-24, noise = -log(-log(u)). All in float64
    and then rounded: in float32 the largest u would round up to 1 and its noise be infinite.
    """
    seeds = seeds[:, None, None]
    frame = np.asarray(frames, dtype=np.uint64).reshape(-1, 1, 1)
    codebook = np.asarray(codebooks, dtype=np.uint64)[None, :, None]
    quad = np.arange(-(-codebook_size // 4), dtype=np.uint64)
    words = philox4x32((frame, codebook, quad, 0), (seeds & _WORD, seeds >> np.uint64(32)))
    shape = np.broadcast_shapes(seeds.shape, frame.shape, codebook.shape, quad.shape)
    uniform = np.empty((*shape, 4))
    for i, word in enumerate(words):
        uniform[..., i] = word >> np.uint64(8)
    uniform += 0.5
    uniform *= 2.0**-24
    noise = -np.log(-np.log(uniform))
    return torch.from_numpy(noise.reshape(*shape[:2], -1)[..., :codebook_size].astype(np.float32))


def guide(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Combine guided rows: [2B, V], conditional rows first -> [B, V]. Without guidance [B, V] comes back as it is."""
    if not settings.guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + settings.guidance_scale * (conditional - unconditional)


def draw(
    logits: Tensor,
    noise: Tensor | None,
    settings: SamplingSettings,
    frame: ArrayLike | None = None,
    codebook: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one code a row: logits and noise float32 [B, V] -> codes int64 [B], log-probabilities float32 [B].

    Noise is not read at temperature 0. Log-probabilities are the log-softmax of logits / temperature (of the logits
    at temperature 0), before top_k and top_p. `frame` (one, or [B]) and `codebook` are named in the SamplingError
    that is raised for a row with NaN, plus infinity or no finite value.
    """
    scaled = _scale(logits, settings, frame, codebook)
    if settings.temperature == 0:
        codes = scaled.argmax(dim=-1)
    else:
        assert noise is not None, "noise is needed at temperatures above 0"
        scores = scaled + noise
        if settings.top_k or settings.top_p < 1:
            scores = scores.masked_fill(~_allowed(scaled, settings), -math.inf)
        codes = scores.argmax(dim=-1)
    return codes, _gather(scaled, codes)


def log_probability(
    logits: Tensor,
    codes: Tensor,
    settings: SamplingSettings,
    frame: ArrayLike | None = None,
    codebook: int | None = None,
) -> Tensor:
    """What `draw` would report for these codes [B], had it drawn them: float32 [B]."""
    return _gather(_scale(logits, settings, frame, codebook), codes)


def _gather(scaled: Tensor, codes: Tensor) -> Tensor:
    return torch.log_softmax(scaled, dim=-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)


def _scale(logits: Tensor, settings: SamplingSettings, frame: ArrayLike | None, codebook: int | None) -> Tensor:
    scaled = logits / settings.temperature if settings.temperature else logits
    finite = scaled.amax(dim=-1).isfinite()  # the maximum is NaN or infinite wherever the row cannot be drawn from
    if bool(finite.all()):
        return scaled
    row = int((~finite).nonzero()[0])
    if frame is not None:
        frame = int(np.broadcast_to(np.asarray(frame), (len(logits),))[row])
    raise _undrawable(row, frame, codebook)


def check_drawn(logprobs: Tensor, frame: int | NDArray[np.int64]) -> None:
    """Raise SamplingError if one of a frame's log-probabilities [B, num_codebooks] is NaN: the kernels' mark for
    logits that hold NaN, plus infinity or no finite value. frame: one, or [B]."""
    bad = logprobs.isnan()
    if bool(bad.any()):
        codebook, row = (int(index) for index in bad.T.nonzero()[0])  # the first draw that failed, then the first row
        raise _undrawable(row, int(np.broadcast_to(frame, (len(logprobs),))[row]), codebook)


def _undrawable(row: int, frame: int | None, codebook: int | None) -> SamplingError:
    places = (("sequence", row), ("frame", frame), ("codebook", codebook))
    where = ", ".join(f"{name} {number}" for name, number in places if number is not None)
    return SamplingError(f"the logits of {where} hold NaN, infinity or no finite value: check weights and prompt")


def renumber(message: str, numbers: Sequence[int]) -> str:
    """A SamplingError's message about sequence i as one about sequence numbers[i]."""
    return re.sub(r"\bsequence (\d+)", lambda match: f"sequence {numbers[int(match[1])]}", message, count=1)


def _allowed(scaled: Tensor, settings: SamplingSettings) -> Tensor:
    """Codes that top_k and top_p leave, bool [B, V]."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if settings.top_k:
        keep[:, settings.top_k :] = False
    if settings.top_p < 1:
        weight = (ordered - ordered[:, :1]).double().exp() * keep  # float64: backends must agree on the boundary
        reached = weight.cumsum(dim=-1)
        keep[:, 1:] &= reached[:, :-1] < settings.top_p * reached[:, -1:]
    return torch.zeros_like(keep).scatter(-1, order, keep)
