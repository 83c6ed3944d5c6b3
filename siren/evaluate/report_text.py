"""Numbers and text as a report writes them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

_MAX_TEXT = 400  # characters of a prompt, an id or a note


def decimals(values: Iterable[object]) -> int:
    """How many a column of these values gets: three significant digits for the smallest, but at most four decimals."""
    sizes = [abs(value) for value in map(finite, values) if value]
    return min(4, max(0, 2 - math.floor(math.log10(min(sizes))))) if sizes else 2


def number(value: object, places: int) -> str:
    """The value with this many decimals, an en dash if it is no finite number; in powers of ten if that hides it."""
    known = finite(value)
    if known is None:
        return "–"
    text = f"{known + 0.0:.{places}f}"  # + 0.0 makes -0.0 positive
    if (known != 0 and float(text) == 0) or abs(known) >= 1e7:
        text = f"{known:.2e}"
    return text.replace("-", "−", 1) if known < 0 else text


def finite(value: object) -> float | None:
    """The value as a float; None for what is no number, NaN or infinity."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def escape(text: object) -> str:
    """Text for HTML, also inside quotes. What HTML or UTF-8 cannot hold becomes a replacement character."""
    kept = "".join(
        "\ufffd" if (ch < " " and ch not in "\t\n\r") or "\ud800" <= ch <= "\udfff" else ch for ch in str(text)
    )
    return html.escape(kept)


def cut(text: object) -> str:
    """Text of at most 400 characters, which says if it was longer."""
    text = str(text)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 2] + " …"


def hashes(text: str) -> str:
    """Text in which long hexadecimal numbers are shortened, with the whole of it as title."""
    short = re.sub(r"([0-9a-fA-F]{12})[0-9a-fA-F]{12,}", r"\1…", text)
    return f'<code title="{escape(text)}">{escape(short)}</code>' if short != text else f"<code>{escape(text)}</code>"
