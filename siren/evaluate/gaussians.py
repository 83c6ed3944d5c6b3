"""Gaussians of embeddings and the Frechet distance of two of them.

    FD = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

A covariance is kept as a factor F [k, D] with C = F' F and k = min(n, D). Then tr (C1 C2)^(1/2) is the sum of the
singular values of F1 F2' [k1, k2]. So nothing is squared before its root is taken: no root of a negative or complex
number can arise, a singular covariance (n < D) needs no ridge, and the matrix is as small as the smaller of n and D.
All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError

Floats = npt.NDArray[np.float64]
# Calling it gives blocks of vectors [n, D], and for every vector the place of its clip in the list of weights [n].
Blocks = Callable[[], Iterator[tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]]]]


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and factor [k, D] of the covariance, of `count` vectors."""

    mean: Floats
    factor: Floats
    count: int

    @property
    def covariance(self) -> Floats:
        """[D, D]."""
        return self.factor.T @ self.factor


def fit_gaussian(blocks: Blocks, weights: npt.NDArray[np.int64] | None = None) -> Gaussian:
    """Mean and covariance (divided by n - 1) of vectors that come in blocks; they are gone through twice.

    weights: how often every clip counts, 0 for not at all; None for once each. Memory is a few times D x D, whatever
    the number of vectors. Raises InputError for less than two vectors, and for NaN or infinity.
    """
    total, count = None, 0
    for vectors, clips in blocks():
        counts: Floats = np.ones(len(vectors)) if weights is None else weights[clips].astype(np.float64)
        part = counts @ vectors.astype(np.float64)
        total = part if total is None else total + part
        count += int(counts.sum())
    if total is None or count < 2:
        raise InputError(f"a Gaussian needs at least two vectors, not {count}")
    mean = total / count
    if not np.isfinite(mean).all():
        raise InputError("vectors hold NaN or infinity")
    dim = len(mean)
    waiting: list[Floats] = []
    rows = 0
    for vectors, clips in blocks():
        block = vectors.astype(np.float64) - mean
        if weights is not None:
            times = weights[clips]
            block = block[times > 0] * np.sqrt(times[times > 0])[:, None]
        waiting.append(block)
        rows += len(block)
        if rows > 2 * dim:
            waiting = [_triangle(waiting)]
            rows = dim
    factor = np.concatenate(waiting) if rows <= dim else _triangle(waiting)
    return Gaussian(mean, factor / np.sqrt(count - 1), count)


def _triangle(blocks: list[Floats]) -> Floats:
    """R [D, D] of the QR decomposition of blocks [n >= D, D] under one another: R' R is the sum of their B' B."""
    triangle: Floats = np.asarray(np.linalg.qr(np.concatenate(blocks), mode="r"))
    return triangle


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet (2-Wasserstein) distance of two Gaussians: 0 or more, 0 for the same vectors.

    Its rounding error is about D * 1e-16 of the variances; a result below that is 0. Raises InputError for other
    dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"embeddings of {len(a.mean)} and {len(b.mean)} values have no distance")
    variance = float(np.square(a.factor).sum() + np.square(b.factor).sum())
    shared = float(np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum())
    value = float(np.square(a.mean - b.mean).sum()) + variance - 2 * shared
    return value if value > len(a.mean) * np.finfo(np.float64).eps * variance else 0.0
