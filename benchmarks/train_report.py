"""The figures of train.py as a Markdown table and as a picture."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def summarise(
    steps: list[list[float]], naive: list[list[float]] | None, valid: list[int], parts: Sequence[str]
) -> dict[str, Any]:
    """Of one arm's steps, seconds of each part: medians, and ratios to the naive arm's step of the same round."""
    totals = [sum(step) for step in steps]
    rates = [frames / total for frames, total in zip(valid, totals, strict=True)]
    ratios = [sum(other) / own for other, own in zip(naive, totals, strict=True)] if naive else []
    return {
        "seconds": statistics.median(totals),
        "frames_per_second": statistics.median(rates),
        "frames_per_second_all": rates,
        "ratio_to_naive": statistics.median(ratios) if ratios else None,
        "ratio_to_naive_all": ratios,
        "parts": {name: statistics.median(step[i] for step in steps) for i, name in enumerate(parts)},
    }


def table(rows: list[dict[str, Any]], parts: Sequence[str]) -> str:
    head = ["arm", "precision", "clips, s", "filled", "frames/s", "x naive", "(lowest to highest)", "step, s", *parts]
    head += ["peak MB", "of naive's"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | --- |" + " ---: |" * (len(head) - 3)]
    for row in rows:
        ratios = row["ratio_to_naive_all"]
        cells = [row["arm"], row["precision"], row["clips"], f"{row['filled']:.0%}", f"{row['frames_per_second']:.0f}"]
        cells += [f"{row['ratio_to_naive']:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"] if ratios else ["", ""]
        cells += [f"{row['seconds']:.3f}", *(f"{row['parts'][name]:.3f}" for name in parts)]
        peak, share = row.get("peak_bytes"), row.get("memory_to_naive")
        cells += [f"{peak / 1e6:.0f}" if peak else "", f"{share:.2f}" if share else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_picture(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar a row: valid frames a second, with the ratio to the naive arm written on it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'siren[pictures]')", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['arm']}, {row['precision']}, clips of {row['clips']} s" for row in rows]
    values = [row["frames_per_second"] for row in rows]
    colours = ["#1f77b4" if row["arm"].startswith("siren") else "#b0b7c0" for row in rows]
    bars = axes.barh(range(len(rows)), values, color=colours)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    notes = []
    for row in rows:
        ratio, share = row["ratio_to_naive"], row.get("memory_to_naive")
        note = f"{row['frames_per_second']:.0f}" + (f", {ratio:.2f} x naive" if ratio else "")
        notes.append(note + (f", {share:.2f} of its memory" if share else ""))
    axes.bar_label(bars, notes, padding=4, fontsize=8)
    axes.set_xlim(0, 1.6 * max(values))
    axes.set_xlabel("valid frames a second (one is 20 ms of sound, 12 codes)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")
