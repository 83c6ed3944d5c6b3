"""Small plots as SVG text, coloured by the page's style sheet, so that they follow its light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .report_text import decimals, escape, finite, number

_WIDTH = 320.0
_MARGIN = 12.0
_SCATTER_HEIGHT = 240.0
_MAX_BINS = 30
MAX_POINTS = 500  # of each side of a scatter


def interval_plot(value: float, low: float, high: float, places: int, title: str) -> str:
    """A value on the bar of its interval, above an axis of its own."""
    left, right = min(low, value), max(high, value)
    room = 0.2 * (right - left) if _apart(left, right) else 0.1 * abs(value) or 1.0
    scale = _Scale(left - room, right + room, _MARGIN, _WIDTH - _MARGIN)
    x, from_x, to_x = scale(value), scale(low), scale(high)
    label_x = min(max(x, 30.0), _WIDTH - 30.0)
    body = (
        f'<text class="value" x="{label_x:.1f}" y="13" text-anchor="middle">{number(value, places)}</text>'
        f'<path class="whisker" d="M{from_x:.1f} 22v12M{to_x:.1f} 22v12"/>'
        f'<path class="bar" d="M{from_x:.1f} 28H{to_x:.1f}"/><circle class="dot" cx="{x:.1f}" cy="28" r="5"/>'
    )
    return _svg(62, title, body + scale.axis(44))


def histogram(values: Sequence[float], title: str) -> str:
    """How many of the values lie where, with their median."""
    data = np.asarray(values, dtype=np.float64)
    low, high = float(data.min()), float(data.max())
    bins = int(np.clip(math.ceil(math.sqrt(len(data))), 5, _MAX_BINS))
    if not _apart(low, high):
        room = 0.1 * abs(low) or 1.0
        low, high, bins = low - room, high + room, 1
    counts, edges = np.histogram(data, bins, (low, high))
    top, bottom, left = 22.0, 122.0, 34.0
    scale = _Scale(float(edges[0]), float(edges[-1]), left, _WIDTH - _MARGIN)
    highest = int(counts.max())
    step = max(1, round(_nice_step(highest, 4)))
    heights = range(0, highest + 1, step)
    y = [bottom - (bottom - top) * height / highest for height in heights]
    grid = "".join(f"M{left} {at:.1f}H{_WIDTH - _MARGIN}" for at in y[1:])
    labels = "".join(
        f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{height}</text>'
        for at, height in zip(y, heights, strict=True)
    )
    bars = "".join(
        f"M{scale(a) + 0.5:.1f} {bottom}V{bottom - (bottom - top) * n / highest:.1f}H{scale(b) - 0.5:.1f}V{bottom}z"
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        if n
    )
    median = float(np.median(data))
    x = scale(median)
    body = (
        f'<path class="grid" d="{grid}"/>{labels}<path class="fill" d="{bars}"/>'
        f'<path class="median" d="M{x:.1f} {top - 6}V{bottom}"/>'
        f'<text class="value" x="{min(max(x, 70.0), _WIDTH - 60.0):.1f}" y="12" text-anchor="middle">'
        f"median {number(median, decimals([median]))}</text>"
    )
    return _svg(142, title, body + scale.axis(bottom))


def scatter(
    reference: Sequence[Sequence[float]], generated: Sequence[Sequence[float]], title: str
) -> tuple[str, int, int]:
    """Reference (circles) below generated (crosses), both axes to one scale; and how many points of each are drawn.

    Points are [x, y]; what is not two finite numbers is left out, and only the first 500 of each are drawn.
    """
    kept = [
        [point for point in points if len(point) == 2 and None not in (finite(point[0]), finite(point[1]))][:MAX_POINTS]
        for points in (reference, generated)
    ]
    every = kept[0] + kept[1]
    if not every:
        return "", 0, 0
    low, high = np.min(every, axis=0), np.max(every, axis=0)
    width, height = _WIDTH - 2 * _MARGIN, _SCATTER_HEIGHT - 2 * _MARGIN
    scale = min(width / max(float(high[0] - low[0]), 1e-9), height / max(float(high[1] - low[1]), 1e-9))
    circles, crosses = (
        (np.asarray(points, dtype=np.float64).reshape(-1, 2) - (low + high) / 2) * [scale, -scale]
        + [_WIDTH / 2, _SCATTER_HEIGHT / 2]
        for points in kept
    )
    body = (
        f'<path class="frame" d="M0.5 0.5H{_WIDTH - 0.5}V{_SCATTER_HEIGHT - 0.5}H0.5z"/>'
        '<path class="circles" d="' + "".join(f"M{x:.1f} {y:.1f}h0" for x, y in circles) + '"/>'
        '<path class="crosses" d="' + "".join(f"M{x - 2.5:.1f} {y - 2.5:.1f}l5 5m0-5l-5 5" for x, y in crosses) + '"/>'
    )
    return _svg(_SCATTER_HEIGHT, title, body), len(kept[0]), len(kept[1])


def _apart(low: float, high: float) -> bool:
    """Whether the two differ by more than rounding, so that there is something to draw between them."""
    return high - low > 1e-9 * max(abs(low), abs(high))


class _Scale:
    """Positions x of the values from `low` to `high`."""

    def __init__(self, low: float, high: float, left: float, right: float) -> None:
        self.low, self.high, self.left, self.right = low, high, left, right

    def __call__(self, value: float) -> float:
        return self.left + (self.right - self.left) * (value - self.low) / (self.high - self.low)

    def axis(self, y: float) -> str:
        """A line at height y with ticks at round values and their numbers below."""
        step = _nice_step(self.high - self.low, 5)
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        ticks, labels = "", ""
        for i in range(first, last + 1):
            x = self(i * step)
            text = number(i * step if i else 0.0, places)
            ticks += f"M{x:.1f} {y}v4"
            labels += (
                f'<text x="{min(max(x, 10.0), _WIDTH - 12.0):.1f}" y="{y + 16}" text-anchor="middle">{text}</text>'
            )
        return f'<path class="axis" d="M{self.left} {y}H{self.right}{ticks}"/>{labels}'


def _nice_step(span: float, count: int) -> float:
    """1, 2 or 5 times a power of ten: the smallest that needs at most `count` steps for the span."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= span * (1 - 1e-9))


def _svg(height: float, title: str, body: str) -> str:
    """An image for those who see it, and its title for those who do not."""
    return f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">{body}</svg>'
