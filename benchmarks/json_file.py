"""Results as JSON files that another process may read while they grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path | None, value: Any) -> None:
    """Through a file beside it that takes its place, so that a reader never finds half of it. None: nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> dict[str, Any] | None:
    """The file's content, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
