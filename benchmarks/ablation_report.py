"""The ablations as Markdown and as a picture: the paper's figures beside ours, and whether the order is the same."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from ablation_tables import ABSENT, COLUMNS, ITG, TABLES, Row

from siren.errors import InputError

Figure = dict[str, float]  # value, low, high


def report(value: dict[str, Any]) -> str:
    """The results of ablations.py as Markdown."""
    parts = [about(value)]
    for number, table in TABLES.items():
        rows = [row for row in table.rows if row.arm in value["arms"]]
        if len(rows) < 2:
            continue
        parts.append(f"### Table {number}: {table.title}\n\n" + table_of(value, table.columns, rows))
        found = (f"- {verdict(value, column, i, rows)}" for i, column in enumerate(table.columns))
        parts.append("\n".join(_wrapped(line, "  ") for line in found))
        if table.note:
            parts.append(_wrapped(table.note))
    return "\n\n".join([*parts, all_arms(value)]) + "\n"


def about(value: dict[str, Any]) -> str:
    """What was measured on what, at which scale."""
    scale, machine = value["scale"], value["about"]
    seeds = ", ".join(map(str, value["seeds"]))
    minutes = sum(run["seconds"]["training"] for arm in value["arms"].values() for run in arm["runs"].values()) / 60
    text = (
        f"Scale: {scale['updates']} updates of {scale['batch_size']} clips of {scale['seconds']:g} s "
        f"({value['training_clips']} clips of {value['labels']} kinds of synthetic sound), learning rate "
        f"{scale['learning_rate']:g}; alignment {scale['align_steps']} steps of 64 rollouts. Judged on "
        f"{value['clips']} held-out clips: loss, and one sound for the first caption of each, temperature "
        f"{scale['temperature']:g}, guidance {scale['guidance_scale']:g}. Seeds: {seeds}. Training took "
        f"{minutes:.0f} minutes of one thread in all, beside other work ({machine['cpu']}, {machine['cores']} cores, "
        f"torch {machine['torch']}, {machine['date'][:10]}, commit {machine['commit']})."
    )
    names = ", ".join(value["embeddings"].values())
    about_figures = (
        f"Embeddings: {names}. Values are means over the seeds; in brackets the lowest and the highest "
        "bound of the seeds' 95% intervals (bootstrap over clips)."
    )
    return f"{_wrapped(text)}\n\n{_wrapped(about_figures)}"


def table_of(value: dict[str, Any], columns: Sequence[str], rows: Sequence[Row]) -> str:
    """One table, with a column of the paper beside each of ours."""
    head = ["Row", "Arm", "Parameters"]
    for column in columns:
        head += [f"{column}, paper", f"{COLUMNS[column][1]}, here"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in rows:
        cells = [row.name, row.arm, f"{value['arms'][row.arm]['parameters'] / 1e6:.1f} M"]
        for i, column in enumerate(columns):
            cells += [_paper(row.paper[i]), show(figures(value, row.arm, COLUMNS[column][1]))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(value: dict[str, Any], column: str, place: int, rows: Sequence[Row]) -> str:
    """One sentence: is the paper's order found?

    Two rows are told apart if their intervals do not overlap in any seed, in the same direction each time. A row that
    the paper could not generate with counts as its worst; two such rows say nothing about each other, and a row without
    a figure of the paper is left out.
    """
    less, label = COLUMNS[column]
    rows = [row for row in rows if row.paper[place] != ABSENT]
    same = other = open_ = 0
    for a, b in itertools.combinations(rows, 2):
        expected = _compare(_worst(a.paper[place], less), _worst(b.paper[place], less))
        if expected == 0:
            continue
        found = {
            _separate(x, y) for x, y in zip(figures(value, a.arm, label), figures(value, b.arm, label), strict=True)
        }
        direction = found.pop() if len(found) == 1 else 0
        same += direction == expected
        other += direction == -expected
        open_ += direction == 0
    order = sorted(rows, key=lambda row: _mean(figures(value, row.arm, label)), reverse=not less)
    paper = sorted(rows, key=lambda row: _worst(row.paper[place], less), reverse=not less)
    agreed = "the paper's order" if order == paper else "not the paper's order"
    text = f"**{column}** by {label}: here {' < '.join(row.name for row in order)} (best first), {agreed}"
    text += f"; of {same + other + open_} pairs {same} are as in the paper, {other} the other way round"
    return text.replace(" < ", ", ") + f", {open_} not told apart."


def all_arms(value: dict[str, Any]) -> str:
    """Every figure of every arm."""
    labels = [*value["codec"], "Loss Mean", "Loss Ratio"]
    lines = ["### All arms", "", "| Arm | Parameters | Training, minutes | " + " | ".join(labels) + " |"]
    lines.append("| --- |" + " ---: |" * (len(labels) + 2))
    for name, arm in value["arms"].items():
        minutes = np.mean([run["seconds"]["training"] for run in arm["runs"].values()]) / 60
        cells = [name, f"{arm['parameters'] / 1e6:.1f} M", f"{minutes:.1f}"]
        cells += [show(figures(value, name, label)) for label in labels]
        lines.append("| " + " | ".join(cells) + " |")
    cells = ["held-out clips after the codec", "", ""] + [show([figure]) for figure in value["codec"].values()]
    return "\n".join([*lines, "| " + " | ".join([*cells, "", ""]) + " |"])


def draw(value: dict[str, Any]) -> bytes:
    """PNG: each table a row, each column a panel; rows from the top in the paper's order, dots are seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    shown = {number: [row for row in table.rows if row.arm in value["arms"]] for number, table in TABLES.items()}
    shown = {number: rows for number, rows in shown.items() if len(rows) > 1}
    if not shown:
        raise InputError("there is no table with two rows to draw")
    width = max(len(TABLES[number].columns) for number in shown)
    heights = [0.9 + 0.28 * len(rows) for rows in shown.values()]
    canvas = Canvas(figsize=(2.9 * width + 1.4, sum(heights) + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(len(shown), width, squeeze=False, height_ratios=heights)
    for line, (number, rows) in zip(panels, shown.items(), strict=True):
        columns = TABLES[number].columns
        for panel in line[len(columns) :]:
            panel.set_axis_off()
        for i, (panel, column) in enumerate(zip(line, columns, strict=False)):
            less, label = COLUMNS[column]
            known = [row for row in rows if row.paper[i] != ABSENT]
            ordered = sorted(known, key=lambda row: _worst(row.paper[i], less), reverse=not less)
            for y, row in enumerate(ordered):
                for j, figure in enumerate(figures(value, row.arm, label)):
                    height = y + 0.12 * j
                    panel.plot([figure["low"], figure["high"]], [height, height], color="#3b528b", linewidth=1.5)
                    panel.plot(figure["value"], height, "o", color="#3b528b", markersize=4)
            panel.set_yticks(
                range(len(ordered)), [f"{row.name} ({_paper(row.paper[i])})" for row in ordered], fontsize=6
            )
            panel.set_ylim(len(ordered) - 0.5, -0.5)
            panel.tick_params(axis="x", labelsize=6)
            better = "\u2190 better" if less else "better \u2192"
            panel.set_title(f"{number}: {column} / {label}, {better}", fontsize=6.5, loc="left")
            panel.spines[["top", "right"]].set_visible(False)
    canvas.supxlabel(
        "titles: table, the paper's column / ours; labels: row and the paper's figure, its best on top; intervals: 95%",
        fontsize=7,
    )
    file = io.BytesIO()
    canvas.savefig(file, format="png")
    return file.getvalue()


def figures(value: dict[str, Any], arm: str, label: str) -> list[Figure]:
    """A figure of an arm, one for each seed."""
    return [run["figures"][label] for run in value["arms"][arm]["runs"].values()]


def show(values: Sequence[Figure]) -> str:
    """The mean, and the outermost bounds."""
    low, high = min(figure["low"] for figure in values), max(figure["high"] for figure in values)
    return f"{_mean(values):.3g} ({low:.3g} to {high:.3g})"


def interval(rows: np.ndarray, statistic: Any, seed: int = 0, replicates: int = 1000) -> Figure:
    """statistic(rows) for rows [clips, ...], with its 95% percentile interval over resampled clips."""
    generator = np.random.Generator(np.random.Philox(seed))
    draws = [statistic(rows[generator.integers(0, len(rows), len(rows))]) for _ in range(replicates)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": float(statistic(rows)), "low": float(low), "high": float(high)}


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _mean(values: Sequence[Figure]) -> float:
    return float(np.mean([figure["value"] for figure in values]))


def _separate(a: Figure, b: Figure) -> int:
    """-1 if a is surely less than b, 1 if it is surely more, 0 if the intervals overlap."""
    return -1 if a["high"] < b["low"] else int(a["low"] > b["high"])


def _compare(a: float, b: float) -> int:
    return int(a > b) - int(a < b)


def _worst(value: float | str, less: bool) -> float:
    if value == ITG:
        return np.inf if less else -np.inf
    return float(value)


def _paper(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
