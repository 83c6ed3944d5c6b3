"""Pictures of the studies of a training: figures 2 (b), 2 (d), 6 and 7 of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np

from .convergence import Convergence
from .figures import bare, new_figure, png, shades
from .gradients import Gradients
from .task_vectors import KINDS, MODULES, TaskVectors

_SIZES = {"attention": 60, "cross-attention": 34, "feed-forward": 110, "norm": 10, "other": 34}


def draw_gradients(found: Gradients) -> bytes:
    """Figure 2 (b): the angles between the heads, beside those of a head with itself; and the mean of each pair."""
    figure = new_figure(13, 9)
    for row, (kind, title) in zip(
        figure.subplots(2, 2, width_ratios=(1.3, 1), squeeze=False),
        (("averaged", "averaged over outputs, as in the paper"), ("whole", "whole gradients")),
        strict=True,
    ):
        axes, grid = row
        heads, same = found.overall(kind), found.overall_same_head(kind)
        axes.stairs(heads.density(), heads.edges(), fill=True, alpha=0.7, color="#3b528b", label="two heads, one batch")
        axes.stairs(same.density(), same.edges(), color="#e76f51", linewidth=1.5, label="one head, two batches")
        known = [angle for angle in found.without_noise[kind].values() if np.isfinite(angle)]
        if known:
            label = f"two heads, without noise ({len(known)} of {len(found.without_noise[kind])} pairs)"
            axes.plot(known, np.zeros(len(known)), "|", color="black", markersize=14, label=label, clip_on=False)
        axes.axvline(90, color="#999999", linestyle=":", linewidth=1)
        axes.set_title(f"{title}: {heads.mean:.1f} ± {heads.std:.1f} degrees", fontsize=11)
        axes.set_xlim(0, 180)
        axes.set_xticks(range(0, 181, 30))
        axes.set_xlabel("angle (degrees)")
        axes.set_ylabel("density")
        axes.legend(frameon=False, fontsize=9)
        bare(axes)
        _angles(figure, grid, found, kind)
    figure.suptitle(
        f"Gradients of the heads in the backbone's last block: {found.batches} batches, {found.clips} clips"
    )
    return png(figure)


def _angles(figure: Any, axes: Any, found: Gradients, kind: str) -> None:
    """A square of the mean angles; the diagonal is a head with itself on another batch."""
    count = len(found.codebooks)
    square = np.full((count, count), np.nan)
    place = {j: i for i, j in enumerate(found.codebooks)}
    for (j, k), spread in found.pairs[kind].items():
        square[place[j], place[k]] = square[place[k], place[j]] = spread.mean
    for j, spread in found.same_head[kind].items():
        square[place[j], place[j]] = spread.mean
    image = axes.imshow(square, cmap="RdBu_r", vmin=0, vmax=180)
    for (a, b), angle in np.ndenumerate(square):
        if np.isfinite(angle):
            axes.text(b, a, f"{angle:.0f}", ha="center", va="center", fontsize=8)
    labels = [str(j + 1) for j in found.codebooks]
    axes.set_xticks(range(count), labels)
    axes.set_yticks(range(count), labels)
    axes.set_title("mean angle; diagonal: one head, two batches", fontsize=10)
    axes.set_xlabel("codebook")
    figure.colorbar(image, ax=axes, label="degrees")


def draw_convergence(found: Convergence) -> bytes:
    """Figure 6: smoothed losses, one curve a codebook, and what is left at the end."""
    figure = new_figure(13, 5)
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    for (j, (updates, losses)), colour in zip(found.curves.items(), shades(len(found.curves)), strict=True):
        left.plot(updates, losses, color=colour, linewidth=1.3, label=str(j + 1))
        left.plot(found.reached[j], losses[np.searchsorted(updates, found.reached[j])], "o", color=colour, markersize=4)
    left.set_xlabel("update")
    left.set_ylabel("cross-entropy (nats)")
    left.set_title(f"training loss, mean of {found.window} updates; dots: within 5% of the end", fontsize=11)
    left.legend(title="codebook", ncols=2, fontsize=8, frameon=False)
    x = np.array(list(found.final)) + 1
    right.plot(x, list(found.final.values()), "o-", color="#3b528b", label="training")
    if found.validation:
        last = {j: losses[-1] for j, (_, losses) in found.validation.items()}
        right.plot(np.array(list(last)) + 1, list(last.values()), "s-", color="#e76f51", label="validation")
    right.set_ylim(0, None)
    right.set_ylabel("final cross-entropy (nats)")
    title = "final loss" if found.loss_ratio is None else f"final loss; ratio last / first {found.loss_ratio:.2f}"
    right.set_title(title, fontsize=11)
    if found.entropy is not None:
        shares = {j: loss / found.entropy[j] for j, loss in found.final.items() if found.entropy[j] > 0}
        twin = right.twinx()
        twin.plot(np.array(list(shares)) + 1, list(shares.values()), "^--", color="#2a9d8f", label="training / entropy")
        twin.set_ylim(0, None)
        twin.set_ylabel("share of the unigram entropy", color="#2a9d8f")
        twin.spines["top"].set_visible(False)
    else:
        bare(right)
    right.set_xticks(x)
    right.set_xlabel("codebook")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    bare(left)
    return png(figure)


def draw_task_vectors(found: TaskVectors) -> bytes:
    """Figure 7: a box and a circle a layer for each module; the red number is an early state against the last."""
    figure = new_figure(10, 5.6)
    axes = figure.subplots()
    lowest = highest = 0.0
    for place, module in enumerate(MODULES):
        layers = [layer for layer in found.of(module) if np.isfinite(layer.mean)]
        if not layers:
            continue
        means = np.array([layer.mean for layer in layers])
        lowest, highest = min(lowest, means.min()), max(highest, means.max())
        box = axes.boxplot(
            means, positions=[place], orientation="horizontal", whis=(0, 100), widths=0.5, patch_artist=True
        )
        box["boxes"][0].set(facecolor="#dfe7f3", edgecolor="#3b528b")
        box["medians"][0].set(color="#3b528b")
        for kind in KINDS:
            own = np.array([layer.mean for layer in layers if layer.kind == kind])
            spread = np.linspace(-0.16, 0.16, len(own)) if len(own) > 1 else np.zeros(len(own))
            style = {"s": _SIZES[kind], "color": f"C{KINDS.index(kind)}", "alpha": 0.65, "linewidths": 0, "zorder": 3}
            axes.scatter(own, place + spread, **style)
        early = [layer.early for layer in layers if layer.early is not None and np.isfinite(layer.early)]
        if early:
            axes.text(
                1.01, place, f"{np.mean(early):.2f}", color="#d62728", transform=axes.get_yaxis_transform(), va="center"
            )
    for kind in KINDS:
        axes.scatter([], [], s=_SIZES[kind], color=f"C{KINDS.index(kind)}", alpha=0.65, linewidths=0, label=kind)
    axes.axvline(0, color="#999999", linewidth=0.8, linestyle=":")
    margin = 0.05 * max(highest - lowest, 0.02)
    axes.set_xlim(lowest - margin, highest + margin)
    axes.set_yticks(range(len(MODULES)), MODULES)
    axes.set_ylim(-0.6, len(MODULES) - 0.4)
    axes.set_xlabel(f"cosine of the task vectors, mean over {len(found.layers[0].pairs)} pairs of experts")
    start = "the same" if found.same_start else "DIFFERENT"
    title = f"Task vectors of {len(found.experts)} experts from {start} initial weights"
    axes.set_title(title + ("; red: early with last state" if found.early_steps else ""), fontsize=11)
    figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=5)
    bare(axes)
    return png(figure)
