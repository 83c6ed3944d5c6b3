"""Which clips, crops and captions make up a training step: a pure function of the settings, the seed and the step.

Nothing here remembers where training stands, so a run resumes at step n by asking for step n. Random numbers are raw
words of Philox (as numpy has it), whose key is derived from (seed, what they are for, where): unlike the methods of
`numpy.random.Generator`, they are the same in every version of numpy.

A step is `micro_batches` batches of `batch_size` clips, numbered over the whole world: process r of w computes the
numbers r, w + r, 2 w + r and so on. So two processes see in one pass what one process sees with accumulation over two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError

_ORDER, _CROPS, _DROPOUT, _WEIGHTS, _BUCKETS = range(5)  # what a stream of random words is for

T = TypeVar("T")


class Tokens(Protocol):
    """What training asks of a token set (siren.data.tokens.TokenSet)."""

    @property
    def frames(self) -> NDArray[Any]:
        """Length of every clip, [N]."""

    def __len__(self) -> int: ...
    def codes(self, index: int, start: int, stop: int) -> NDArray[Any]:
        """Frames start to stop of a clip, integers [num_codebooks, stop - start]."""

    def prompt(self, index: int, variant: int) -> Tensor:
        """Encoder states of one of the clip's captions, float32 [P, prompt_dim]."""

    def captions(self, index: int) -> Sequence[str] | None:
        """The clip's captions; None (the official format keeps no text) stands for one."""

    def crop_starts(self, index: int) -> NDArray[Any] | None:
        """Frames at which a crop may begin, None for any."""

    def clip_id(self, index: int) -> str: ...


@dataclass(frozen=True)
class Batch:
    """Clips side by side, padded: codes int64 [B, num_codebooks, T], prompt float32 [B, P, prompt_dim].

    prompt_mask bool [B, P] and sequence_mask bool [B, T], True = token or frame; None where nothing is padding.
    """

    codes: Tensor
    prompt: Tensor
    prompt_mask: Tensor | None
    sequence_mask: Tensor | None

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """In the order in which an expert takes them."""
        return self.codes, self.prompt, self.prompt_mask, self.sequence_mask

    def move(self, device: torch.device) -> Batch:
        """To a device; from pinned memory the copy runs beside the computation."""
        if self.codes.device == device:
            return self
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self.arguments()))  # type: ignore[arg-type]

    def pin(self) -> Batch:
        """In page-locked memory."""
        return Batch(*(None if part is None else part.pin_memory() for part in self.arguments()))  # type: ignore[arg-type]


def random_words(count: int, *key: int) -> NDArray[np.uint64]:
    """`count` random 64-bit words of the stream that the numbers of `key` name."""
    words: NDArray[np.uint64] = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return words


def dropout_seed(seed: int, expert: int, step: int, micro_batch: int) -> int:
    """Seed of the dropout of one micro-batch, 63 bits."""
    return int(random_words(1, seed, _DROPOUT, expert, step, micro_batch)[0] >> np.uint64(1))


def weight_seed(seed: int, expert: int) -> int:
    """Seed of an expert's first weights, 63 bits."""
    return int(random_words(1, seed, _WEIGHTS, expert)[0] >> np.uint64(1))


def _shuffled(count: int, *key: int) -> NDArray[np.int64]:
    return np.argsort(random_words(count, *key), kind="stable")


def _uniform(count: int, *key: int) -> NDArray[np.float64]:
    """From 0 to below 1."""
    return (random_words(count, *key) >> np.uint64(11)) * 2.0**-53


def usable(tokens: Tokens, indices: NDArray[np.int64], crop: int) -> NDArray[np.int64]:
    """Those of `indices` that have a crop to give: short clips, and long ones with a place where one may begin."""
    starts = ((i, _starts(tokens, i, crop)) for i in indices.tolist())
    return np.array([i for i, allowed in starts if allowed is None or len(allowed)], dtype=np.int64)


def _starts(tokens: Tokens, index: int, crop: int) -> NDArray[np.int64] | None:
    """Allowed starts of a crop, None for anywhere in the clip. A clip no longer than a crop is taken whole."""
    frames = int(tokens.frames[index])
    starts = tokens.crop_starts(index) if frames > crop else None
    return None if starts is None else np.asarray(starts)[np.asarray(starts) + crop <= frames]


