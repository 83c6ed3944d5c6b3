"""The 20 prompt classes of benchmarks/retrieval.py: each a label of the two offline data sets and a prompt for it.

Labels with at least four clips, whose real clips the embedding tells apart from those of the other classes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptClass:
    """`source` says which data set has clips with the label: "recordings" or "procedural"."""

    label: str
    prompt: str
    source: str


CLASSES = [
    PromptClass("kick drum", "a kick drum", "recordings"),
    PromptClass("horn", "a horn blowing", "recordings"),
    PromptClass("bones", "bones rattling", "recordings"),
    PromptClass("orc", "an orc growling", "recordings"),
    PromptClass("footstep on snow", "a footstep in the snow", "recordings"),
    PromptClass("fire whoosh", "a burst of fire", "recordings"),
]
