"""Frechet distances of Gaussians: closed forms, another implementation, and cases in which those of others break."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from siren.errors import InputError
from siren.evaluate.gaussians import Blocks, Gaussian, fit_gaussian, frechet_distance

EPS = np.finfo(np.float64).eps
# Rounding of a D x D problem: D^2 products are summed and decomposed.
Array = npt.NDArray[np.floating]


def blocks(vectors: Array, size: int = 7) -> Blocks:
    """One vector a clip, in blocks of a few."""
    starts = range(0, len(vectors), size)
    return lambda: ((vectors[i : i + size], np.arange(i, min(i + size, len(vectors)))) for i in starts)


def fit(vectors: Array, size: int = 7) -> Gaussian:
    return fit_gaussian(blocks(vectors, size))


def given_by(mean: Array, covariance: Array) -> Gaussian:
    """A Gaussian of these parameters."""
    values, vectors = np.linalg.eigh(covariance)
    return Gaussian(mean, (vectors * np.sqrt(np.maximum(values, 0))).T, 100)


def near(value: float, wanted: float, a: Gaussian, b: Gaussian) -> bool:
    """Equal but for rounding, which goes with the sizes of what is subtracted."""
    size = sum(float(np.square(g.factor).sum() + np.square(g.mean).sum()) for g in (a, b))
    return abs(value - wanted) <= 10 * len(a.mean) * EPS * size


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.floats(-100, 100), st.floats(0, 50), st.floats(-100, 100), st.floats(0, 50)))
def test_one_dimension(values: tuple[float, float, float, float]) -> None:
    """(m1 - m2)^2 + (s1 - s2)^2."""
    m1, s1, m2, s2 = values
    a, b = (Gaussian(np.array([m]), np.array([[s]]), 9) for m, s in ((m1, s1), (m2, s2)))
    assert near(frechet_distance(a, b), (m1 - m2) ** 2 + (s1 - s2) ** 2, a, b)


@pytest.mark.parametrize("dim", [1, 5, 33])
def test_commuting_covariances(dim: int) -> None:
    """Isotropic, diagonal, and of one basis: |m1 - m2|^2 + sum (sqrt(l1) - sqrt(l2))^2, also where some are 0."""
    generator = np.random.default_rng(dim)
    basis = np.linalg.qr(generator.standard_normal((dim, dim)))[0]
    m1, m2 = generator.standard_normal((2, dim))
    l1, l2 = generator.random((2, dim)) * 10
    l1[: dim // 3], l2[dim // 2 :] = 0, 0
    for first, second in ((np.full(dim, 2.0), np.full(dim, 3.0)), (l1, l2)):
        a, b = (given_by(m, (basis * values) @ basis.T) for m, values in ((m1, first), (m2, second)))
        wanted = np.square(m1 - m2).sum() + np.square(np.sqrt(first) - np.sqrt(second)).sum()
        # Here the root of an eigenvalue that should be 0 but is about EPS comes into the test's own factors.
        assert frechet_distance(a, b) == pytest.approx(wanted, abs=np.sqrt(EPS) * dim * 10)


@pytest.mark.parametrize(("n", "m", "dim"), [(50, 70, 1), (50, 70, 12), (200, 90, 33)])
def test_against_the_square_root_of_a_matrix(n: int, m: int, dim: int) -> None:
    """The textbook's formula with scipy's sqrtm, on covariances that are well conditioned."""
    generator = np.random.default_rng(n)
    turn = generator.standard_normal((dim, dim)) + 2 * np.eye(dim)
    x, y = generator.standard_normal((n, dim)) @ turn, generator.standard_normal((m, dim)) + 0.3
    a, b = fit(x), fit(y)
    for gaussian, vectors in ((a, x), (b, y)):
        np.testing.assert_allclose(gaussian.mean, vectors.mean(axis=0), atol=1e-13)
        np.testing.assert_allclose(gaussian.covariance, np.cov(vectors, rowvar=False).reshape(dim, dim), atol=1e-12)
    root = scipy.linalg.sqrtm(np.atleast_2d(a.covariance @ b.covariance))
    wanted = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "dim"), [(2, 2, 40), (5, 9, 40), (39, 41, 40), (5, 200, 40), (200, 3, 40)])
def test_fewer_vectors_than_dimensions(n: int, m: int, dim: int) -> None:
    """Singular covariances: the same, either way round, as in the basis of the vectors, where none is singular.

    All vectors lie in the span of n + m of them; there, the dimension is smaller, and the value must be the same.
    """
    generator = np.random.default_rng(n * m)
    x, y = generator.standard_normal((n, dim)), 2 * generator.standard_normal((m, dim)) + 1
    value = frechet_distance(fit(x), fit(y))
    basis = np.linalg.qr(np.concatenate([x, y]).T)[0]
    small = frechet_distance(fit(x @ basis), fit(y @ basis))
    a, b = fit(x), fit(y)
    assert value > 0 and near(value, small, a, b) and near(value, frechet_distance(b, a), a, b)
    if n + m < dim:  # a bound: no coupling is better than moving the means, none worse than independence
        assert np.square(a.mean - b.mean).sum() <= value
        assert value <= np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("n", "dim"), [(2, 1), (3, 17), (18, 17), (300, 17)])
def test_identical_sets_have_no_distance(n: int, dim: int, offset: float) -> None:
    """Exactly 0, whatever order or blocks the vectors come in; also where all vectors are the same."""
    vectors = np.random.default_rng(n).standard_normal((n, dim)) + offset
    assert frechet_distance(fit(vectors), fit(vectors)) == 0
    assert frechet_distance(fit(vectors, 5), fit(vectors[::-1], 64)) <= 1e-9 * offset + 1e-13
    same = np.repeat(vectors[:1], n, axis=0)
    assert frechet_distance(fit(same), fit(same)) == 0


def test_a_shift_is_its_square() -> None:
    vectors = np.random.default_rng(0).standard_normal((30, 50))
    a, b = fit(vectors), fit(vectors + 0.25)
    assert near(frechet_distance(a, b), 50 * 0.25**2, a, b)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 8), st.integers(0, 2**32 - 1), st.integers(-30, 30))
def test_never_negative_complex_or_nan(n: int, m: int, dim: int, seed: int, exponent: int) -> None:
    """Vectors with repetitions, constant columns and any scale; a scale s gives s^2 times the distance."""
    generator = np.random.default_rng(seed)
    x, y = (generator.integers(-2, 3, (count, dim)).astype(np.float64) for count in (n, m))
    plain, scaled = (frechet_distance(fit(x * s), fit(y * s)) for s in (1.0, 2.0**exponent))
    assert np.isfinite(plain) and plain >= 0 and isinstance(plain, float)
    assert scaled == pytest.approx(plain * 4.0**exponent, rel=1e-12)


@pytest.mark.parametrize("dim", [3, 30])
def test_weights_are_repetitions(dim: int) -> None:
    """A clip that counts twice is one that is there twice, with all its vectors; one that counts 0 is not there."""
    generator = np.random.default_rng(dim)
    clips = [generator.standard_normal((int(k), dim)).astype(np.float32) for k in generator.integers(1, 4, 20)]
    weights = generator.integers(0, 4, 20)
    rows = np.repeat(np.arange(20), [len(clip) for clip in clips])
    vectors = np.concatenate(clips)
    weighted = fit_gaussian(lambda: iter([(vectors[:9], rows[:9]), (vectors[9:], rows[9:])]), weights)
    repeated = fit(np.concatenate([clips[i] for i in range(20) for _ in range(weights[i])]))
    assert weighted.count == repeated.count
    np.testing.assert_allclose(weighted.mean, repeated.mean, atol=1e-14)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance, atol=1e-13)
    assert len(weighted.factor) <= dim and len(repeated.factor) <= dim


def test_memory_does_not_grow_with_the_vectors() -> None:
    """Of ten thousand vectors no more than twice the dimension and a block are held at once."""
    largest = 0
    generator = np.random.default_rng(0)

    def count(inner: Callable[..., Array]) -> Callable[..., Array]:
        def concatenate(parts: list[Array], *more: object) -> Array:
            nonlocal largest
            largest = max(largest, sum(map(len, parts)))
            return inner(parts, *more)

        return concatenate

    vectors = generator.standard_normal((10_000, 4)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "concatenate", count(np.concatenate))
        fit(vectors, 64)
    assert largest <= 2 * 4 + 64


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((1, 3)), "at least two vectors, not 1"),
        (np.zeros((0, 3)), "at least two vectors, not 0"),
        (np.array([[1.0], [np.nan]]), "NaN or infinity"),
        (np.array([[1.0], [np.inf]]), "NaN or infinity"),
    ],
)
def test_what_has_no_gaussian(vectors: Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(vectors)


def test_other_dimensions_have_no_distance() -> None:
    with pytest.raises(InputError, match="3 and 4 values"):
        frechet_distance(fit(np.zeros((2, 3))), fit(np.zeros((2, 4))))