class Batches:
    """The training steps of a run over the clips `indices`, which must be `usable`.

    Every epoch is a new order of the clips, and steps go on from one epoch into the next. With `bucket` b above 1 the
    clips of b steps in a row are sorted by length and dealt out again, so that a step's clips are of similar length.
    crop: frames; a longer clip gives a random part of that length. prompt_dropout: probability that a prompt becomes
    the null prompt of guidance, one zero token. fixed: pad to `crop` frames and, to a multiple of 16, tokens, with
    masks, so that shapes do not change (torch.compile).
    """

    def __init__(
        self,
        tokens: Tokens,
        indices: NDArray[np.int64],
        seed: int,
        batch_size: int,
        micro_batches: int,
        crop: int,
        prompt_dropout: float = 0.0,
        bucket: int = 1,
        fixed: bool = False,
    ) -> None:
        if not len(indices):
            raise InputError("there is no clip to train on")
        self.tokens, self.indices, self.seed, self.crop = tokens, indices, seed, crop
        self.batch_size, self.micro_batches, self.bucket = batch_size, micro_batches, max(1, bucket)
        self.prompt_dropout, self.fixed = prompt_dropout, fixed
        self.lengths = np.minimum(np.asarray(tokens.frames, dtype=np.int64)[indices], crop)
        self._orders: dict[int, NDArray[np.int64]] = {}

    def steps(self, epochs: float) -> int:
        """Steps until every clip was seen `epochs` times."""
        return max(1, int(np.ceil(epochs * len(self.indices) / (self.batch_size * self.micro_batches))))

    def epoch(self, step: int) -> float:
        """Epochs behind at the beginning of a step."""
        return step * self.batch_size * self.micro_batches / len(self.indices)

    def clips(self, step: int) -> NDArray[np.int64]:
        """Clips of a step, as places in `indices`: [micro_batches, batch_size]."""
        window, place = divmod(step, self.bucket)
        size = self.batch_size * self.micro_batches
        order = self._positions(window * self.bucket * size, (window + 1) * self.bucket * size)
        if self.bucket > 1:
            order = order[np.argsort(self.lengths[order], kind="stable")]
            place = int(_shuffled(self.bucket, self.seed, _BUCKETS, window)[place])
        return order[place * size : (place + 1) * size].reshape(self.micro_batches, self.batch_size)

    def frames(self, step: int) -> int:
        """Valid frames of a step, over the whole world."""
        return int(self.lengths[self.clips(step)].sum())

    def names(self, step: int, micro_batch: int) -> list[str]:
        """Ids of a micro-batch's clips."""
        return [self.tokens.clip_id(int(i)) for i in self.indices[self.clips(step)[micro_batch]]]

    def batch(self, step: int, micro_batch: int) -> Batch:
        """The clips, crops and captions of one micro-batch."""
        places = self.clips(step)[micro_batch]
        uniform = _uniform(3 * len(places), self.seed, _CROPS, step, micro_batch).reshape(-1, 3)
        picked = []
        for place, (crop, variant, dropout) in zip(places.tolist(), uniform.tolist(), strict=True):
            index, length = int(self.indices[place]), int(self.lengths[place])
            starts = _starts(self.tokens, index, self.crop)
            if starts is None:
                start = int(crop * (int(self.tokens.frames[index]) - length + 1))
            else:
                start = int(starts[int(crop * len(starts))])
            caption = int(variant * len(self.tokens.captions(index) or "?"))
            prompt = self.tokens.prompt(index, caption)
            if dropout < self.prompt_dropout:
                prompt = prompt.new_zeros(1, prompt.shape[1])
            picked.append((self.tokens.codes(index, start, start + length), prompt))
        return collate(picked, self.crop if self.fixed else 0)

    def _positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Places start to stop of the epochs' orders, one after another."""
        count = len(self.indices)
        parts = []
        for epoch in range(start // count, -(-stop // count)):
            first = epoch * count
            parts.append(self._order(epoch)[max(0, start - first) : stop - first])
        return np.concatenate(parts)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = self._orders.get(epoch)
        if order is None:
            order = _shuffled(len(self.indices), self.seed, _ORDER, epoch)
            # The loop and the threads that fetch are at most two epochs apart, unless an epoch is shorter than a step.
            self._orders = dict(list(self._orders.items())[-3:]) | {epoch: order}
        return order


def fixed_batches(
    tokens: Tokens, indices: NDArray[np.int64], batch_size: int, crop: int, fixed: bool = False
) -> list[Callable[[], Batch]]:
    """Validation: every clip once, its first allowed crop, its first caption; clips of similar length side by side."""
    lengths = np.minimum(np.asarray(tokens.frames, dtype=np.int64)[indices], crop)
    ordered = indices[np.argsort(-lengths, kind="stable")].tolist()

    def make(clips: list[int]) -> Batch:
        picked = []
        for index in clips:
            starts = _starts(tokens, index, crop)
            start = 0 if starts is None or not len(starts) else int(starts[0])
            stop = min(start + crop, int(tokens.frames[index]))
            picked.append((tokens.codes(index, start, stop), tokens.prompt(index, 0)))
        return collate(picked, crop if fixed else 0)

    parts = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return [lambda clips=part: make(clips) for part in parts]  # type: ignore[misc]


def collate(clips: Sequence[tuple[NDArray[Any], Tensor]], fixed_frames: int = 0) -> Batch:
    """Pad (codes [num_codebooks, T], prompt [P, prompt_dim]) pairs to one batch.

    fixed_frames above 0: exactly so many frames, a multiple of 16 tokens, and masks in any case.
    """
    batch, codebooks, width = len(clips), len(clips[0][0]), clips[0][1].shape[1]
    frames = np.array([codes.shape[1] for codes, _ in clips])
    tokens = np.array([len(prompt) for _, prompt in clips])
    longest = fixed_frames or int(frames.max())
    most = -(-int(tokens.max()) // 16) * 16 if fixed_frames else int(tokens.max())
    codes = np.zeros((batch, codebooks, longest), dtype=np.int64)
    prompt = torch.zeros(batch, most, width)
    for row, (clip, states) in enumerate(clips):
        codes[row, :, : clip.shape[1]] = clip
        prompt[row, : len(states)] = states
    masks = []
    for lengths, size in ((tokens, most), (frames, longest)):
        mask = np.arange(size) < lengths[:, None]
        masks.append(torch.from_numpy(mask) if fixed_frames or not mask.all() else None)
    return Batch(torch.from_numpy(codes), prompt, *masks)


def prefetch(jobs: Iterable[Callable[[], T]], ahead: int) -> Generator[T, None, None]:
    """The results of `jobs` in order, up to `ahead` of them made beforehand by a thread (0: when asked for)."""
    if not ahead:
        for job in jobs:
            yield job()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="siren-batches") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
