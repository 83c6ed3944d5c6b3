"""Batches are a function of the settings and the step alone, hold every clip once an epoch, and crop where they may."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siren.errors import InputError
from siren.train.batches import (
    Batch,
    Batches,
    Tokens,
    collate,
    dropout_seed,
    fixed_batches,
    prefetch,
    random_words,
    usable,
    weight_seed,
)
from siren.train.schedule import learning_rate


class ToyTokens:
    """Clip i has the codes 100 i + frame in every codebook, and i % 3 + 1 captions whose states hold their number."""

    def __init__(self, frames: Sequence[int], starts: dict[int, list[int]] | None = None) -> None:
        self.frames = np.array(frames)
        self.starts = starts or {}

    def __len__(self) -> int:
        return len(self.frames)

    def codes(self, index: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.frames[index]
        return np.tile(np.arange(start, stop, dtype=np.int16) + 100 * index, (12, 1))

    def captions(self, index: int) -> list[str] | None:
        return None if index == 0 else ["caption"] * (index % 3 + 1)

    def prompt(self, index: int, variant: int) -> torch.Tensor:
        assert 0 <= variant <= (index % 3 if index else 0)
        return torch.full((index % 4 + 1, 5), 1.0 + variant)

    def crop_starts(self, index: int) -> np.ndarray | None:
        return np.array(self.starts[index]) if index in self.starts else None

    def clip_id(self, index: int) -> str:
        return f"clip-{index}"


def make(tokens: Tokens, batch_size: int = 4, micro_batches: int = 2, crop: int = 6, **options: object) -> Batches:
    indices = usable(tokens, np.arange(len(tokens)), crop)
    return Batches(tokens, indices, 7, batch_size, micro_batches, crop, **options)  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    pairs = zip(a.arguments(), b.arguments(), strict=True)
    return all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


LENGTHS = [3, 9, 1, 6, 20, 7, 2, 12, 5, 6, 31]


def test_random_words_stay_what_they_are() -> None:
    """The streams that runs and their states rely on: these numbers may never change."""
    assert random_words(2, 7, 1, 3).tolist() == [16242344006293646974, 17067495578922004301]
    assert (dropout_seed(1, 2, 3, 4), weight_seed(1, 2)) == (509244260593679033, 9004634794590092311)


@pytest.mark.parametrize("bucket", [1, 3])
def test_a_batch_does_not_depend_on_what_was_asked_before(bucket: int) -> None:
    """In any order, from another object, and again."""
    tokens = ToyTokens(LENGTHS)
    forward, backward = make(tokens, bucket=bucket, prompt_dropout=0.3), make(tokens, bucket=bucket, prompt_dropout=0.3)
    places = [(step, number) for step in range(13) for number in range(2)]
    first = {place: forward.batch(*place) for place in places}
    for place in reversed(places):
        assert same(first[place], backward.batch(*place)), place
        assert same(first[place], forward.batch(*place)), place
    assert not all(same(first[step, 0], first[step, 1]) for step in range(13))
    other = Batches(tokens, np.arange(len(tokens)), 8, 4, 2, 6)
    assert any(not same(make(tokens).batch(step, 0), other.batch(step, 0)) for step in range(3))


@given(
    st.integers(1, 40), st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99)
)
def test_every_epoch_holds_every_clip_once(
    clips: int, batch_size: int, micro_batches: int, bucket: int, windows: int, seed: int
) -> None:
    """Counted over whole windows of `bucket` steps, no two clips differ by more than one showing."""
    tokens = ToyTokens(np.random.default_rng(seed).integers(1, 30, clips).tolist())
    batches = Batches(tokens, np.arange(clips), seed, batch_size, micro_batches, 8, bucket=bucket)
    shown: Counter[int] = Counter(dict.fromkeys(range(clips), 0))
    for step in range(windows * bucket):
        picked = batches.clips(step)
        assert picked.shape == (micro_batches, batch_size)
        shown.update(picked.flatten().tolist())
        assert batches.frames(step) == sum(min(int(tokens.frames[i]), 8) for i in picked.flatten())
        assert batches.names(step, 0) == [f"clip-{i}" for i in picked[0]]
    assert max(shown.values()) - min(shown.values()) <= 1
    total = batches.steps(2)
    assert (total - 1) * batch_size * micro_batches < 2 * clips <= total * batch_size * micro_batches
    assert batches.epoch(total) >= 2


def test_epochs_are_in_different_orders() -> None:
    batches = make(ToyTokens([2] * 64), batch_size=32)
    assert batches.clips(0).flatten().tolist() != batches.clips(1).flatten().tolist()


def test_buckets_put_clips_of_similar_length_together() -> None:
    """Less padding than without, and the clips of a window stay the window's."""
    lengths = np.random.default_rng(3).integers(1, 60, 64).tolist()
    plain, sorted_ = (make(ToyTokens(lengths), batch_size=8, micro_batches=1, crop=60, bucket=b) for b in (1, 8))
    padded = [sum(b.batch(step, 0).codes.shape[2] * 8 for step in range(8)) for b in (plain, sorted_)]
    assert padded[1] < 0.75 * padded[0]
    shown = [sorted(np.concatenate([b.clips(step).flatten() for step in range(8)])) for b in (plain, sorted_)]
    assert shown[0] == shown[1]


