"""What `siren evaluate` is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

METRICS = ("FD", "IS", "KL", "score")


@dataclass(frozen=True)
class EvaluateSettings:
    """The arguments of `evaluate`. Raises InputError for a value that cannot be.

    generated, reference: lists of clips (clip_lists.py). out: the result, a .json file; may be missing for a shard.
    embeddings: names for `load_embedder`; None: aisfx, and the aligner if the generated clips have prompts.
    metrics: some of METRICS, which must then be possible; None: all that are.
    html: a page that shows the result. bootstrap: replicates of an interval; 0: no intervals. confidence: of them.
    batch_size: clips read and embedded together; memory is batch_size sounds of max_seconds, no figure depends on it.
    shard: "i/n" embeds every n-th part of the lists, from the i-th on, and computes no figure.
    work: folder of the finished parts; None: OUT's name with .work, beside it.
    min_seconds, max_seconds: shorter and longer sounds are skipped. skip_clipped: and clipped ones.
    """

    generated: str | Path
    out: str | Path | None = None
    reference: str | Path | None = None
    embeddings: Sequence[str] | None = None
    metrics: Sequence[str] | None = None
    html: str | Path | None = None
    bootstrap: int = 1000
    confidence: float = 0.95
    seed: int = 0
    batch_size: int = 16
    shard: str | None = None
    work: str | Path | None = None
    min_seconds: float = 0.2
    max_seconds: float = 120.0
    skip_clipped: bool = False
    device: str = "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("bootstrap", 0, 100_000), ("seed", 0, (1 << 32) - 1), ("batch_size", 1, 4096)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        if 0 < self.bootstrap < 20:
            raise InputError(f"bootstrap must be 0, or at least 20 replicates, not {self.bootstrap}")
        for name, least, most in (
            ("confidence", 0.5, 0.9999),
            ("min_seconds", 0.0, 3600.0),
            ("max_seconds", 0.0, 3600.0),
        ):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number <= most:
                raise InputError(f"{name} must be a number from {least:g} to {most:g}, not {number!r}")
        if not self.min_seconds < self.max_seconds or not math.isfinite(self.max_seconds):
            raise InputError(f"min_seconds {self.min_seconds:g} must be below max_seconds {self.max_seconds:g}")
        for name in ("embeddings", "metrics"):
            names = getattr(self, name)
            if names is not None and (isinstance(names, str) or not names or len(set(names)) < len(names)):
                raise InputError(f"{name} must be a list of names, each once, not {names!r}")
        for name in self.metrics or ():
            if name not in METRICS:
                raise InputError(f"metrics must be some of {', '.join(METRICS)}, not {name!r}")
        for name, suffixes in (("out", (".json",)), ("html", (".html", ".htm"))):
            path = getattr(self, name)
            if path is not None and Path(path).suffix.lower() not in suffixes:
                raise InputError(f"{name} must end in {suffixes[0]}, not {str(path)!r}")
        if self.out is None and (self.shard is None or self.work is None or self.html is not None):
            raise InputError("nowhere to write to: give out (--out RESULT.json), or a shard and its work folder")
        self.shard_of()

    def shard_of(self) -> tuple[int, int] | None:
        """Index from 0, and count, of the shard; None for all."""
        if self.shard is None:
            return None
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(self.shard), re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"shard must be like 1/4, the first of four, not {self.shard!r}")
        return int(match[1]) - 1, int(match[2])

    def work_folder(self) -> Path:
        """Where finished parts are."""
        if self.work is not None:
            return Path(self.work).expanduser()
        return Path(self.out or "").expanduser().with_suffix(".work")
