"""Distributions of cosines and angles, collected piece by piece: mean, deviation, quantiles, histogram."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_FINE = 40  # fine bins in a bin of the histogram; quantiles are read off the fine ones


class Spread:
    """The distribution of numbers within low..high: `add` them in any portions, then ask. NaN is counted apart.

    Mean and deviation are exact; quantiles are right to 1/40 of a bin.
    """

    def __init__(self, low: float, high: float, bins: int) -> None:
        self.low, self.high, self.bins = low, high, bins
        self._fine = np.zeros(bins * _FINE, np.int64)
        self._sums = np.zeros(2)
        self.undefined = 0

    def add(self, values: NDArray[Any]) -> None:
        """Take in an array of any shape."""
        flat = np.asarray(values, np.float64).ravel()
        finite = flat[np.isfinite(flat)]
        self.undefined += len(flat) - len(finite)
        places = (finite - self.low) * (len(self._fine) / (self.high - self.low))
        places = np.clip(places.astype(np.int64), 0, len(self._fine) - 1)
        self._fine += np.bincount(places, minlength=len(self._fine))
        self._sums += finite.sum(), (finite**2).sum()

    def merge(self, other: Spread) -> None:
        """Take in what another one of the same bins holds."""
        self._fine += other._fine
        self._sums += other._sums
        self.undefined += other.undefined

    @property
    def count(self) -> int:
        return int(self._fine.sum())

    @property
    def mean(self) -> float:
        return float(self._sums[0] / self.count) if self.count else float("nan")

    @property
    def std(self) -> float:
        if not self.count:
            return float("nan")
        return float(np.sqrt(max(0.0, self._sums[1] / self.count - self.mean**2)))

    @property
    def histogram(self) -> NDArray[np.int64]:
        """Counts, [bins]."""
        return self._fine.reshape(self.bins, _FINE).sum(1)

    def density(self) -> NDArray[np.float64]:
        """The histogram with an area of 1, [bins]."""
        density: NDArray[np.float64] = self.histogram / max(1, self.count) * self.bins / (self.high - self.low)
        return density

    def edges(self) -> NDArray[np.float64]:
        """Borders of the bins, [bins + 1]."""
        return np.linspace(self.low, self.high, self.bins + 1)

    def quantile(self, share: float) -> float:
        """The number below which this share of the numbers lies."""
        if not self.count:
            return float("nan")
        place = int(np.searchsorted(np.cumsum(self._fine), share * self.count))
        return float(self.low + (place + 0.5) * (self.high - self.low) / len(self._fine))

    def numbers(self, histogram: bool = True) -> dict[str, Any]:
        """For JSON."""
        values: dict[str, Any] = {"n": self.count, "undefined": self.undefined, "mean": self.mean, "std": self.std}
        values["quantiles"] = {f"{share:g}": self.quantile(share) for share in QUANTILES}
        return values | ({"histogram": self.histogram} if histogram else {})
