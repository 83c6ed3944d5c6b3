"""The studies of a codec, cosines and semantics, on features and codes made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from fake_data import FakeCodec
from hypothesis import given
from hypothesis import strategies as st
from study_data import CODEBOOKS, SIZE, TableCodec, token_set

from siren.errors import DataError, InputError
from siren.studies.cosine import VIEWS, cosine
from siren.studies.draw_codec import draw_cosine, draw_semantics
from siren.studies.features import pick_clips
from siren.studies.semantics import classify, semantics, wilson
from siren.studies.spread import QUANTILES, Spread

PNG = b"\x89PNG\r\n\x1a\n"


def random_codes(seed: int, clips: int = 7, most: int = 9) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SIZE, (int(rng.integers(1, most)), CODEBOOKS)) for _ in range(clips)]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.integers(1, 50))
def test_a_spread_says_what_numpy_says(values: list[float], cut: int) -> None:
    """Added in two portions: mean and deviation are numpy's, quantiles to the width of a fine bin, no number lost."""
    spread = Spread(-1, 1, 20)
    spread.add(np.array(values[:cut]))
    spread.add(np.array([*values[cut:], np.nan]))
    assert (spread.count, spread.undefined) == (len(values), 1)
    assert spread.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert spread.std == pytest.approx(np.std(values), abs=1e-7)  # the root of a difference of sums of about 1
    assert spread.histogram.sum() == len(values)
    assert float(spread.density().sum()) * 0.1 == pytest.approx(1)
    fine = 2 / (20 * 40)
    for share in QUANTILES:
        below = np.quantile(values, share, method="inverted_cdf")
        assert abs(spread.quantile(share) - below) <= fine


def test_cosines_of_known_directions(tmp_path: Path) -> None:
    """Codebook 0 and 1 along one axis, 2 against them, 3 and all others across: 1, -1 and 0 in every view as it is."""
    tables = np.zeros((CODEBOOKS, SIZE, 5), np.float32)
    sizes = 1 + np.arange(SIZE) / 7  # directions count, lengths do not
    tables[:2, :, 0] = sizes
    tables[2, :, 0] = -sizes
    tables[3:, :, 1] = sizes
    tables[11, :, 1:] = 0  # no direction at all
    found = cosine(token_set(tmp_path / "tokens", random_codes(0)), TableCodec(tables), 0)
    for view in ("features", "pooled"):
        pairs = found.pairs[view]
        assert len(pairs) == 66
        wanted = {(0, 1): 1, (0, 2): -1, (1, 2): -1, (0, 3): 0, (2, 9): 0, (4, 7): 1}
        for pair, value in wanted.items():
            assert pairs[pair].mean == pytest.approx(value, abs=1e-6) and pairs[pair].std < 1e-3
            assert found.permuted[view][pair].mean == pytest.approx(value, abs=1e-6)
        assert pairs[0, 11].count == 0 and pairs[0, 11].undefined == pairs[0, 1].count
        assert math.isnan(pairs[0, 11].mean)
    assert found.pairs["features"][0, 1].count == found.frames
    assert found.pairs["pooled"][0, 1].count == found.clips == 7


def test_centred_cosines_leave_out_what_is_the_same_in_all_frames(tmp_path: Path) -> None:
    """A large offset makes any two codebooks parallel; centred, independent ones are across and bound ones are not."""
    rng = np.random.default_rng(1)
    offset = np.array([50.0, 0, 0, 0, 0, 0])
    tables = rng.standard_normal((CODEBOOKS, SIZE, 6))
    tables[1] = tables[0]
    codes = random_codes(2, clips=40, most=60)
    for part in codes:
        part[:, 1] = part[:, 0]  # codebook 1 says what codebook 0 says
    found = cosine(token_set(tmp_path / "tokens", codes), TableCodec(tables + offset), 0)
    frames = found.frames
    assert found.pairs["features"][0, 5].mean > 0.98
    assert found.pairs["centred"][0, 1].mean == pytest.approx(1, abs=1e-5)
    # Of independent directions the mean is 0 with a deviation of 1 / sqrt(C) in each frame: five of its own errors.
    assert abs(found.pairs["centred"][0, 5].mean) < 5 * 6**-0.5 * frames**-0.5
    assert abs(found.permuted["centred"][0, 1].mean) < 5 * 6**-0.5 * frames**-0.5
    assert found.permuted["features"][0, 1].mean > 0.98


