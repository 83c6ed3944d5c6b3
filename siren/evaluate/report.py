"""The results of an evaluation as one page of HTML: it opens from disk, and loads nothing from anywhere.

Figures of different embedding models stand in different tables, because they cannot be compared. Spectrograms and plots
are drawn here, in the colours of the page, so the page needs no matplotlib.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .report_clips import clips_section
from .report_plots import histogram, interval_plot, scatter
from .report_sounds import score_of
from .report_style import SCRIPT, STYLE
from .report_text import cut, decimals, escape, finite, hashes, number

_MAX_SKIPS = 50  # rows
_MAX_SCORES = 12  # histograms, and scores of a clip
_MEANINGS = {
    "FD": "Fréchet distance",
    "FAD": "Fréchet audio distance",
    "IS": "inception score",
    "KL": "Kullback-Leibler divergence",
    "score": "cosine of sound and prompt",
}
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"


def report_html(result: dict[str, Any], clips: Iterable[dict[str, Any]], base: Path) -> str:
    """The page for the results of `siren evaluate` and its clips, whose sounds are files in `base` or absolute.

    At most 24 clips are shown, best, middle and worst by the first score, with at most 10 s of sound each; the page
    stays below 20 MB however many there are. A clip whose file is gone or damaged is shown with that said.
    `result["scatter"]`, if it is there, has for a label {"generated": [[x, y], ...], "reference": [[x, y], ...]}.

    The page depends on the arguments and the files only: made again it is the same. Raises MissingDependencyError if
    soundfile does not import.
    """
    every = list(clips)
    scores = list(dict.fromkeys(name for clip in every for name in clip.get("scores") or {}))[:_MAX_SCORES]
    better = {figure["label"]: figure.get("better") for figure in result.get("figures") or []}
    sections = [
        _measured(result),
        _figures(result),
        _histograms(every, scores, better),
        _scatters(result.get("scatter") or {}),
        clips_section(every, scores, better, Path(base)),
    ]
    title = f"Evaluation of {cut(result['generated']['list'])}"
    about = result.get("about") or {}
    made = [f"siren {about['siren']}" if "siren" in about else "", str(about.get("date", ""))]
    made.append(f"made in {result['seconds']:.1f} s" if finite(result.get("seconds")) is not None else "")
    policy = _POLICY.format(base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode())
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Evaluation of generated sound</h1>\n<p class="muted">{escape(" · ".join(filter(None, made)))}</p>\n'
        + "\n".join(filter(None, sections))
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _measured(result: dict[str, Any]) -> str:
    """Which lists were read, and what was left out of them."""
    reference = result.get("reference")
    cards = _list_card("Generated", result["generated"])
    cards += _list_card("Reference", reference) if reference else ""
    missing = "" if reference else '<p class="muted">No reference sounds were given.</p>'
    options = (result.get("about") or {}).get("options") or {}
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(cut(json.dumps(value, ensure_ascii=False)))}</code></dd>"
        for name, value in options.items()
    )
    details = f"<details><summary>Options of the command</summary><dl>{rows}</dl></details>" if rows else ""
    return (
        f'<section aria-labelledby="measured">\n<h2 id="measured">What was measured</h2>\n'
        f'<div class="columns">{cards}</div>{missing}{details}\n</section>'
    )


def _list_card(name: str, side: dict[str, Any]) -> str:
    skipped, skips = side.get("skipped") or {}, side.get("skips") or []
    reasons = ", ".join(f"{count:,} {escape(reason)}" for reason, count in skipped.items() if count)
    rows = ""
    for skip in skips[:_MAX_SKIPS]:
        clip, reason = escape(cut(skip["id"])), escape(cut(skip["reason"]))
        detail = escape(cut(skip.get("detail") or skip["file"]))
        rows += f'<tr><th scope="row">{clip}</th><td>{reason}</td><td class="note">{detail}</td></tr>'
    total = max(len(skips), sum(skipped.values()))
    more = f'<p class="muted small">and {total - _MAX_SKIPS:,} more</p>' if total > _MAX_SKIPS else ""
    table = (
        f'<details><summary>Skipped clips</summary><div class="scroll"><table class="sortable small"><thead><tr>'
        f'<th scope="col">Clip</th><th scope="col">Reason</th><th scope="col">Detail</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{more}</details>"
    )
    rates = ", ".join(f"{int(rate):,} Hz ({count:,})" for rate, count in (side.get("rates") or {}).items())
    more_rows = f"<dt>Sample rate</dt><dd>{rates}</dd>" if rates else ""
    more_rows += f"<dt>Clipped</dt><dd>{side['clipped']:,} of those used</dd>" if side.get("clipped") else ""
    return (
        f'<div class="card"><h3>{name}: {side["used"]:,} of {side["clips"]:,} clips</h3><dl>'
        f"<dt>List</dt><dd><code>{escape(cut(side['list']))}</code></dd>"
        f"<dt>SHA-256</dt><dd>{hashes(side.get('sha256') or 'unknown')}</dd>"
        f"<dt>Skipped</dt><dd>{reasons or 'none'}</dd>{more_rows}</dl>{table if rows else ''}</div>"
    )


def _figures(result: dict[str, Any]) -> str:
    """One group for each embedding model with its weights."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figure in result.get("figures") or []:
        groups.setdefault((str(figure["embedding"]), str(figure["identity"])), []).append(figure)
    body = "\n".join(
        _group(f"figures-{i}", name, identity, figures, result)
        for i, ((name, identity), figures) in enumerate(groups.items())
    )
    absent = "".join(
        f"<li>{escape(cut(one['label']))}: {escape(cut(one['reason']))}</li>" for one in result.get("absent") or []
    )
    several = "<p>Figures of different embedding models have different scales: compare within a table only.</p>"
    return (
        '<section aria-labelledby="figures">\n<h2 id="figures">Figures</h2>\n'
        + (several if len(groups) > 1 else "")
        + (body or "<p>There are none.</p>")
        + (f"<p>Not computed:</p><ul>{absent}</ul>" if absent else "")
        + "\n</section>"
    )


