"""The model's sizes and switches: the only place where 12 codebooks, 6 experts and 1024 codes are written."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

CONDITIONINGS = ("none", "residual", "accumulated")
DECODER_STARTS = ("prompt", "learned")

# Bounds that keep a hostile or mistyped config from asking for terabytes before anything is read.
_LIMITS = {
    "dim": 16384,
    "n_heads": 256,
    "n_kv_heads": 256,
    "spatial_layers": 256,
    "factorized_layers": 256,
    "prompt_dim": 16384,
    "num_codebooks": 64,
    "num_experts": 64,
    "codebook_size": 65536,
    "dac_code_dim": 1024,
    "dac_feature_dim": 16384,
    "max_seq_len": 1 << 20,
    "max_prompt_len": 1 << 14,
    "ffn_multiple_of": 16384,
}


@dataclass(frozen=True)
class SirenConfig:
    """Sizes of a Siren model. Field names are those of the official stage-1 `config.json`.

    `spatial_layers` counts backbone blocks, `factorized_layers` residual decoder blocks (0: the heads read the
    backbone directly). `conditioning` says what position 1 + i of the residual decoder sees of the present frame:
    nothing, the code just before, or the sum of all codes before (paper, table 4 and eq. 5). `decoder_start` is the
    vector that this is added to: a projection of the prompt (official code) or a learned one (paper, eq. 5).
    """

    dim: int = 1024
    n_heads: int = 16
    n_kv_heads: int = 16
    spatial_layers: int = 14
    factorized_layers: int = 2
    prompt_dim: int = 768
    num_codebooks: int = 12
    num_experts: int = 6
    codebook_size: int = 1024
    dac_code_dim: int = 8
    dac_feature_dim: int = 1024
    max_seq_len: int = 2048
    max_prompt_len: int = 128
    ffn_multiple_of: int = 256
    ffn_multiplier: float | None = None
    norm_eps: float = 1e-5
    dropout: float = 0.1
    initializer_range: float = 0.02
    conditioning: str = "accumulated"
    decoder_start: str = "prompt"

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            low = 0 if name == "factorized_layers" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= limit:
                raise ConfigError(f"{name} must be a whole number from {low} to {limit}, not {value!r}")
        for name, below in (("norm_eps", 1.0), ("dropout", 1.0), ("initializer_range", 1e3)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
                raise ConfigError(f"{name} must be a number from 0 to below {below}, not {value!r}")
        if self.norm_eps == 0 or self.initializer_range == 0:
            raise ConfigError("norm_eps and initializer_range must be above 0")
        multiplier = self.ffn_multiplier
        if multiplier is not None and (
            isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)) or not 0 < multiplier <= 64
        ):
            raise ConfigError(f"ffn_multiplier must be null or a number above 0 and at most 64, not {multiplier!r}")
        if self.dim % self.n_heads:
            raise ConfigError(f"dim ({self.dim}) must be a multiple of n_heads ({self.n_heads})")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.num_codebooks % self.num_experts:
            raise ConfigError(
                f"num_codebooks ({self.num_codebooks}) must be a multiple of num_experts ({self.num_experts})"
            )
        if self.conditioning not in CONDITIONINGS:
            raise ConfigError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, not {self.conditioning!r}")
        if self.decoder_start not in DECODER_STARTS:
            raise ConfigError(f"decoder_start must be one of {', '.join(DECODER_STARTS)}, not {self.decoder_start!r}")
        if self.factorized_layers == 0 and self.conditioning != "none":
            raise ConfigError("without residual decoder blocks the heads read the backbone: set conditioning to 'none'")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def codes_per_expert(self) -> int:
        return self.num_codebooks // self.num_experts

    @property
    def ffn_hidden(self) -> int:
        """Width of the SwiGLU: 8/3 of dim, times ffn_multiplier, rounded up to ffn_multiple_of."""
        hidden = int(8 * self.dim / 3)
        if self.ffn_multiplier is not None:
            hidden = int(hidden * self.ffn_multiplier)
        return -(-hidden // self.ffn_multiple_of) * self.ffn_multiple_of

    @classmethod
    def preset(cls, name: str) -> SirenConfig:
        """`siren-1.6b`, `siren-3.1b` (paper, table 2) or `tiny` (the official test size)."""
        if name not in _PRESETS:
            raise ConfigError(f"unknown preset {name!r}; there are {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])

    @classmethod
    def from_dict(cls, values: Any) -> SirenConfig:
        """Build from parsed JSON. Keys that start with `_` are comments; other unknown keys are errors."""
        if not isinstance(values, dict):
            raise ConfigError("a config must be a JSON object")
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown config fields: {', '.join(unknown)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, except that `conditioning` and `decoder_start` are left out where they have the official value.

        The official loader refuses keys it does not know.
        """
        values = dataclasses.asdict(self)
        for name in ("conditioning", "decoder_start"):
            if values[name] == SirenConfig.__dataclass_fields__[name].default:
                del values[name]
        return values

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


_PRESETS: dict[str, dict[str, Any]] = {
    "siren-1.6b": {},
    "siren-3.1b": {"spatial_layers": 24, "factorized_layers": 8},
    "tiny": {
        "dim": 64,
        "n_heads": 4,
        "n_kv_heads": 2,
        "spatial_layers": 2,
        "factorized_layers": 1,
        "prompt_dim": 32,
        "dac_feature_dim": 64,
        "max_seq_len": 32,
        "max_prompt_len": 16,
        "ffn_multiple_of": 32,
        "dropout": 0.0,
    },
}
