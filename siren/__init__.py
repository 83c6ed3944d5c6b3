"""Siren: text to sound with a language model over residual-vector-quantised audio codes."""

from .audio import Audio
from .codec import Codec
from .config import SirenConfig
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
from .sampler import ResidualSampler, SampleOutput, Sampler, Session
from .text import PromptEncoder

__version__ = "0.1.0"

__all__ = [
    "Audio",
    "BackendError",
    "CheckpointError",
    "Codec",
    "ConfigError",
    "InputError",
    "MissingDependencyError",
    "PromptEncoder",
    "ResidualSampler",
    "SampleOutput",
    "Sampler",
    "SamplingError",
    "Session",
    "Siren",
    "SirenConfig",
    "SirenError",
]
