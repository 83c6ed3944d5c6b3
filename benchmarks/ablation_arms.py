"""The models of the paper's tables 1 and 3 to 7, as configurations of the one model at a small scale.

All have about the parameters of the arm "6-2", the model of the paper, unless their name says otherwise: fewer experts
are wider. Arms of several experts begin with the same weights in each, as appendix D.3 of the paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from siren.config import SirenConfig

HEAD_DIM = 16
_SHARED: dict[str, Any] = {
    "spatial_layers": 3,
    "factorized_layers": 1,
    "max_seq_len": 128,
    "max_prompt_len": 64,
    "ffn_multiple_of": 16,
    "dropout": 0.0,
    "initializer_range": 0.05,
}


@dataclass(frozen=True)
class Arm:
    """A model: what differs from the others, and what it is trained on.

    `model`: fields of SirenConfig. `delayed`: its codes are in the delay pattern (siren.data.delay). `aligned`: the
    experts that learn by reinforcement, beginning with the arm `base`.
    """

    model: dict[str, Any]
    delayed: bool = False
    base: str | None = None
    aligned: tuple[int, ...] = ()


_NO_DECODER = {"factorized_layers": 0, "conditioning": "none", "spatial_layers": 4}

ARMS = {
    "6-2": Arm({"num_experts": 6, "dim": 64}),
    "1-12-heads": Arm({"num_experts": 1, "dim": 160, **_NO_DECODER}),
    "1-12": Arm({"num_experts": 1, "dim": 160}),
    "6-2-none": Arm({"num_experts": 6, "dim": 64, "conditioning": "none"}),
    "6-2-residual": Arm({"num_experts": 6, "dim": 64, "conditioning": "residual"}),
    "1-12-residual": Arm({"num_experts": 1, "dim": 160, "conditioning": "residual"}),
    "delay-pattern": Arm({"num_experts": 1, "dim": 160, **_NO_DECODER}, delayed=True),
    "2-6": Arm({"num_experts": 2, "dim": 112}),
    "4-3": Arm({"num_experts": 4, "dim": 80}),
    "12-1": Arm({"num_experts": 12, "dim": 48, "spatial_layers": 2}),
    "1-12-small": Arm({"num_experts": 1, "dim": 80}),
    "6-2-large": Arm({"num_experts": 6, "dim": 96}),
    "1-12-large": Arm({"num_experts": 1, "dim": 224}),
    "aligned": Arm({"num_experts": 6, "dim": 64}, base="6-2", aligned=(0,)),
    "aligned-two": Arm({"num_experts": 6, "dim": 64}, base="6-2", aligned=(0, 1)),
    "aligned-causal": Arm({"num_experts": 6, "dim": 64}, base="6-2", aligned=(5,)),
}


def config_of(arm: Arm, codec_sizes: dict[str, int]) -> SirenConfig:
    """The arm's configuration for a codec and prompt encoder of given sizes (fields of SirenConfig)."""
    heads = arm.model["dim"] // HEAD_DIM
    return SirenConfig(**_SHARED | codec_sizes | {"n_heads": heads, "n_kv_heads": heads} | arm.model)
