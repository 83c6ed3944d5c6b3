"""Pictures of the studies of a codec: figures 2 (a), 2 (c), 8 and 9 of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import InputError
from ..pretrained import missing
from .cosine import VIEWS, Cosines
from .features import pick_clips
from .figures import bare, new_figure, png, shades
from .semantics import Semantics

_MOST_CLASSES = 15  # that colours can tell apart; the paper's data set has as many
_MOST_POINTS = 1200  # t-SNE takes seconds for these


def draw_cosine(found: Cosines) -> bytes:
    """Figure 2 (a), as the paper has it and centred, above the grid of all pairs, figure 8."""
    figure = new_figure(13, 16)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.6))
    rows = top.subplots(1, 4, sharex=True)
    titles = ("as the decoder adds them up", "mean taken out", "clip's mean feature", "clip's mean, centred")
    for axes, view, title in zip(rows, VIEWS, titles, strict=True):
        intervals = found.by_interval(view)
        for (step, spread), colour in zip(intervals.items(), shades(len(intervals)), strict=True):
            axes.stairs(spread.density(), spread.edges(), color=colour, label=f"{step}")
        reference = found.overall(view, permuted=True)
        axes.stairs(reference.density(), reference.edges(), color="#d62728", linestyle="--", label="permuted")
        whole = found.overall(view)
        axes.set_title(f"{title}\n{whole.mean:+.3f} ± {whole.std:.3f}", fontsize=11)
        axes.set_xlabel("cosine")
        axes.set_xlim(-1, 1)
        axes.set_yticks([])
        bare(axes)
    rows[0].set_ylabel("density")
    rows[-1].legend(title="interval", fontsize=8, ncols=2, frameon=False)
    top.suptitle(f"Cosine of two codebooks' features at the same frame ({found.clips} clips, {found.frames} frames)")
    axes = bottom.subplots()
    bottom.suptitle("All pairs: density of the cosine from -1 to 1, as it is (filled) and centred (line); means above")
    _grid(axes, found)
    return png(figure)


def _grid(axes: Any, found: Cosines) -> None:
    """Below the diagonal the densities of each pair, above it the two means, coloured by the first."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    count = found.codebooks
    tallest = max(s.density().max() for s in found.pairs["features"].values())
    tallest_centred = max(s.density().max() for s in found.pairs["centred"].values())
    for (j, k), spread in found.pairs["features"].items():
        centred = found.pairs["centred"][j, k]
        middles = (spread.edges()[:-1] + spread.edges()[1:]) / 2
        x = j + 0.5 + 0.46 * middles
        axes.fill_between(x, k + 0.95, k + 0.95 - 0.85 * spread.density() / tallest, color="#3b528b", linewidth=0)
        axes.plot(x, k + 0.95 - 0.85 * centred.density() / tallest_centred, color="#e76f51", linewidth=1)
        axes.plot([j + 0.5] * 2, [k + 0.05, k + 0.95], color="#999999", linewidth=0.5, linestyle=":")
        colour = colormaps["RdBu_r"](0.5 + 0.5 * spread.mean)
        axes.add_patch(Rectangle((k, j), 1, 1, color=colour, linewidth=0))
        dark = abs(spread.mean) > 0.6
        text = f"{spread.mean:+.2f}\n({centred.mean:+.2f})"
        axes.text(k + 0.5, j + 0.5, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    axes.set_xticks(np.arange(count) + 0.5, [str(j + 1) for j in range(count)])
    axes.set_yticks(np.arange(count) + 0.5, [str(j + 1) for j in range(count)])
    axes.set_xticks(np.arange(count + 1), minor=True)
    axes.set_yticks(np.arange(count + 1), minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("codebook")
    axes.set_ylabel("codebook")


def draw_semantics(found: Semantics, seed: int = 0, progress: bool = False) -> bytes:
    """Figure 9: t-SNE of each codebook's features in the classes' colours; below, the accuracies with their intervals.

    Drawn are at most 1,200 clips of the 15 most frequent classes. Raises MissingDependencyError without scikit-learn.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise missing("scikit-learn", "studies") from error
    from matplotlib import colormaps

    count = len(found.codebooks)
    drawn = min(_MOST_CLASSES, len(found.classes))
    clips = pick_clips(np.flatnonzero(found.labels < drawn), _MOST_POINTS, seed)
    if len(clips) < 4:
        raise InputError(f"t-SNE needs four clips or more, not {len(clips)}")
    columns = 4
    lines = -(-count // columns)
    figure = new_figure(13, 3.1 * lines + 4.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.1 * lines, 4.4))
    cells = top.subplots(lines, columns, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
    for j in tqdm(range(count), desc="t-SNE", disable=not progress):
        points = TSNE(
            n_components=2, init="pca", perplexity=min(30, (len(clips) - 1) / 3), random_state=seed
        ).fit_transform(_standard(found.features[j][clips]))
        for i in range(drawn):
            own = found.labels[clips] == i
            cells[j].scatter(*points[own].T, s=9, color=colormaps["tab20"](i), linewidths=0, label=found.classes[i])
        cells[j].set_title(f"codebook {j + 1}: {found.codebooks[j].mean:.1%}", fontsize=11)
    handles, labels = cells[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=8, fontsize=8, frameon=False, markerscale=2)
    axes = bottom.subplots()
    axes.set_title(
        f"Top-1 accuracy on {found.test_clips} test clips of {len(found.classes)} classes, "
        f"{len(found.together.by_seed)} seeds, 95% intervals",
        fontsize=11,
    )
    x = np.arange(1, count + 1)
    means = np.array([part.mean for part in found.codebooks])
    low, high = np.array([part.interval for part in found.codebooks]).T
    axes.errorbar(x, means, (means - low, high - means), color="#3b528b", marker="o", capsize=3, label="one codebook")
    axes.axhline(found.together.mean, color="#2a9d8f", linestyle="--", label="all codebooks together")
    axes.axhspan(*found.together.interval, color="#2a9d8f", alpha=0.12, linewidth=0)
    axes.axhline(found.chance, color="#999999", linestyle=":", label="chance")
    axes.set_xticks(x)
    axes.set_ylim(0, None)
    axes.set_xlabel("codebook")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)
    bare(axes)
    return png(figure)


def _standard(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """As the classifiers see them: mean 0 and deviation 1, but for what does not vary."""
    deviation = features.std(0)
    usable = deviation > 1e-6 * float(np.abs(features).max(initial=1e-30))
    if not usable.any():
        return np.zeros((len(features), 2), np.float32)
    standard: NDArray[np.float32] = (features[:, usable] - features[:, usable].mean(0)) / deviation[usable]
    return standard