def test_crops_begin_wherever_they_may_and_nowhere_else() -> None:
    """Anywhere in a long clip, at the allowed starts if there are some; a short clip is whole."""
    tokens = ToyTokens([3, 9, 40, 6], {2: [0, 5, 33, 34, 35, 39], 3: []})
    batches = make(tokens, batch_size=4, micro_batches=1)
    found: dict[int, set[int]] = {}
    for step in range(120):
        batch = batches.batch(step, 0)
        for row, clip in enumerate(batches.clips(step)[0].tolist()):
            mask = batch.sequence_mask
            codes = batch.codes[row, :, : int(mask[row].sum())] if mask is not None else batch.codes[row]
            start = int(codes[0, 0]) - 100 * clip
            found.setdefault(clip, set()).add(start)
            expected = tokens.codes(clip, start, start + min(6, int(tokens.frames[clip])))
            np.testing.assert_array_equal(codes.numpy(), expected)
    assert found == {0: {0}, 1: {0, 1, 2, 3}, 2: {0, 5, 33, 34}, 3: {0}}


def test_a_long_clip_without_an_allowed_crop_is_left_out() -> None:
    tokens = ToyTokens([9, 9, 5, 9], {0: [4], 1: [], 2: [], 3: [3]})
    assert usable(tokens, np.arange(4), 6).tolist() == [2, 3]
    assert usable(tokens, np.array([3, 1]), 5).tolist() == [3]
    with pytest.raises(InputError, match="no clip"):
        Batches(tokens, usable(tokens, np.array([1]), 6), 0, 2, 1, 6)


def test_captions_and_dropped_prompts() -> None:
    """Every caption is used; a dropped prompt is the null prompt of guidance, one zero token that counts as one."""
    tokens = ToyTokens([4] * 12)
    batches, always, some = (make(tokens, prompt_dropout=p) for p in (0.0, 1.0, 0.25))
    captions: dict[int, set[float]] = {}
    nulls = 0
    for step in range(100):
        batch, clips = batches.batch(step, 0), batches.clips(step)[0].tolist()
        for row, clip in enumerate(clips):
            captions.setdefault(clip, set()).add(float(batch.prompt[row, 0, 0]))
            length = clip % 4 + 1 if batch.prompt_mask is None else int(batch.prompt_mask[row].sum())
            assert length == clip % 4 + 1 and not batch.prompt[row, length:].any()
        empty = always.batch(step, 0)
        assert empty.prompt.shape == (4, 1, 5) and not empty.prompt.any() and empty.prompt_mask is None
        mixed = some.batch(step, 0)
        nulls += int((mixed.prompt[:, 0, 0] == 0).sum())
        for row in (mixed.prompt[:, 0, 0] == 0).nonzero().flatten().tolist():
            assert mixed.prompt_mask is None or mixed.prompt_mask[row].tolist().count(True) == 1
    assert captions == {i: {1.0 + v for v in range(i % 3 + 1 if i else 1)} for i in range(12)}
    assert 70 <= nulls <= 130


