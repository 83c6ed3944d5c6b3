"""Stage 1: training the experts on a token set (paper, section 4.1, algorithm 1)."""

from __future__ import annotations

from .assemble import assemble
from .loop import TrainingError
from .run import train
from .settings import TrainSettings
from .stop import TrainingStoppedError

__all__ = ["TrainSettings", "TrainingError", "TrainingStoppedError", "assemble", "train"]
