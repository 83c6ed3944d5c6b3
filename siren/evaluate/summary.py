"""A result of an evaluation in a few lines of text."""

from __future__ import annotations

from typing import Any

from .compare import number


def summary(result: dict[str, Any]) -> str:
    """What the command prints: a line for each figure with value, interval and N, then notes and what was skipped."""
    if "figures" not in result:
        return f"{result['work']}: {result['parts']} parts of this shard are there"
    rows = [["figure", "value", "interval", "N", ""]]
    notes = []
    for figure in result["figures"]:
        between = "" if figure["low"] is None else f"{number(figure['low'])} .. {number(figure['high'])}"
        n = str(figure["n"]) + ("" if figure["n_reference"] is None else f" / {figure['n_reference']}")
        rows.append([figure["label"], number(figure["value"]), between, n, f"{figure['better']} is better"])
        if figure["note"]:
            notes.append(f"{figure['label']}: {figure['note']}")
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]
    for title in ("generated", "reference"):
        about = result[title]
        if about is not None:
            skipped = ", ".join(f"{count} {reason}" for reason, count in about["skipped"].items())
            line = f"{title}: {about['used']} of {about['clips']} clips used" + (
                f"; skipped: {skipped}" if skipped else ""
            )
            lines.append(line + (f"; clipped: {about['clipped']}" if about["clipped"] else ""))
    lines += [f"note: {note}" for note in notes]
    lines += [f"no {one['label']}: {one['reason']}" for one in result["absent"]]
    return "\n".join(lines)
