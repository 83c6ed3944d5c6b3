"""Every error a user can cause. One family, one clear line each; the command line turns them into exit code 2."""


class SirenError(Exception):
    """Base of all errors Siren raises on purpose."""


class ConfigError(SirenError, ValueError):
    """A model configuration that cannot be built."""


class CheckpointError(SirenError):
    """A checkpoint, codec or encoder folder that is missing, damaged, altered or unsafe."""


class InputError(SirenError, ValueError):
    """An argument of the wrong type, shape, dtype, device or range."""


class BackendError(SirenError, RuntimeError):
    """A backend that was asked for by name and cannot run here."""


class MissingDependencyError(SirenError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


class SamplingError(SirenError, RuntimeError):
    """Logits that cannot be sampled from; the message names sequence, frame and codebook."""


class DataError(SirenError):
    """Training data that is missing, damaged, altered or of another codec; the message names the file."""