def test_cosines_are_those_of_the_frames_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame by itself in float64 gives the mean, also when the codes are multiplied in blocks."""
    tables = np.random.default_rng(3).standard_normal((CODEBOOKS, SIZE, 3))
    codes = random_codes(4)
    tokens = token_set(tmp_path / "tokens", codes)
    frames = np.concatenate(codes)
    whole = cosine(tokens, TableCodec(tables), 0)
    monkeypatch.setattr("siren.studies.cosine._PRODUCTS", 7 * len(frames))
    blocks = cosine(tokens, TableCodec(tables), 0)
    for j, k in ((0, 1), (3, 10)):
        a, b = tables[j][frames[:, j]], tables[k][frames[:, k]]
        single = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        for found in (whole, blocks):
            assert found.pairs["features"][j, k].count == len(frames)
            assert found.pairs["features"][j, k].mean == pytest.approx(single.mean(), abs=1e-6)
            assert found.pairs["features"][j, k].std == pytest.approx(single.std(), abs=1e-6)


def test_numbers_and_picture_of_the_cosines(tmp_path: Path) -> None:
    """Pairs of an interval are counted together; the picture is a PNG."""
    tables = np.random.default_rng(5).standard_normal((CODEBOOKS, SIZE, 3))
    found = cosine(token_set(tmp_path / "tokens", random_codes(6)), TableCodec(tables), 4, seed=3)
    assert found.clips == 4
    values = found.numbers()
    assert tuple(values["views"]) == VIEWS
    intervals = values["views"]["features"]["intervals"]
    assert [intervals[step]["n"] for step in range(1, 12)] == [found.frames * (12 - step) for step in range(1, 12)]
    assert values["views"]["features"]["overall"]["n"] == 66 * found.frames
    assert draw_cosine(found).startswith(PNG)


def test_clips_are_drawn_by_the_seed() -> None:
    """Without replacement, the same for the same seed, all where all are wanted."""
    indices = np.arange(10, 60)
    picked = pick_clips(indices, 20, 1)
    assert len(set(picked.tolist())) == 20 and set(picked) <= set(indices) and (np.diff(picked) > 0).all()
    assert (picked == pick_clips(indices, 20, 1)).all() and not (picked == pick_clips(indices, 20, 2)).all()
    assert (pick_clips(indices, 0, 1) == indices).all() and (pick_clips(indices, 99, 1) == indices).all()
    with pytest.raises(InputError, match="clips"):
        pick_clips(indices, -1, 1)
    with pytest.raises(InputError, match="seed"):
        pick_clips(indices, 1, -1)


def labelled(folder: Path, clips: int = 240, shuffle: bool = False) -> tuple[object, TableCodec]:
    """Three classes that codebooks 0 and 7 tell apart and no other does; shuffled, none does."""
    rng = np.random.default_rng(9)
    tables = rng.standard_normal((CODEBOOKS, SIZE, 6))
    classes = rng.integers(0, 3, clips)
    codes = []
    for kind in classes:
        part = rng.integers(0, SIZE, (int(rng.integers(2, 6)), CODEBOOKS))
        part[:, [0, 7]] = kind
        codes.append(part)
    if shuffle:
        classes = rng.permutation(classes)
    names = ["rain", "bell", "a long name"]
    return token_set(folder, codes, [names[kind] for kind in classes]), TableCodec(tables)


def test_semantics_finds_the_codebooks_that_know_the_class(tmp_path: Path) -> None:
    """They reach (nearly) every test clip, and so do all together; the interval of the others holds chance."""
    tokens, codec = labelled(tmp_path / "tokens")
    found = semantics(tokens, codec, seeds=2, epochs=20)
    assert found.train_clips + found.test_clips == 240 and 20 < found.test_clips < 80
    for j, part in enumerate(found.codebooks):
        if j in (0, 7):
            assert part.mean == 1
        else:
            assert part.mean < 0.6
    assert found.together.mean > 0.9
    values = found.numbers()
    assert sum(values["clips_by_class"].values()) == 240 and values["chance"] == pytest.approx(1 / 3)
    again = semantics(tokens, codec, seeds=2, epochs=20)
    assert [part.by_seed for part in again.codebooks] == [part.by_seed for part in found.codebooks]


def test_shuffled_labels_are_at_chance(tmp_path: Path) -> None:
    """Nothing of a test clip's label comes through: all accuracies are within five deviations of a third."""
    found = semantics(*labelled(tmp_path / "tokens", shuffle=True), seeds=1, epochs=10)
    allowed = 5 * math.sqrt(1 / 3 * 2 / 3 / found.test_clips)
    assert all(abs(part.mean - 1 / 3) < allowed for part in [*found.codebooks, found.together])


def test_features_that_do_not_vary_are_no_error() -> None:
    """A codebook of one code: the classifier has nothing to go by and says the most frequent class."""
    labels = np.array([0] * 8 + [1] * 4)
    test = np.arange(12) % 3 == 0
    right, own = classify(np.full((12, 3), 7.0, np.float32), labels, test, 2, 0, 30)
    assert (right, own) == ((labels[test] == 0).mean(), (labels[~test] == 0).mean())


def test_picture_of_the_semantics(tmp_path: Path) -> None:
    """t-SNE of few clips too."""
    found = semantics(*labelled(tmp_path / "tokens", clips=48), seeds=1, epochs=1, min_clips=3)
    assert draw_semantics(found).startswith(PNG)


def test_data_that_does_not_serve(tmp_path: Path) -> None:
    """No labels, one class, a wrong codec, features that are no numbers: one line each."""
    tables = np.random.default_rng(0).standard_normal((CODEBOOKS, SIZE, 3))
    codec = TableCodec(tables)
    plain = token_set(tmp_path / "plain", random_codes(0))
    with pytest.raises(DataError, match="label"):
        semantics(plain, codec)
    single = token_set(tmp_path / "single", random_codes(0), ["rain"] * 7)
    with pytest.raises(DataError, match="two are needed"):
        semantics(single, codec, min_clips=1)
    with pytest.raises(InputError, match="seeds"):
        semantics(single, codec, seeds=0)
    other = TableCodec(tables)
    other.identity = FakeCodec("another").identity
    for study in (cosine, semantics):
        with pytest.raises(DataError, match="another codec"):
            study(plain, other)
    with pytest.raises(DataError, match="NaN"):
        cosine(plain, TableCodec(np.full((CODEBOOKS, SIZE, 3), np.nan)))


@pytest.mark.parametrize("trials", [1, 9, 400])
def test_wilson_solves_its_equation(trials: int) -> None:
    """(p - rate)^2 = z^2 p (1 - p) / n at both ends, and 0 and 1 where the rate is."""
    for successes in (0, trials / 3, trials):
        rate = successes / trials
        for end in wilson(successes, trials):
            assert (end - rate) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / trials, abs=1e-12)
