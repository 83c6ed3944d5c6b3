"""Intervals by the bootstrap: clips of a list are drawn again with replacement, and the figure is computed anew.

The interval is value +- z * s: s is the standard deviation of the figure over the replicates, z the normal quantile. It
is not the range of the replicates, because those of a Frechet distance and an Inception Score are shifted: a replicate
holds about 63% of the clips, some twice, so its distance is larger and its score smaller. The interval is of the
figure at this number of clips: where it would come out with other clips of the same kind, and as many. What the
number of clips does to the figure itself, such as the upward bias of a Frechet distance, is not in it.

Measured on 200 pairs of lists from known distributions: intervals of 95% hold the mean figure at that N in 96% to 100%
for a Frechet distance (4 to 64 dimensions, 24 to 200 clips; up to 1.7 times too wide where clips are few for the
dimension), and in 93% to 95% for an Inception Score (84% with 40 clips for 80 classes).
"""

from __future__ import annotations

import zlib
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

FRECHET_REPLICATES = 200  # at most: s is then known to 5%
_LEAST_REPLICATES = 20  # of a Frechet distance; s is then known to 16%
_WORK = 4e12  # floating-point operations of all replicates of a Frechet distance: about ten minutes on one old core


def draw_counts(clips: int, replicates: range, seed: int, name: str) -> npt.NDArray[np.int32]:
    """How often every clip is drawn, [replicates, clips]; a row sums to `clips`.

    `name` sets one use of a seed apart from another. A row depends on its number only, so that rows can be drawn in any
    portions.
    """
    rows = []
    for replicate in replicates:
        generator = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode())], spawn_key=(replicate,)))
        )
        drawn = generator.integers(0, clips, clips)
        rows.append(np.bincount(drawn, minlength=clips).astype(np.int32))
    return np.stack(rows)


def interval(
    value: float, replicates: npt.NDArray[np.float64], confidence: float, least: float, most: float
) -> tuple[float, float]:
    """value +- z * s, within what the figure can be at all: from `least` to `most`."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * float(np.std(replicates, ddof=1))
    return max(value - half, least), min(value + half, most)


def frechet_replicates(wanted: int, dim: int, first: int, second: int) -> int:
    """How many replicates a Frechet distance of lists with so many vectors gets; it depends on these sizes only."""
    # Of a replicate: QR of what is drawn of each list, the product of the factors, its singular values.
    sides = [(0.63 * n, min(0.63 * n, dim)) for n in (first, second)]
    work = sum(2 * n * dim * dim for n, k in sides if n > dim) + 2 * sides[0][1] * sides[1][1] * dim
    work += 8 * min(sides[0][1], sides[1][1]) ** 2 * max(sides[0][1], sides[1][1])
    return min(wanted, FRECHET_REPLICATES, max(_LEAST_REPLICATES, int(_WORK / max(work, 1.0))))
