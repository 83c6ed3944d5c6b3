"""Results of several evaluations side by side. Figures that were made differently never share a column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

_FORMAT = "siren-evaluation 1"
_MAX_BYTES = 64 << 20


def read_result(path: str | Path) -> dict[str, Any]:
    """The result of an evaluation. Raises DataError for a file that is none."""
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        values = json.loads(data) if len(data) <= _MAX_BYTES else None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise DataError(f"{path} is no result of siren evaluate")
    return values | {"path": str(path)}


def column_of(figure: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same for two figures to be compared: metric, model and its weights, sample rate, reference or
    (of scores) prompts. The number of clips stands in the cell."""
    names = ("label", "metric", "identity", "sample_rate", "reference_list", "prompts")
    return tuple(figure.get(name) for name in names)


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row for each result, a column for each kind of figure, and below it what the columns are.

    The best value of a column that all results have is bold. Labels that two columns would share are numbered. Raises
    DataError for a result without its keys.
    """
    try:
        columns = {column_of(figure): figure for result in results for figure in result["figures"]}
        labels = [figure["label"] for figure in columns.values()]
        titles = {}
        for i, (column, figure) in enumerate(columns.items()):
            number = labels[: i + 1].count(figure["label"])
            titles[column] = figure["label"] + (f" [{number}]" if labels.count(figure["label"]) > 1 else "")
        rows = [{column_of(figure): figure for figure in result["figures"]} for result in results]
        best = {}
        for column, example in columns.items():
            values = [row[column]["value"] for row in rows if column in row]
            if len(values) == len(rows) > 1:
                best[column] = min(values) if example["better"] == "lower" else max(values)
        arrows = {"lower": "↓", "higher": "↑"}
        head = ["result", *(f"{titles[c]} {arrows[figure['better']]}" for c, figure in columns.items())]
        lines = [_line(head), _line(["---"] * len(head))]
        for result, row in zip(results, rows, strict=True):
            name = result.get("path") or result["generated"]["list"]
            cells = [_cell(row[c], best.get(c)) if c in row else "" for c in columns]
            lines.append(_line([str(name).replace("|", "\\|"), *cells]))
        notes = [
            f"- {titles[c]}: {figure['identity']}, heard at {figure['sample_rate']} Hz"
            + (f", reference {figure['reference_list'][:12]}" if figure["reference_list"] else "")
            + (f", prompts {figure['prompts'][:12]}" if figure.get("prompts") else "")
            for c, figure in columns.items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"a result of siren evaluate is damaged ({type(error).__name__}: {error})") from error
    return "\n".join([*lines, "", *notes]) + "\n"


def _cell(figure: dict[str, Any], best: float | None) -> str:
    value = number(figure["value"])
    value = f"**{value}**" if figure["value"] == best else value
    if figure["low"] is not None:
        value += f" ({number(figure['low'])} to {number(figure['high'])})"
    return f"{value}, N={figure['n']}"


def number(value: float) -> str:
    """Four digits, or as many as an integer part has."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
