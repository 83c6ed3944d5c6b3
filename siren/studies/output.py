"""What a study leaves: a JSON file and, if wanted, a picture beside it. Both appear whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from ..audio import write_files
from ..errors import InputError
from ..pretrained import missing

FORMAT = "siren-study 1"


def check_targets(out: Path, picture: Path | None, t_sne: bool = False) -> None:
    """Raise, before any work, for a path that cannot be written or a package that drawing needs and is not there."""
    for path, suffix in ((out, ".json"), (picture, ".png")):
        if path is None:
            continue
        if path.suffix.lower() != suffix:
            raise InputError(f"{path} must end in {suffix}")
        if not path.parent.is_dir():
            raise InputError(f"{path.parent} is not a folder; make it first")
        if path.is_dir():
            raise InputError(f"{path} is a folder")
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise missing("matplotlib", "studies")
    if picture is not None and t_sne and importlib.util.find_spec("sklearn") is None:
        raise missing("scikit-learn", "studies")


def save_study(out: Path, name: str, options: Mapping[str, Any], values: Any, picture: Path | None, png: bytes) -> None:
    """Write the numbers, with what they were made of, and the picture. JSON has no NaN: it becomes null."""
    about: dict[str, Any] = {"siren": __version__, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    about["options"] = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    whole = {"format": FORMAT, "study": name, "about": about, **_plain(values)}
    contents = {out: (json.dumps(whole, ensure_ascii=False) + "\n").encode()}
    write_files(contents if picture is None else contents | {picture: png})


def _plain(value: Any) -> Any:
    """Dictionaries, lists, rounded numbers and None, of what holds dictionaries, sequences, arrays and NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
