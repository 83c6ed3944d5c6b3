"""Siren: text to sound with a language model over residual-vector-quantised audio codes.

Names are imported when they are first used: torch takes seconds, and `siren --help` does not need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .aligner import Aligner
    from .audio import Audio
    from .codec import Codec
    from .config import SirenConfig
    from .critic import Critic
    from .errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        InputError,
        MissingDependencyError,
        SamplingError,
        SirenError,
    )
    from .model import Siren
    from .prune import Pruning
    from .sampler import ResidualSampler, SampleOutput, Sampler, Session
    from .text import PromptEncoder

__version__ = "0.1.0"

__all__ = [
    "Aligner",
    "Audio",
    "BackendError",
    "CheckpointError",
    "Codec",
    "ConfigError",
    "Critic",
    "InputError",
    "MissingDependencyError",
    "PromptEncoder",
    "Pruning",
    "ResidualSampler",
    "SampleOutput",
    "Sampler",
    "SamplingError",
    "Session",
    "Siren",
    "SirenConfig",
    "SirenError",
]

_MODULES = {
    "Aligner": "aligner",
    "Audio": "audio",
    "Codec": "codec",
    "Critic": "critic",
    "PromptEncoder": "text",
    "Pruning": "prune",
    "ResidualSampler": "sampler",
    "SampleOutput": "sampler",
    "Sampler": "sampler",
    "Session": "sampler",
    "Siren": "model",
    "SirenConfig": "config",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'siren' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES.get(name, 'errors')}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
