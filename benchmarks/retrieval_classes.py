"""The 20 prompt classes of benchmarks/retrieval.py: each a label of the two offline data sets and a prompt for it.

Chosen before any model was scored: labels with at least four clips that sound alike, whose real and coded clips the
embedding tells apart from those of the other classes. So a high score of real clips is no finding, it was asked for.
All classes are of the training data. Prompts are other words than its captions; the report names those that are not.
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
    PromptClass("rain", "rain falling outside", "procedural"),
    PromptClass("church bell", "the bell of a church ringing", "procedural"),
    PromptClass("siren", "the siren of an emergency vehicle", "procedural"),
    PromptClass("wolf", "a wolf howling", "procedural"),
    PromptClass("helicopter", "a helicopter flying overhead", "procedural"),
    PromptClass("bird", "birds chirping in a tree", "procedural"),
    PromptClass("telephone", "a phone ringing", "procedural"),
    PromptClass("thunder", "a thunderstorm", "procedural"),
    PromptClass("ocean waves", "waves breaking on the beach", "procedural"),
    PromptClass("power drill", "someone using an electric drill", "procedural"),
    PromptClass("heartbeat", "the beating of a heart", "procedural"),
    PromptClass("typing", "typing on a computer keyboard", "procedural"),
    PromptClass("fire", "a crackling campfire", "procedural"),
    PromptClass("guitar", "someone playing the guitar", "procedural"),
    PromptClass("applause", "an audience applauding", "procedural"),
    PromptClass("kick drum", "a bass drum hit", "recordings"),
    PromptClass("horn", "a war horn", "recordings"),
    PromptClass("bones", "the rattling bones of a skeleton", "recordings"),
    PromptClass("monster", "a monster growling", "recordings"),
    PromptClass("footstep on snow", "a step in the snow", "recordings"),
]
