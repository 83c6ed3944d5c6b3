"""The learning rate over a run: linear warm-up, then a cosine down to a floor."""

from __future__ import annotations

import math


def learning_rate(step: int, base: float, total: int, warmup: int = 0, floor: float = 0.1) -> float:
    """The rate of update `step` (from 0) of `total`.

    The first of `warmup` updates has base / warmup and the last of them base; the rest follow half a cosine from base,
    and the last lands on base * floor. A warm-up longer than the run is cut to it.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return base * (step + 1) / warmup
    last = total - warmup - 1
    progress = min((step - warmup) / last, 1.0) if last > 0 else 1.0
    return base * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