def _group(anchor: str, name: str, identity: str, figures: Sequence[dict[str, Any]], result: dict[str, Any]) -> str:
    places = decimals(figure.get("value") for figure in figures)
    rows, notes, plots = "", "", ""
    for figure in figures:
        rows += _figure_row(figure, places)
        said = "; ".join(_notes(figure, result))
        notes += f"<li><b>{escape(cut(figure['label']))}</b>: {said}</li>" if said else ""
        value, low, high = (finite(figure.get(part)) for part in ("value", "low", "high"))
        if value is not None and low is not None and high is not None:
            label = f"{figure['label']}: {number(value, places)}, interval {_interval(figure, places)}"
            plots += (
                f"<li><figure><figcaption>{escape(figure['label'])}{_direction(figure.get('better'))}</figcaption>"
                f"{interval_plot(value, low, high, places, label)}</figure></li>"
            )
    heads = "".join(f'<th scope="col" class="number">{head}</th>' for head in ("Value", "Interval"))
    heads += '<th scope="col">Better</th>'
    heads += "".join(f'<th scope="col" class="number">{h}</th>' for h in ("Sample rate", "N generated", "N reference"))
    return (
        f'<section class="card group" aria-labelledby="{anchor}"><header><h3 id="{anchor}">Embedding: '
        f'{escape(cut(name))}</h3><div class="muted small">{hashes(cut(identity))}</div></header>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{anchor}">'
        f'<table class="sortable" aria-labelledby="{anchor}"><thead><tr><th scope="col">Figure</th>{heads}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="muted small">{_about_intervals(figures)}</p>'
        + (f'<ul class="notes small">{notes}</ul>' if notes else "")
        + (f'<ul class="plots">{plots}</ul>' if plots else "")
        + "</section>"
    )


def _notes(figure: dict[str, Any], result: dict[str, Any]) -> list[str]:
    notes = [escape(cut(figure["note"]))] if figure.get("note") else []
    for key, side in (("list", "generated"), ("reference_list", "reference")):
        known = (result.get(side) or {}).get("sha256")
        if figure.get(key) and known and figure[key] != known:
            notes.append(f"of another {side} list: {hashes(cut(figure[key]))}")
    return notes


