"""Inception Score, KL divergence and bootstrap intervals against what they are by definition."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.evaluate.bootstrap import draw_counts, frechet_replicates, interval
from siren.evaluate.scores import InceptionSums, kl_divergence, log_softmax


def inception(logits: np.ndarray, parts: int = 1) -> float:
    sums = InceptionSums(1, logits.shape[1])
    for part in np.array_split(logits, parts):
        sums.add(part, np.ones((1, len(part)), np.int64))
    return float(sums.values()[0])


def test_inception_score_at_its_ends() -> None:
    """1 where all clips are alike; the number of classes where each is sure and all classes are equally frequent."""
    assert inception(np.tile(np.random.default_rng(0).standard_normal(5), (7, 1))) == pytest.approx(1, abs=1e-14)
    assert inception(np.eye(5, dtype=np.float32) * 1000) == pytest.approx(5, rel=1e-14)


@pytest.mark.parametrize("parts", [1, 3])
def test_inception_score_by_its_definition(parts: int) -> None:
    """exp of the mean relative entropy of each clip to the mean of all, by scipy; in parts it is the same."""
    logits = np.random.default_rng(1).standard_normal((23, 6)).astype(np.float32) * 3
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    wanted = np.exp(scipy.special.rel_entr(p, p.mean(axis=0)).sum(axis=1).mean())
    assert inception(logits, parts) == pytest.approx(wanted, rel=1e-13)


def test_weights_are_repetitions() -> None:
    logits = np.random.default_rng(2).standard_normal((9, 4)).astype(np.float32)
    weights = np.random.default_rng(3).integers(0, 3, (5, 9))
    sums = InceptionSums(5, 4)
    sums.add(logits, weights)
    assert sums.values() == pytest.approx([inception(np.repeat(logits, row, axis=0)) for row in weights], rel=1e-13)


def test_kl_is_of_the_generated_from_the_reference() -> None:
    """KL(reference || generated), by scipy, and not the other way round."""
    generator = np.random.default_rng(4)
    reference, generated = generator.standard_normal((2, 8, 5)).astype(np.float32) * 4
    p, q = (scipy.special.softmax(x.astype(np.float64), axis=1) for x in (reference, generated))
    found = kl_divergence(reference, generated)
    np.testing.assert_allclose(found, scipy.stats.entropy(p, q, axis=1), rtol=1e-12)
    assert not np.allclose(found, scipy.stats.entropy(q, p, axis=1), rtol=1e-3)
    assert (kl_divergence(reference, reference) == 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4))
def test_any_logits_are_finite(values: list[float]) -> None:
    """A probability that is 0 in double precision makes no NaN and no infinity."""
    reference, generated = np.array([values[:2], values[2:]], np.float32)[:, None]
    assert np.isfinite(log_softmax(reference)).all()
    assert np.isfinite(kl_divergence(reference, generated)).all() and (kl_divergence(reference, generated) >= 0).all()
    assert 1 <= inception(np.concatenate([reference, generated])) <= 2 + 1e-12


def test_draws_are_reproducible_in_any_portions() -> None:
    """A row sums to the number of clips, and depends on the seed, the name and its number only."""
    whole = draw_counts(13, range(6), 1, "generated")
    assert whole.shape == (6, 13) and (whole.sum(axis=1) == 13).all()
    parts = [draw_counts(13, range(2), 1, "generated"), draw_counts(13, range(2, 6), 1, "generated")]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    for other in (draw_counts(13, range(6), 2, "generated"), draw_counts(13, range(6), 1, "reference")):
        assert (other != whole).any()
    assert len({row.tobytes() for row in whole}) == 6


def test_interval_of_a_mean_is_the_textbooks() -> None:
    """value +- 1.96 s / sqrt(n), to the precision that the number of replicates allows."""
    values = np.random.default_rng(5).standard_normal(400)
    replicates = draw_counts(400, range(4000), 0, "x") @ values / 400
    low, high = interval(float(values.mean()), replicates, 0.95, -np.inf, np.inf)
    # The standard deviation of s over 4000 replicates is s / sqrt(8000); five of them.
    assert (high - low) / 2 == pytest.approx(1.959964 * values.std() / 20, rel=5 / np.sqrt(8000))
    assert (high + low) / 2 == pytest.approx(values.mean())
    assert interval(0.01, replicates, 0.95, 0.0, 0.02) == (0.0, 0.02)
    narrow = interval(float(values.mean()), replicates, 0.5, -np.inf, np.inf)
    assert low < narrow[0] < narrow[1] < high


def test_interval_of_a_frechet_distance_covers_what_it_estimates() -> None:
    """Of 40 pairs of lists from known Gaussians, the intervals hold the mean distance as often as they say.

    With 95% and 40 trials, 32 or more do but in one case of 2000 (binomial distribution).
    """
    from siren.evaluate.gaussians import fit_gaussian, frechet_distance

    generator, held, values = np.random.default_rng(6), [], []
    for trial in range(40):
        lists = generator.standard_normal((50, 3)) * 1.3 + 0.5, generator.standard_normal((60, 3))
        sides = [lambda x=x: iter([(x, np.arange(len(x)))]) for x in lists]
        values.append(frechet_distance(*(fit_gaussian(side) for side in sides)))
        drawn = []
        for i in range(40):
            counts = [draw_counts(len(x), range(i, i + 1), trial, name)[0] for x, name in zip(lists, "ab", strict=True)]
            drawn.append(frechet_distance(*(fit_gaussian(s, w) for s, w in zip(sides, counts, strict=True))))
        held.append(interval(values[-1], np.array(drawn), 0.95, 0.0, np.inf))
    assert sum(low <= np.mean(values) <= high for low, high in held) >= scipy.stats.binom.ppf(0.0005, 40, 0.95)


def test_replicates_of_a_frechet_distance() -> None:
    """At most 200 and what is asked for; fewer where they are dear, 20 at least."""
    assert frechet_replicates(1000, 512, 1000, 1000) == 200
    assert frechet_replicates(50, 512, 1000, 1000) == 50
    assert frechet_replicates(0, 512, 1000, 1000) == 0
    assert 20 <= frechet_replicates(1000, 2048, 5000, 5000) < 200
    assert frechet_replicates(1000, 8192, 10**6, 10**6) == 20
