"""Property 1: the cosine between the features of different codebooks at the same frame (section 3, figure 2a, 8).

    cosine(f^j_t, f^k_t)     for all frames t and pairs j < k

and the same of features that are the mean over a clip's frames (appendix D.1). A codec's output projection has a bias,
so a codebook's features have a mean that says nothing about the sound. The paper leaves it in ("features"). With it
taken out ("centred") the cosine says whether one codebook's feature tells anything about another's direction.

The reference is the same with the frames of every codebook in an order of its own ("permuted"): what the codebooks'
own distributions give where nothing joins them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import InputError
from ..train.batches import random_words
from .features import Tokens, feature_tables, mean_features, pick_clips, read_codes, used_codes
from .spread import Spread

_BINS = 80
_PRODUCTS = 8 << 20  # cosines of two codebooks' codes at once: 32 MB
_FRAME_ORDER, _CLIP_ORDER = 102, 103
VIEWS = ("features", "centred", "pooled", "pooled centred")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Cosines:
    """What `cosine` found. pairs[view][j, k] and permuted[view][j, k], j < k, for each of VIEWS."""

    clips: int
    frames: int
    codebooks: int
    width: int
    pairs: dict[str, dict[Pair, Spread]]
    permuted: dict[str, dict[Pair, Spread]]

    def by_interval(self, view: str, permuted: bool = False) -> dict[int, Spread]:
        """All pairs that lie 1, 2, ... codebooks apart."""
        found: dict[int, Spread] = {}
        for (j, k), spread in (self.permuted if permuted else self.pairs)[view].items():
            found.setdefault(k - j, Spread(-1, 1, _BINS)).merge(spread)
        return dict(sorted(found.items()))

    def overall(self, view: str, permuted: bool = False) -> Spread:
        """All pairs together."""
        whole = Spread(-1, 1, _BINS)
        for spread in (self.permuted if permuted else self.pairs)[view].values():
            whole.merge(spread)
        return whole

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("clips", "frames", "codebooks", "width")}
        values["random_std"] = self.width**-0.5
        values["bins"] = Spread(-1, 1, _BINS).edges()
        values["views"] = {}
        for view in VIEWS:
            reference = self.permuted[view]
            values["views"][view] = {
                "overall": self.overall(view).numbers(),
                "overall_permuted": self.overall(view, permuted=True).numbers(),
                "intervals": {step: spread.numbers() for step, spread in self.by_interval(view).items()},
                "intervals_permuted": {
                    step: spread.numbers(False) for step, spread in self.by_interval(view, permuted=True).items()
                },
                "pairs": [
                    {"codebooks": pair, **spread.numbers(), "permuted": reference[pair].numbers(False)}
                    for pair, spread in self.pairs[view].items()
                ],
            }
        return values


def cosine(tokens: Tokens, codec: Any, clips: int = 2000, seed: int = 0, progress: bool = False) -> Cosines:
    """The cosines of all pairs of codebooks over at most `clips` clips (0: all), drawn by the seed.

    A feature of length 0 has no direction: its cosines are counted as undefined. Memory: the codes of the clips and
    about 100 MB. Raises InputError for one codebook only, DataError for another codec's codes.
    """
    tables = feature_tables(tokens, codec)
    if len(tables) < 2:
        raise InputError("a codec of one codebook has no pair of codebooks to compare")
    indices = pick_clips(np.arange(len(tokens)), clips, seed)
    codes = read_codes(tokens, indices, progress)
    counts = used_codes(codes.codes, tables.shape[1])
    means = np.einsum("jv,jvc->jc", counts / counts.sum(1, keepdims=True), tables, dtype=np.float64)
    centred = (tables - means[:, None]).astype(np.float32)
    permuted = np.stack([row[_order(codes.codes.shape[1], seed, _FRAME_ORDER, j)] for j, row in enumerate(codes.codes)])
    found: dict[str, dict[Pair, Spread]] = {}
    reference: dict[str, dict[Pair, Spread]] = {}
    # What is left of equal numbers after their mean was taken out is rounding, not a direction.
    floor = 1e-6 * float(np.abs(tables).max())
    for view, values in (("features", tables), ("centred", centred)):
        units = np.stack([_unit(table, floor) for table in values])
        found[view] = _frame_cosines(units, codes.codes, progress, view)
        reference[view] = _frame_cosines(units, permuted, progress, f"{view}, permuted")
        pooled = np.stack(
            [_unit(mean_features(values, codes, np.arange(len(indices)), j), floor) for j in range(len(values))]
        )
        view = "pooled" if view == "features" else "pooled centred"
        found[view] = _pooled_cosines(pooled)
        shuffled = np.stack([row[_order(len(row), seed, _CLIP_ORDER, j)] for j, row in enumerate(pooled)])
        reference[view] = _pooled_cosines(shuffled)
    return Cosines(len(indices), codes.codes.shape[1], len(tables), tables.shape[2], found, reference)


def _frame_cosines(
    units: NDArray[np.float32], codes: NDArray[np.int32], progress: bool, title: str
) -> dict[Pair, Spread]:
    """units [J, V, C] of length 1 (or NaN), codes [J, N]. The cosines of all codes first, then those that came up."""
    used = [np.unique(row, return_inverse=True) for row in codes]
    found = {(j, k): Spread(-1, 1, _BINS) for j in range(len(codes)) for k in range(j + 1, len(codes))}
    for (j, k), spread in tqdm(found.items(), desc=title, unit="pair", disable=not progress):
        (own, places), (others, other_places) = used[j], used[k]
        rows = max(1, _PRODUCTS // len(others))
        for start in range(0, len(own), rows):
            products = units[j][own[start : start + rows]] @ units[k][others].T
            inside = (places >= start) & (places < start + rows)
            spread.add(products[places[inside] - start, other_places[inside]])
    return found


def _pooled_cosines(units: NDArray[np.float32]) -> dict[Pair, Spread]:
    """units [J, clips, C] of length 1 (or NaN)."""
    found = {}
    for j in range(len(units)):
        for k in range(j + 1, len(units)):
            found[j, k] = Spread(-1, 1, _BINS)
            found[j, k].add(np.einsum("nc,nc->n", units[j], units[k]))
    return found


def _unit(vectors: NDArray[np.float32], floor: float) -> NDArray[np.float32]:
    """[N, C] of length 1; NaN where the length is not above the floor: there is no direction."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths <= floor] = np.nan
    return vectors / lengths


def _order(count: int, *key: int) -> NDArray[np.int64]:
    return np.argsort(random_words(count, *key), kind="stable")