def test_collate() -> None:
    """Codes and prompts are where they were, the rest is zero and masked; no mask where there is no rest."""
    tokens = ToyTokens([3, 5])
    clips = [(tokens.codes(i, 0, n), tokens.prompt(i, 0)) for i, n in ((0, 3), (1, 5))]
    batch = collate(clips)
    assert batch.codes.dtype == torch.int64 and batch.codes.shape == (2, 12, 5) and batch.prompt.shape == (2, 2, 5)
    assert batch.codes[0, 4].tolist() == [0, 1, 2, 0, 0] and batch.codes[1, 0].tolist() == [100, 101, 102, 103, 104]
    assert batch.sequence_mask is not None and batch.sequence_mask.sum(1).tolist() == [3, 5]
    assert batch.prompt_mask is not None and batch.prompt_mask.tolist() == [[True, False], [True, True]]
    even = collate([clips[0], clips[0]])
    assert even.sequence_mask is None and even.prompt_mask is None
    fixed = collate([clips[0], clips[0]], fixed_frames=8)
    assert fixed.codes.shape == (2, 12, 8) and fixed.prompt.shape == (2, 16, 5)
    assert fixed.sequence_mask is not None and fixed.sequence_mask.sum(1).tolist() == [3, 3]
    assert fixed.prompt_mask is not None and fixed.prompt_mask.sum(1).tolist() == [1, 1]
    assert same(fixed, fixed.move(torch.device("cpu")))


def test_validation_holds_every_clip_once() -> None:
    """The first allowed crop and the first caption, always the same."""
    tokens = ToyTokens(LENGTHS, {4: [9, 14]})
    parts = [make() for make in fixed_batches(tokens, np.arange(1, 11), 4, 6)]
    assert [part.codes.shape[0] for part in parts] == [4, 4, 2]
    begins = sorted(int(part.codes[row, 0, 0]) for part in parts for row in range(len(part.codes)))
    assert begins == sorted(100 * i + (9 if i == 4 else 0) for i in range(1, 11))
    frames = sum(part.codes[:, 0].numel() if (m := part.sequence_mask) is None else int(m.sum()) for part in parts)
    assert frames == sum(min(length, 6) for length in LENGTHS[1:])
    assert fixed_batches(tokens, np.arange(0), 4, 6) == []


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetch(ahead: int) -> None:
    """In order; no more than `ahead` are made beforehand; an error comes where it belongs; closing early is clean."""
    made: list[int] = []

    def job(i: int) -> Callable[[], int]:
        def run() -> int:
            made.append(i)
            if i == 7:
                raise ValueError("seven")
            return i

        return run

    results = prefetch((job(i) for i in range(20)), ahead)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.05)
    assert 3 <= len(made) <= 3 + ahead
    assert [next(results) for _ in range(4)] == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="seven"):
        next(results)
    other = prefetch((job(i) for i in range(6)), ahead)
    assert next(other) == 0
    other.close()


def test_schedule() -> None:
    """The first rate is base / warm-up, the peak is base, the last is base * floor, and it only falls in between."""
    rates = [learning_rate(step, 3e-4, 100, 10, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(3e-5) and rates[9] == rates[10] == 3e-4
    assert rates[-1] == pytest.approx(3e-5)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] > 1.65e-4 > rates[55]  # half way down the cosine
    assert learning_rate(0, 1.0, 1, 0, 0.1) == pytest.approx(0.1)  # a run of one update
    assert learning_rate(0, 1.0, 1, 5, 0.1) == 1.0  # a warm-up longer than the run
    assert [learning_rate(step, 1.0, 3, 0, 1.0) for step in range(3)] == [1.0] * 3
    assert learning_rate(500, 1.0, 100, 10, 0.1) == pytest.approx(0.1)
