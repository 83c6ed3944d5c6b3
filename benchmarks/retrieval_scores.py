"""How well sounds match prompt classes: nearest class prototype of an embedding, with intervals. numpy only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from siren.errors import InputError

Array = npt.NDArray[np.float64]

_PERMUTATIONS = 2000
_Z = 1.959964  # of a 95% interval


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion; successes need not be whole."""
    if not 0 <= successes <= trials or trials < 1:
        raise InputError(f"{successes} successes of {trials} trials is no proportion")
    share, z2 = successes / trials, _Z * _Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    # Both ends enclose the share; where it is 0 or 1, rounding would leave it outside.
    return float(min(share, max(0.0, centre - half))), float(max(share, min(1.0, centre + half)))


class Prototypes:
    """Class prototypes: the mean of the L2-normalised embeddings of a class's reference clips.

    embeddings [N, D], labels int [N] from 0 to classes - 1, ids [N] of the clips. Every class needs two clips.
    """

    def __init__(self, embeddings: npt.ArrayLike, labels: Sequence[int], ids: Sequence[str], classes: int) -> None:
        rows = _unit(embeddings)
        self._rows = dict(zip(ids, rows, strict=True))
        self._labels = dict(zip(ids, labels, strict=True))
        self._counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes)
        if len(self._rows) != len(rows) or len(self._counts) != classes or self._counts.min() < 2:
            raise InputError("each class needs at least two reference clips, each with an id of its own")
        self._sums = np.zeros((classes, rows.shape[1]))
        np.add.at(self._sums, np.asarray(labels), rows)

    def similarities(self, embeddings: npt.ArrayLike, ids: Sequence[str | None]) -> Array:
        """Cosines [N, classes] of N sounds and the prototypes.

        A sound whose id is that of a reference clip is first taken out of its class's prototype.
        """
        rows = _unit(embeddings)
        result = rows @ _unit(self._sums).T
        for i, name in enumerate(ids):
            if name in self._rows:
                label = self._labels[name]
                result[i, label] = rows[i] @ _unit(self._sums[label] - self._rows[name])
        return result


def score(similarities: Array, labels: Sequence[int], names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Top-1 retrieval of the prompt's class from `similarities` [N, classes], and how far it is from chance.

    A sound whose two nearest classes tie is a miss. Sounds of one class succeed and fail together, so `interval`, in
    which each sound is a trial, is one for these classes only; `interval_by_class`, in which the sounds of a class
    together are one trial, is for others like them. `own` and `other` are the mean similarities to the own class and to
    the others; `auc` is the share of pairs (own, other) of a sound in which own is larger. For `shuffled` the classes
    change prompts at random 2,000 times, the sounds of each together: the mean accuracy, its largest, and `p`, the
    share of shuffles (this order among them) that score as well.
    """
    wanted = np.asarray(labels)
    best = similarities.max(axis=1, keepdims=True)
    found = np.where((similarities == best).sum(axis=1) == 1, similarities.argmax(axis=1), -1)
    hits = int((found == wanted).sum())
    mine = np.zeros(similarities.shape, dtype=bool)
    mine[np.arange(len(wanted)), wanted] = True
    own, other = similarities[mine], similarities[~mine].reshape(len(wanted), -1)
    rng = np.random.default_rng(seed)
    shuffled = np.array([(found == rng.permutation(len(names))[wanted]).mean() for _ in range(_PERMUTATIONS)])
    confusions = Counter((names[w], [*names, "none"][f]) for w, f in zip(wanted, found, strict=True) if w != f)
    return {
        "sounds": len(wanted),
        "hits": hits,
        "top1": hits / len(wanted),
        "interval": list(wilson(hits, len(wanted))),
        "interval_by_class": list(wilson(hits / len(wanted) * len(names), len(names))),
        "own": float(own.mean()),
        "other": float(other.mean()),
        "auc": float((own[:, None] > other).mean() + 0.5 * (own[:, None] == other).mean()),
        "shuffled": {
            "top1": float(shuffled.mean()),
            "largest": float(shuffled.max()),
            "p": float((1 + (shuffled >= hits / len(wanted)).sum()) / (1 + _PERMUTATIONS)),
        },
        "classes": {
            name: [int((found[wanted == i] == i).sum()), int((wanted == i).sum())] for i, name in enumerate(names)
        },
        "confusions": [[a, b, count] for (a, b), count in confusions.most_common(10)],
    }


def _unit(rows: npt.ArrayLike) -> Array:
    """Rows scaled to length 1; a row of zeros, which stands for a silent sound, stays."""
    values = np.asarray(rows, dtype=np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
