"""Property 2: how well one codebook's features alone tell the classes of sounds apart (section 3, D.2, figure 2c, 9).

For every codebook a classifier of two layers (Linear, ReLU, Linear) on the clip's feature: the mean over its frames, as
appendix D.1 pools it. Features are standardised over the training clips, so a codebook's scale plays no part. Clips are
split by the hash of their ids, pieces of one recording stay together. The last row is a classifier on the features of
all codebooks side by side.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..data.tokens import split
from ..errors import DataError, InputError
from .features import Tokens, feature_tables, mean_features, pick_clips, read_codes

_HIDDEN = 256
_BATCH = 256
_RATE, _DECAY = 3e-3, 1e-2


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of a classifier on the test clips: one for each seed."""

    by_seed: list[float]
    train: float
    tested: int

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the mean. The seeds share the test clips, so those are the trials."""
        return wilson(self.mean * self.tested, self.tested)

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        deviation = float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else None
        values = {"accuracy": self.mean, "interval": self.interval, "by_seed": self.by_seed}
        return values | {"std_over_seeds": deviation, "train_accuracy": self.train}


@dataclass(frozen=True)
class Semantics:
    """What `semantics` found. `features` [J, clips, C] and `labels` [clips] are those that were classified."""

    classes: list[str]
    train_clips: int
    test_clips: int
    chance: float
    majority: float
    codebooks: list[Accuracy]
    together: Accuracy
    features: NDArray[np.float32]
    labels: NDArray[np.int64]

    def numbers(self) -> dict[str, Any]:
        """For JSON. chance: one over the classes; majority: of whoever always says the most frequent class."""
        names = ("classes", "train_clips", "test_clips", "chance", "majority")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values["clips_by_class"] = {name: int((self.labels == i).sum()) for i, name in enumerate(self.classes)}
        values["codebooks"] = [{"codebook": j} | part.numbers() for j, part in enumerate(self.codebooks)]
        return values | {"together": self.together.numbers()}


def semantics(
    tokens: Tokens,
    codec: Any,
    clips: int = 4000,
    classes: int = 0,
    min_clips: int = 20,
    test_fraction: float = 0.2,
    seeds: int = 3,
    epochs: int = 60,
    seed: int = 0,
    progress: bool = False,
) -> Semantics:
    """Train and test the classifiers on at most `clips` labelled clips (0: all), drawn by the seed.

    classes: the most frequent so many (0: all); min_clips: classes of fewer clips are left out. Memory: features of 4
    bytes, clips * codebooks * width of them. Raises DataError where fewer than two classes are left or a side of the
    split is empty, InputError for other arguments.
    """
    for name, value, low in (("classes", classes, 0), ("min_clips", min_clips, 1), ("seeds", seeds, 1)):
        if value < low:
            raise InputError(f"{name} must be at least {low}, not {value}")
    if epochs < 1 or not 0 < test_fraction < 1:
        raise InputError("epochs must be at least 1 and test_fraction above 0 and below 1")
    tables = feature_tables(tokens, codec)
    names, indices = _labelled(tokens, classes, min_clips)
    indices = pick_clips(indices, clips, seed)
    labels = np.array([names.index(tokens.label(i) or "") for i in indices.tolist()])
    _, held_out = split(tokens, test_fraction)  # type: ignore[arg-type]
    test = np.isin(indices, held_out)
    if test.all() or not test.any():
        raise DataError(f"of {len(indices)} clips {int(test.sum())} are for testing; change test_fraction or add clips")
    codes = read_codes(tokens, indices, progress)
    features = np.stack([mean_features(tables, codes, range(len(indices)), j) for j in range(len(tables))])
    jobs = [*features, np.concatenate(list(features), axis=1)]
    found = []
    for values in tqdm(jobs, desc="classifiers", disable=not progress):
        runs = [classify(values, labels, test, len(names), seed + i, epochs) for i in range(seeds)]
        found.append(Accuracy([run[0] for run in runs], float(np.mean([run[1] for run in runs])), int(test.sum())))
    most = np.bincount(labels[~test], minlength=len(names)).argmax()
    return Semantics(
        names,
        int((~test).sum()),
        int(test.sum()),
        1 / len(names),
        float((labels[test] == most).mean()),
        found[:-1],
        found[-1],
        features,
        labels,
    )


def classify(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    test: NDArray[np.bool_],
    classes: int,
    seed: int,
    epochs: int,
) -> tuple[float, float]:
    """Train a classifier on the clips outside `test`; its accuracy on those of `test`, and on its own.

    features [clips, C], labels [clips] within 0..classes - 1, test bool [clips]. AdamW, batches of 256, a cosine
    schedule, nothing chosen by the test clips.
    """
    mean, deviation = features[~test].mean(0), features[~test].std(0)
    usable = deviation > 1e-6 * float(np.abs(features).max(initial=1e-30))
    standard = torch.from_numpy((features[:, usable] - mean[usable]) / deviation[usable])
    targets = torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[0] ** -0.5).requires_grad_()

    width = int(usable.sum())
    weights = [normal(max(1, width), _HIDDEN), torch.zeros(_HIDDEN, requires_grad=True)]
    weights += [normal(_HIDDEN, classes), torch.zeros(classes, requires_grad=True)]
    if not width:  # all clips have the same feature
        standard = torch.zeros(len(features), 1)

    def logits(x: Tensor) -> Tensor:
        return torch.relu(x @ weights[0] + weights[1]) @ weights[2] + weights[3]

    own = torch.from_numpy(np.flatnonzero(~test))
    optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
    steps = epochs * math.ceil(len(own) / _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in own[torch.randperm(len(own), generator=generator)].split(_BATCH):
            loss = torch.nn.functional.cross_entropy(logits(standard[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = (logits(standard).argmax(1) == targets).numpy()
    return float(right[test].mean()), float(right[~test].mean())


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion."""
    z = 1.959963984540054
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def _labelled(tokens: Tokens, classes: int, min_clips: int) -> tuple[list[str], NDArray[np.int64]]:
    """The classes, the most frequent first, and their clips."""
    labels = [tokens.label(i) for i in range(len(tokens))]
    counts = Counter(label for label in labels if label)
    if not counts:
        raise DataError("no clip of this token set has a label; import clips with labels and tokenize them")
    kept = sorted(
        (name for name, count in counts.items() if count >= min_clips), key=lambda name: (-counts[name], name)
    )
    kept = kept[: classes or None]
    if len(kept) < 2:
        raise DataError(
            f"{len(kept)} of {len(counts)} classes have {min_clips} clips or more; two are needed: lower --min-clips, "
            "or tokenize more clips"
        )
    wanted = set(kept)
    return kept, np.array([i for i, label in enumerate(labels) if label in wanted], np.int64)
