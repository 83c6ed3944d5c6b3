"""The decoder interface over Triton kernels; how frames follow one another is in triton_session.py."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import Manifest, iter_tensors
from .config import SirenConfig
from .errors import BackendError
from .sampling import SamplingSettings, check_drawn
from .triton_session import TritonState
from .triton_weights import TritonWeights


class TritonDecoder:
    """Experts on a GPU. Arguments are checked by siren.Sampler, not here.

    `weights`: "fp32", "bf16" or "int8" (per output channel, symmetric; embedding tables and caches bf16). Activations
    between matrices are float32. `persistent`: whether the residual decoders of a frame run as one persistent kernel
    instead of many small ones; SIREN_TRITON_RESIDUAL, "persistent" or "kernels", has the last word.
    """

    def __init__(
        self,
        config: SirenConfig,
        experts: Iterable[tuple[int, Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]]],
        weights: str = "bf16",
        device: torch.device | str | None = None,
        persistent: bool = False,
    ) -> None:
        self.persistent = _persistent(persistent)
        self.weights = TritonWeights(config, experts, weights, device)

    @classmethod
    def from_folder(cls, manifest: Manifest, weights: str = "bf16", persistent: bool = False) -> TritonDecoder:
        """Build from a checkpoint folder, holding one tensor beside the stacked weights."""
        experts = ((entry.start_codebook, iter_tensors(entry, manifest.config)) for entry in manifest.experts)
        return cls(manifest.config, experts, weights, persistent=persistent)

    def load_expert(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write these weights over those of expert `index`, tensor by tensor. No other call may be under way."""
        self.weights.load_expert(index, tensors)

    def describe(self) -> dict[str, Any]:
        """What runs and where."""
        device = self.weights.device
        if device.type == "cuda":
            name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
            instructions = f"sm_{major}{minor}" if torch.version.hip is None else "hip"
        else:
            name, instructions = "cpu", "Triton's interpreter"
        return {
            "backend": "triton",
            "weights": self.weights.kind,
            "device": name,
            "instructions": instructions,
            "residual": "persistent" if self.persistent else "kernels",
            "weight_bytes": self.weights.bytes,
        }

    def start(
        self, prompt: Tensor, prompt_mask: Tensor, seeds: NDArray[np.uint64], settings: SamplingSettings
    ) -> TritonState:
        """prompt float32 [B, P, prompt_dim], prompt_mask bool [B, P], seeds [B]: prefill, once per distinct prompt."""
        return TritonState(self.weights, prompt, prompt_mask, seeds, settings, self.persistent)

    def residual(
        self,
        h: Tensor,
        start: Tensor,
        seeds: NDArray[np.uint64],
        frame: NDArray[np.int64],
        settings: SamplingSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One frame from h, start [K, B, d]: codes, log-probabilities [B, num_codebooks], next inputs [K, B, d]."""
        with self.weights.on_device(), torch.inference_mode():
            h, start = (tensor.to(self.weights.device).contiguous() for tensor in (h, start))
            keys = torch.from_numpy(seeds.view(np.int64)).to(self.weights.device)
            frames = torch.from_numpy(np.ascontiguousarray(frame)).to(self.weights.device)
            codes, logprobs, inputs, _ = self.weights.residual_frame(
                h, start, keys, frames, None, settings, self.persistent
            )
        check_drawn(logprobs.cpu(), frame)
        # Copies made out here are ordinary tensors, which autograd may save.
        return codes.cpu().clone(), logprobs.cpu().clone(), inputs.cpu().clone()


def _persistent(otherwise: bool) -> bool:
    wanted = os.environ.get("SIREN_TRITON_RESIDUAL", "")
    if wanted not in ("", "kernels", "persistent"):
        raise BackendError(f"SIREN_TRITON_RESIDUAL must be 'kernels' or 'persistent', not {wanted!r}")
    return wanted == "persistent" if wanted else otherwise