def _figure_row(figure: dict[str, Any], places: int) -> str:
    meaning = _MEANINGS.get(figure["metric"])
    value, rate = finite(figure.get("value")), finite(figure.get("sample_rate"))
    return (
        f'<tr><th scope="row">{escape(cut(figure["label"]))}{f"<small>{meaning}</small>" if meaning else ""}</th>'
        f'<td class="number value" data-value="{"" if value is None else repr(value)}">{number(value, places)}</td>'
        f'<td class="number">{_interval(figure, places)}</td><td>{escape(figure.get("better") or "–")}</td>'
        f'<td class="number" data-value="{rate or ""}">{f"{rate:,.0f} Hz" if rate else "–"}</td>'
        f"{_count(figure.get('n'))}{_count(figure.get('n_reference'))}</tr>"
    )


def _count(value: object) -> str:
    known = finite(value)
    return f'<td class="number" data-value="{known or ""}">{"–" if known is None else f"{known:,.0f}"}</td>'


def _interval(figure: dict[str, Any], places: int) -> str:
    if finite(figure.get("low")) is None or finite(figure.get("high")) is None:
        return "–"
    return f"{number(figure['low'], places)} to {number(figure['high'], places)}"


def _about_intervals(figures: Iterable[dict[str, Any]]) -> str:
    """How the intervals were made, in one sentence if it is the same for all."""
    ways = dict.fromkeys(
        (figure.get("confidence"), figure.get("bootstrap"))
        for figure in figures
        if finite(figure.get("low")) is not None
    )
    texts = [
        f"{100 * confidence:g} %" + (f" from {draws:,} bootstrap draws of the clips" if draws else "")
        for confidence, draws in ways
        if confidence
    ]
    return f"Intervals: {' or '.join(texts)}." if texts else ""


def _histograms(clips: Sequence[dict[str, Any]], scores: Sequence[str], better: dict[str, Any]) -> str:
    plots = ""
    for name in scores:
        values = [value for clip in clips if (value := score_of(clip, name)) is not None]
        if not values:
            continue
        label = f"Histogram of {name} of {len(values)} clips, from {min(values):.3g} to {max(values):.3g}"
        plots += (
            f"<li><figure><figcaption>{escape(cut(name))}{_direction(better.get(name))}</figcaption>"
            f"{histogram(values, label)}"
            f'<div class="muted small">{len(values):,} clips</div></figure></li>'
        )
    return _plot_section("scores", "Scores of the clips", "", plots)


def _scatters(scatters: dict[str, Any]) -> str:
    plots = ""
    for name, points in scatters.items():
        reference, generated = points.get("reference") or [], points.get("generated") or []
        label = f"Scatter plot of {name}: the first two principal components of generated and reference embeddings"
        svg, circles, crosses = scatter(reference, generated, label)
        if not svg:
            continue
        key = '<span class="key"><svg viewBox="0 0 12 12" aria-hidden="true"><path class="{}" d="{}"/></svg> {}</span>'
        keys = key.format("crosses", "M3 3l6 6m0-6l-6 6", f"generated ({crosses})")
        keys += key.format("circles", "M6 6h0", f"reference ({circles})") if circles else ""
        plots += (
            f"<li><figure><figcaption>{escape(cut(name))}</figcaption>{svg}"
            f'<div class="muted small">{keys}</div></figure></li>'
        )
    said = "<p>The first two principal components; both axes have the same scale.</p>"
    return _plot_section("maps", "Maps of the embeddings", said, plots)


def _plot_section(anchor: str, title: str, said: str, plots: str) -> str:
    if not plots:
        return ""
    return (
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{title}</h2>\n{said}'
        f'<div class="card"><ul class="plots">{plots}</ul></div>\n</section>'
    )


def _direction(better: object) -> str:
    return f' <span class="muted small">{better} is better</span>' if better in ("lower", "higher") else ""
