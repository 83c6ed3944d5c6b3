"""The figures of align.py as a Markdown table."""

from __future__ import annotations

import statistics
from typing import Any

PARTS = ("rollout", "codec", "reward", "update")


def summarise(steps: list[dict[str, float]], naive: list[dict[str, float]]) -> dict[str, Any]:
    """Of one arm's steps: medians, busy seconds of each part, and ratios to the naive arm's step of the same round."""
    ratios = [other["step_seconds"] / own["step_seconds"] for own, other in zip(steps, naive, strict=True)]
    rates = [step["rollout_frames"] / step["rollout_seconds"] for step in steps]
    naive_rates = [step["rollout_frames"] / step["rollout_seconds"] for step in naive]
    rate_ratios = [own / other for own, other in zip(rates, naive_rates, strict=True)]
    return {
        "frames_per_second": statistics.median(rates),
        "frames_per_second_all": rates,
        "rollout_ratio_to_naive": statistics.median(rate_ratios),
        "rollout_ratio_to_naive_all": rate_ratios,
        "step_seconds": statistics.median(step["step_seconds"] for step in steps),
        "step_ratio_to_naive": statistics.median(ratios),
        "step_ratio_to_naive_all": ratios,
        "parts": {
            part: {
                "seconds": statistics.median(step[f"{part}_seconds"] for step in steps),
                "share": statistics.median(step[f"{part}_seconds"] / step["step_seconds"] for step in steps),
            }
            for part in PARTS
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; a part is its busy seconds and their share of the step."""
    head = ["decoder", "frames/s", "x naive", "(lowest to highest)", "step, s", "x naive", "(lowest to highest)"]
    head += [f"{part}, s" for part in PARTS]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = [row["arm"], f"{row['frames_per_second']:.0f}"]
        cells += _ratios(row["rollout_ratio_to_naive"], row["rollout_ratio_to_naive_all"])
        cells += [f"{row['step_seconds']:.2f}"]
        cells += _ratios(row["step_ratio_to_naive"], row["step_ratio_to_naive_all"])
        cells += [f"{part['seconds']:.2f} ({part['share']:.0%})" for part in row["parts"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratios(middle: float, every: list[float]) -> list[str]:
    return [f"{middle:.2f}", f"{min(every):.2f} to {max(every):.2f}"]
