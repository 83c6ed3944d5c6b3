"""The rows of the decode benchmark: what one says, all as a table, all as a picture."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import arms as decoders
import numpy as np

from siren import SirenConfig

FRAME_MS = 20.0


def summarise(
    config: SirenConfig,
    name: str,
    batch: int,
    seconds: list[float],
    first: int,
    tokens: int,
    bandwidth: float,
    naive: float | None,
    each: int = 1,
) -> dict[str, Any]:
    """One row: `seconds` a frame, from frame number `first` on; each of them may be the mean of `each` frames."""
    ms = [1e3 * value for value in seconds]
    last = first + each * len(ms)
    median = statistics.median(ms)
    weights = name.split("-")[1]
    moved = decoders.moved_bytes(config, weights, batch, (first + last) / 2, tokens)
    low, high = np.percentile(ms, [10, 90])
    return {
        "arm": name,
        "batch": batch,
        "frames": [first, last],
        "ms": median,
        "ms_p10": float(low),
        "ms_p90": float(high),
        "times_real_time": batch * FRAME_MS / median,
        "ratio_to_naive_bf16": naive / median if naive else None,
        "gb_moved": sum(moved.values()) / 1e9,
        "gb_moved_parts": {part: value / 1e9 for part, value in moved.items()},
        "share_of_bandwidth": sum(moved.values()) / (median / 1e3 * bandwidth),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = [
        "decoder",
        "batch",
        "frames",
        "ms a frame",
        "10% to 90%",
        "x real time",
        "x naive bf16",
        "GB a frame",
        "of bandwidth",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        ratio = row["ratio_to_naive_bf16"]
        digits = ".1f" if row["ms"] >= 10 else ".3f"
        cells = [
            row["arm"],
            str(row["batch"]),
            f"{row['frames'][0]} to {row['frames'][1]}",
            f"{row['ms']:{digits}}",
            f"{row['ms_p10']:{digits}} to {row['ms_p90']:{digits}}",
            f"{row['times_real_time']:.2f}",
            f"{ratio:.2f}" if ratio else "",
            f"{row['gb_moved']:.2f}",
            f"{row['share_of_bandwidth']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def residual_table(rows: list[dict[str, Any]]) -> str:
    """Rows of residual(), one frame's work after the backbones, as Markdown; nothing where there are none."""
    if not rows:
        return ""
    head = ["residual()", "batch", "us a call", "10% to 90%", "GB", "of bandwidth"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = [row["arm"], str(row["batch"]), f"{row['us']:.0f}", f"{row['us_p10']:.0f} to {row['us_p90']:.0f}"]
        cells += [f"{row['gb_moved']:.2f}", f"{row['share_of_bandwidth']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_picture(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar a row, its share of the bandwidth written on it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'siren[pictures]')", file=sys.stderr)
        return
    pytorch = {"naive": "#b0b7c0", "graph": "#96a0ab", "compile": "#7d8894"}
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['arm']}, batch {row['batch']}, frame {row['frames'][1]}" for row in rows]
    values = [row["ms"] for row in rows]
    bars = axes.barh(range(len(rows)), values, color=[pytorch.get(row["arm"].split("-")[0], "#1f77b4") for row in rows])
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    notes = [
        f"{row['ms']:{'.0f' if row['ms'] >= 10 else '.2f'}} ms, {row['share_of_bandwidth']:.0%} of bandwidth"
        for row in rows
    ]
    axes.bar_label(bars, notes, padding=4, fontsize=8)
    axes.set_xlim(0, 1.45 * max(values))
    axes.set_xlabel("ms a frame (20 ms is real time for one clip)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
