"""The decoder interface over the persistent CUDA kernel of csrc/cuda, on a GPU or emulated on the CPU.

With SIREN_CUDA_EMULATE=1 in the environment the kernel's own source runs on the CPU, its threads as fibers, slowly, for
whoever wants to step through it: SIREN_CUDA_EMULATE_SMS multiprocessors (7), in an order that SIREN_CUDA_EMULATE_SEED
picks (0: in turn). Between launches it keeps up to 512 MB of address space for the fibers' stacks, until the process
ends.
"""

from __future__ import annotations

import importlib
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import Manifest, iter_tensors
from .config import SirenConfig
from .cuda_session import CudaState, Launcher, follow, host_tensor, region, settings_arguments
from .cuda_weights import FORMATS, CudaWeights
from .device_session import memory, on_device, out_of_memory
from .errors import BackendError
from .sampling import SamplingSettings, check_drawn

_LEAST_CAPABILITY = (8, 0)  # bfloat16 matrix units, asynchronous copies
_MOST_SMS = 1024


@dataclass(frozen=True)
class Machine:
    """Where the kernel runs, and how it is launched there."""

    device: torch.device
    sms: int
    shared_bytes: int  # of an SM, that a block can have
    name: str
    instructions: str
    launch: Launcher


def machine(wanted: torch.device | None = None) -> Machine:
    """The GPU that the kernel can run on here, or its emulator. Raises BackendError with the reason when there is none.

    `wanted`: a GPU other than the current one.
    """
    if _switch("SIREN_CUDA_EMULATE"):
        return _emulated()
    module = _extension("_cuda", "reinstall siren with nvcc on PATH (SIREN_CUDA=1 makes its absence an error)")
    if not torch.cuda.is_available():
        raise BackendError(
            "backend 'cuda' needs a GPU, and PyTorch sees none: use 'auto', 'cpu' or 'triton', or set "
            "SIREN_CUDA_EMULATE=1 to step through the kernel on the CPU, slowly"
        )
    index = wanted.index if wanted is not None and wanted.type == "cuda" else None
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    try:
        properties = module.properties(device.index)
    except RuntimeError as error:
        raise BackendError(f"backend 'cuda': {error}") from error
    name, (major, minor) = properties["name"], properties["capability"]
    if (major, minor) < _LEAST_CAPABILITY:
        raise BackendError(f"backend 'cuda' needs compute capability 8.0, and {name} has {major}.{minor}: use 'cpu'")

    def launch(arguments: dict[str, Any]) -> Any:
        try:
            return module.launch(arguments, torch.cuda.current_stream(device).cuda_stream, device.index)
        except RuntimeError as error:
            raise BackendError(f"backend 'cuda': {error}") from error

    return Machine(device, properties["sms"], properties["shared_bytes"], name, f"sm_{major}{minor}", launch)


def _emulated() -> Machine:
    module = _extension("_emulator", "reinstall siren with a C++17 compiler")
    sms = _number("SIREN_CUDA_EMULATE_SMS", 7, 1, _MOST_SMS)
    seed = _number("SIREN_CUDA_EMULATE_SEED", 0, 0, (1 << 32) - 1)
    shared_bytes = module.limits()["shared_bytes"]

    def launch(arguments: dict[str, Any]) -> Any:
        try:
            return module.run(arguments, seed)
        except RuntimeError as error:
            raise BackendError(f"backend 'cuda': {error}") from error

    return Machine(torch.device("cpu"), sms, shared_bytes, "emulated", "fibers on the host", launch)


def _extension(name: str, remedy: str) -> ModuleType:
    try:
        return importlib.import_module(f"siren.{name}")
    except ImportError as error:
        raise BackendError(
            f"backend 'cuda' needs the extension siren.{name}, which cannot be imported ({error}): {remedy}, "
            "or use 'auto', 'cpu' or 'triton'"
        ) from error


def _switch(name: str) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BackendError(f"{name} must be 0 or 1, not {value!r}")
    return value == "1"


def _number(name: str, otherwise: int, low: int, high: int) -> int:
    value = os.environ.get(name) or str(otherwise)
    digits = value.isascii() and value.isdigit() and len(value) <= len(str(high))  # Python refuses thousands of them
    if not (digits and low <= int(value) <= high):
        raise BackendError(f"{name} must be a whole number from {low} to {high}, not {reprlib.repr(value)}")
    return int(value)


