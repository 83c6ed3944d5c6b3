"""What the pictures of the studies share. matplotlib is used without pyplot, as in siren.picture."""

from __future__ import annotations

import io
from typing import Any

from ..pretrained import missing


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. Raises MissingDependencyError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "studies") from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def shades(count: int) -> list[Any]:
    """Colours of `count` codebooks, from dark (the first) to light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.92) for i in range(count)]


def bare(axes: Any) -> None:
    """Without the lines at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Any) -> bytes:
    """The figure as a file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
