"""Stage 2: the first expert learns to draw what the later ones make good sound of (paper, section 4.2)."""

from __future__ import annotations

from .run import align
from .settings import AlignSettings

__all__ = ["AlignSettings", "align"]