class CudaDecoder:
    """Experts in the persistent kernel. Arguments are checked by siren.Sampler, not here.

    `weights`: "bf16", "int8" or "fp8" (with a scale for each output; embedding tables and caches bf16). Activations
    between matrices are float32. `residual`: only for `residual`, with the weights that it needs; otherwise only for
    `start`.
    """

    def __init__(
        self,
        config: SirenConfig,
        experts: Iterable[tuple[int, Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]]],
        weights: str = "bf16",
        device: torch.device | str | None = None,
        residual: bool = False,
    ) -> None:
        if weights not in FORMATS:
            raise BackendError(f"backend 'cuda' has weights {', '.join(map(repr, FORMATS))}, not {weights!r}")
        self.machine = machine(None if device is None else torch.device(device))
        place = self.machine.device
        try:
            with on_device(place):
                self.weights = CudaWeights(
                    config, experts, weights, place, self.machine.sms, self.machine.shared_bytes, residual
                )
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise BackendError(f"not enough memory on {place} for this model with {weights} weights") from error

    @classmethod
    def from_folder(cls, manifest: Manifest, weights: str = "bf16", residual: bool = False) -> CudaDecoder:
        """Build from a checkpoint folder, holding one tensor beside the tape."""
        experts = ((entry.start_codebook, iter_tensors(entry, manifest.config)) for entry in manifest.experts)
        return cls(manifest.config, experts, weights, residual=residual)

    def load_expert(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write these weights over those of expert `index`, tensor by tensor. No other call may be under way."""
        with on_device(self.weights.device):
            self.weights.load_expert(index, tensors)

    def describe(self) -> dict[str, Any]:
        """What runs and where."""
        return {
            "backend": "cuda",
            "weights": self.weights.kind,
            "device": self.machine.name,
            "instructions": self.machine.instructions,
            "sms": self.machine.sms,
            "shared_bytes": self.machine.shared_bytes,
            "weight_bytes": self.weights.bytes,
        }

    def start(
        self, prompt: Tensor, prompt_mask: Tensor, seeds: NDArray[np.uint64], settings: SamplingSettings
    ) -> CudaState:
        """prompt float32 [B, P, prompt_dim], prompt_mask bool [B, P], seeds [B]: prefill, once per distinct prompt."""
        return CudaState(self.weights, self.machine.launch, prompt, prompt_mask, seeds, settings)

    def residual(
        self,
        h: Tensor,
        start: Tensor,
        seeds: NDArray[np.uint64],
        frame: NDArray[np.int64],
        settings: SamplingSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One frame from h, start [K, B, d]: codes, log-probabilities [B, num_codebooks], next inputs [K, B, d]."""
        weights, device, batch = self.weights, self.weights.device, len(seeds)
        plan = weights.plan(batch, False)
        with on_device(device), memory(f"{batch} sequences"), torch.inference_mode():
            arena = torch.empty(plan.program.arena_floats, device=device)
            for name, value in (("h", h), ("start", start)):
                if name in plan.program.regions:
                    region(arena, plan, name).copy_(value)
            keys = torch.from_numpy(seeds.view(np.int64)).to(device)
            frames = torch.from_numpy(frame.astype(np.uint32).view(np.int32)).to(device)
            shape = (weights.config.num_codebooks, batch)
            codes, logprobs = host_tensor(shape, torch.int32, device), host_tensor(shape, torch.float32, device)
            unused = ("keys", "values", "prompt_keys", "prompt_values", "prompt_index", "prompt_length", "forced")
            arguments = {
                **weights.arguments(plan),
                **settings_arguments(settings),
                **dict.fromkeys((*unused, "first_frame", "capacity", "prompts", "prompt_capacity"), 0),
                "arena": arena.data_ptr(),
                "seeds": keys.data_ptr(),
                "noise_frames": frames.data_ptr(),
                "codes_out": codes.data_ptr(),
                "logprobs_out": logprobs.data_ptr(),
                "frames": 1,
            }
            follow(self.machine.launch(arguments), 1, lambda _: None)
            inputs = region(arena, plan, "sums").cpu()
        check_drawn(logprobs.T, frame)
        # Copies made out here are ordinary tensors, which autograd may save.
        return codes.T.to(torch.int64), logprobs.T.contiguous().clone(), inputs.clone()
