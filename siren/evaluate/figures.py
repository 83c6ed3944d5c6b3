"""The figures of one embedding model: each with its interval, and with all that says how it was made.

FD      squared Frechet distance of the embeddings' Gaussians (gaussians.py); called FAD for VGGish
IS      Inception Score of the class probabilities (scores.py)
KL      mean KL(reference || generated) of the class probabilities of pairs
score   mean cosine of sound and prompt; times 100 for CLAP, as the paper prints it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .bootstrap import draw_counts, frechet_replicates, interval
from .clip_lists import prompts_digest
from .gaussians import fit_gaussian, frechet_distance
from .scores import InceptionSums, kl_divergence
from .settings import METRICS, EvaluateSettings
from .sides import Lookup, Side

if TYPE_CHECKING:
    from .embedders import Embedder

_COUNTS = 1 << 23  # of drawn clips that are in memory at once
_PAIRS = 256  # that are compared at once


class NoFigure(Exception):  # noqa: N818
    """Why there is no figure; evaluation goes on without it."""


@dataclass
class Figures:
    """`figures` as they stand in the result; `absent`, label and reason of those there are none of; `scores`, by label
    and place in the generated list, of the figures that are means over clips."""

    figures: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, str]] = field(default_factory=list)
    scores: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Measured:
    """A figure before it is told where it comes from. `range` is what it can be at all."""

    value: float
    replicates: npt.NDArray[np.float64]
    range: tuple[float, float]
    n: int
    n_reference: int | None = None
    notes: Sequence[str] = ()
    scores: dict[int, float] | None = None
    more: dict[str, Any] = field(default_factory=dict)


def label_of(metric: str, name: str) -> str:
    """What a figure is called: "FD (aisfx)". The paper's names only where the model is the paper's."""
    known = {("FD", "vggish"): "FAD (vggish)", ("score", "clap"): "CLAP score (clap)"}
    return known.get((metric, name), f"{metric} ({name})")


def compute_figures(
    embedder: Embedder,
    generated: Side,
    reference: Side | None,
    pairs: Sequence[tuple[int, int]],
    settings: EvaluateSettings,
) -> Figures:
    """All figures that this model and these lists can give, of those that are asked for."""
    made = Figures()
    for metric in settings.metrics or METRICS:
        label = label_of(metric, embedder.name)
        try:
            if metric == "FD":
                measured = _frechet(embedder, generated, reference, settings, label)
            elif metric == "IS":
                measured = _inception(embedder, generated, settings)
            elif metric == "KL":
                measured = _paired_kl(embedder, generated, reference, pairs, settings)
            else:
                measured = _text_score(embedder, generated, settings)
        except NoFigure as reason:
            if str(reason):
                made.absent.append({"label": label, "reason": str(reason)})
            continue
        low = high = None
        if len(measured.replicates):
            low, high = interval(measured.value, measured.replicates, settings.confidence, *measured.range)
        compared = metric in ("FD", "KL") and reference is not None
        made.figures.append(
            {
                "metric": "FAD" if label.startswith("FAD") else metric,
                "embedding": embedder.name,
                "label": label,
                "value": measured.value,
                "low": low,
                "high": high,
                "better": "lower" if compared else "higher",
                "identity": embedder.identity,
                "sample_rate": embedder.sample_rate,
                "n": measured.n,
                "n_reference": measured.n_reference,
                "list": generated.digest,
                "reference_list": reference.digest if compared and reference is not None else None,
                "bootstrap": len(measured.replicates),
                "confidence": settings.confidence,
                "note": "; ".join(
                    [*measured.notes, *_rate_notes(embedder, generated, reference if compared else None)]
                ),
                **measured.more,
            }
        )
        if measured.scores is not None:
            made.scores[label] = measured.scores
    return made


def _frechet(
    embedder: Embedder, generated: Side, reference: Side | None, settings: EvaluateSettings, label: str
) -> _Measured:
    from tqdm.auto import tqdm

    if reference is None:
        raise NoFigure
    sizes = [int(side.lengths.sum()) for side in (generated, reference)]
    if min(sizes) < 2:
        raise NoFigure(f"a Frechet distance needs two embeddings of each list; there are {sizes[0]} and {sizes[1]}")
    value = frechet_distance(fit_gaussian(generated.blocks), fit_gaussian(reference.blocks))
    count = frechet_replicates(settings.bootstrap, embedder.dim, *sizes)
    replicates = []
    hidden = None if settings.progress else True
    for i in tqdm(range(count), desc=f"bootstrap of {label}", unit="replicate", disable=hidden, leave=False):
        drawn = []
        for side, name in ((generated, "generated"), (reference, "reference")):
            counts = draw_counts(len(side.rows), range(i, i + 1), settings.seed, name)[0]
            drawn.append((side, counts) if counts @ side.lengths > 1 else (side, None))
        replicates.append(frechet_distance(*(fit_gaussian(side.blocks, counts) for side, counts in drawn)))
    notes = []
    if min(sizes) <= embedder.dim:
        notes.append(
            f"fewer embeddings ({min(sizes)}) than their {embedder.dim} dimensions need: biased upwards, comparable "
            "only at the same numbers of clips"
        )
    if generated.digest == reference.digest:
        notes.append("generated and reference are the same clips")
    ns = len(generated.rows), len(reference.rows)
    return _Measured(value, np.array(replicates), (0.0, math.inf), *ns, notes=notes)


def _inception(embedder: Embedder, side: Side, settings: EvaluateSettings) -> _Measured:
    n = len(side.rows)
    if not embedder.classes:
        raise NoFigure
    if n < 2:
        raise NoFigure(f"an Inception Score needs two clips; there is {n}")
    sums = InceptionSums(1, embedder.classes)
    for _, logits in side.tensors("logits"):
        sums.add(logits, np.ones((1, len(logits)), np.int64))
    replicates = []
    for portion in _portions(settings.bootstrap, n):
        counts = draw_counts(n, portion, settings.seed, "generated")
        drawn = InceptionSums(len(portion), embedder.classes)
        for rows, logits in side.tensors("logits"):
            drawn.add(logits, counts[:, rows])
        replicates.append(drawn.values())
    notes = []
    if n < embedder.classes:
        notes.append(f"fewer clips than the {embedder.classes} classes: biased downwards, and the interval is narrow")
    return _Measured(float(sums.values()[0]), _joined(replicates), (1.0, float(embedder.classes)), n, notes=notes)


def _paired_kl(
    embedder: Embedder,
    generated: Side,
    reference: Side | None,
    pairs: Sequence[tuple[int, int]],
    settings: EvaluateSettings,
) -> _Measured:
    if reference is None or not embedder.classes:
        raise NoFigure
    of = [{place: row for row, place in enumerate(side.rows)} for side in (generated, reference)]
    used = [(g, of[0][g], of[1][r]) for g, r in pairs if g in of[0] and r in of[1]]
    if not used:
        raise NoFigure("of no pair of ids could both sounds be used" if pairs else "no id is in both lists")
    ours, theirs = Lookup(generated, "logits"), Lookup(reference, "logits")
    scores: dict[int, float] = {}
    for i in range(0, len(used), _PAIRS):
        places, left, right = zip(*used[i : i + _PAIRS], strict=True)
        scores |= zip(places, kl_divergence(theirs(right), ours(left)).tolist(), strict=True)
    lone = len(generated.rows) - len(used), len(reference.rows) - len({row for _, _, row in used})
    notes = [f"{lone[0]} generated and {lone[1]} reference clips have no partner"] if any(lone) else []
    return _mean(scores, settings, "pairs", (0.0, math.inf), notes, n_reference=len({row for _, _, row in used}))


def _text_score(embedder: Embedder, side: Side, settings: EvaluateSettings) -> _Measured:
    if not embedder.text:
        raise NoFigure
    scale = 100.0 if embedder.name == "clap" else 1.0
    scores: dict[int, float] = {}
    for rows, cosines in side.tensors("scores"):
        places = side.rows[rows]
        scores |= {place: scale * float(c) for place, c in zip(places, cosines, strict=True) if not math.isnan(c)}
    if not scores:
        raise NoFigure("no clip that was used has a prompt")
    silent = len(side.rows) - len(scores)
    notes = [f"{silent} clips have no prompt"] if silent else []
    made = _mean(scores, settings, "scores", (-scale, scale), notes)
    made.more["prompts"] = prompts_digest(side.clips)
    return made


def _mean(
    scores: dict[int, float],
    settings: EvaluateSettings,
    name: str,
    limits: tuple[float, float],
    notes: Sequence[str],
    n_reference: int | None = None,
) -> _Measured:
    """The mean over clips; one clip alone has no interval."""
    values = np.array(list(scores.values()))
    n = len(values)
    replicates = [
        draw_counts(n, portion, settings.seed, name) @ values / n
        for portion in _portions(settings.bootstrap if n > 1 else 0, n)
    ]
    return _Measured(float(values.mean()), _joined(replicates), limits, n, n_reference, notes, scores)


def _portions(replicates: int, clips: int) -> list[range]:
    """The replicates in runs of which all drawn clips fit into memory."""
    size = max(1, _COUNTS // max(1, clips))
    return [range(first, min(first + size, replicates)) for first in range(0, replicates, size)]


def _joined(parts: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _rate_notes(embedder: Embedder, generated: Side, reference: Side | None) -> list[str]:
    """What the files' sample rates do to a figure: above half of its rate, a file has nothing to hear."""
    notes, heard = [], []
    for title, side in (("generated", generated), ("reference", reference)):
        if side is None:
            continue
        rates = {min(rate, embedder.sample_rate) for rate in side.rates}
        heard.append(rates)
        low = sorted(rate for rate in rates if rate < embedder.sample_rate)
        if low:
            mixed = " and higher" if max(rates) == embedder.sample_rate else ""
            notes.append(
                f"{title} files of {', '.join(map(str, low))} Hz{mixed}, embedded at {embedder.sample_rate} Hz"
            )
    if any(len(rates) > 1 for rates in heard) or (len(heard) > 1 and heard[0] != heard[1]):
        notes.append("the rates differ, which moves the figure")
    return notes
