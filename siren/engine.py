"""The CPU engine, siren._cpu, behind the decoder interface: tensors are checked, converted and handed over here.

What it does with them is in csrc/cpu; why it is fast, at the head of csrc/cpu/kernels.h and session.cpp.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import Manifest, expected_shapes, iter_tensors
from .config import CONDITIONINGS, SirenConfig
from .errors import BackendError, CheckpointError, InputError, SamplingError
from .layers import sinusoidal_positions
from .sampling import SamplingSettings

if TYPE_CHECKING:
    from types import ModuleType

_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
_EMBEDDING_PARTS = ("codebook.weight", "dac_out.weight", "dac_out.bias", "projector.weight", "projector.bias")


def extension() -> ModuleType:
    """siren._cpu. Raises BackendError with the reason when it cannot be imported."""
    try:
        from . import _cpu
    except ImportError as error:
        raise BackendError(
            f"the C++ extension siren._cpu cannot be imported ({error}): reinstall siren with a C++17 compiler, "
            "or use backend='reference'"
        ) from error
    return _cpu


def instruction_path() -> str:
    """The instruction path a decoder made now would take. Raises BackendError if SIREN_CPU_ISA names none that runs."""
    try:
        return str(extension().instruction_path())
    except ValueError as error:
        raise BackendError(str(error)) from error


def default_threads() -> int:
    """Physical cores this process may use, within its cgroup's CPU quota: more only share the same bandwidth."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    count = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 quota
    return count


def free_memory() -> float:
    """Bytes of the host's memory that are free, infinite where the system does not say."""
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return math.inf


def check_memory(config: SirenConfig, weights: str) -> None:
    """Raise BackendError if the weights cannot fit: better than a process that the system kills while loading."""
    parameters = config.num_experts * sum(math.prod(shape) for shape in expected_shapes(config).values())
    positions = 4 * config.dim * max(config.max_seq_len, config.codes_per_expert + 1)
    needed = parameters * _BYTES[weights] + positions
    free = free_memory()
    if needed > free:
        lighter = "" if weights == "int8" else "; weights='int8' need less"
        sizes = f"need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
        raise BackendError(f"{weights} weights of this model {sizes}{lighter}")


def _engine_config(config: SirenConfig) -> dict[str, Any]:
    return {
        "dim": config.dim,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "backbone_blocks": config.spatial_layers,
        "decoder_blocks": config.factorized_layers,
        "hidden": config.ffn_hidden,
        "prompt_dim": config.prompt_dim,
        "codebooks": config.num_codebooks,
        "experts": config.num_experts,
        "codes": config.codebook_size,
        "max_frames": config.max_seq_len,
        "max_prompt": config.max_prompt_len,
        "norm_eps": config.norm_eps,
        "conditioning": CONDITIONINGS.index(config.conditioning),
        "learned_start": config.decoder_start == "learned",
    }


def _settings(settings: SamplingSettings) -> dict[str, Any]:
    return {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}


def folded_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """The tensors as the engines know them: each codebook's embedding folded into one table [codes, dim] (both
    maps are linear), everything else as it is."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if not name.startswith("codebooks.layers."):
            yield name, tensor
            continue
        index, part = name.removeprefix("codebooks.layers.").split(".", 1)
        own = parts.setdefault(index, {})
        own[part] = tensor.detach().to("cpu", torch.float32)
        if len(own) == len(_EMBEDDING_PARTS):
            codebook, weight, bias, projector, offset = (own[part] for part in _EMBEDDING_PARTS)
            yield f"codebooks.layers.{index}.table", codebook @ (projector @ weight).T + (projector @ bias + offset)
            del parts[index]


class CpuDecoder:
    """Six experts in the C++ engine. Arguments are checked by siren.Sampler, not here.

    `weights`: "fp32", "bf16" or "int8" (per output channel, symmetric; embedding tables and the KV cache bf16). The
    instruction path is the best the CPU has, or the one that the environment variable SIREN_CPU_ISA names.
    """

    def __init__(
        self,
        config: SirenConfig,
        experts: Iterable[tuple[int, Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]]],
        weights: str = "bf16",
        threads: int | None = None,
    ) -> None:
        module = extension()
        check_memory(config, weights)
        self.config, self.weights = config, weights
        self._bad_logits = module.BadLogits
        try:
            self.engine = module.Engine(_engine_config(config), weights, threads or default_threads())
        except ValueError as error:
            raise BackendError(str(error)) from error
        except MemoryError as error:
            raise BackendError(f"not enough memory for this model with {weights} weights") from error
        for start_codebook, tensors in experts:
            self._load(start_codebook // config.codes_per_expert, tensors)
        count = max(config.max_seq_len, config.codes_per_expert + 1)
        self.engine.set_positions(sinusoidal_positions(count, config.dim).contiguous().numpy())
        try:
            self.engine.check_complete()
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    @classmethod
    def from_folder(cls, manifest: Manifest, weights: str = "bf16", threads: int | None = None) -> CpuDecoder:
        """Build from a checkpoint folder, holding one tensor beside the packed weights."""
        experts = ((entry.start_codebook, iter_tensors(entry, manifest.config)) for entry in manifest.experts)
        return cls(manifest.config, experts, weights, threads)

    def load_expert(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write these weights over those of expert `index`, tensor by tensor. No other call may be under way."""
        self._load(index, tensors)

    def _load(self, index: int, tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
        items = tensors.items() if isinstance(tensors, Mapping) else tensors
        for name, tensor in folded_tensors(items):
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            rows = values.view(1, -1) if values.ndim != 2 else values
            try:
                self.engine.load(index, name, rows.numpy())
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            except RuntimeError as error:
                raise BackendError(f"the engine's threads cannot start ({error}): pass a smaller threads") from error

    def describe(self) -> dict[str, Any]:
        """What runs: backend, weights, instruction path, threads and the bytes a frame reads."""
        return {"backend": "cpu", "device": "cpu", "weights": self.weights, **self.engine.describe()}

    def start(
        self, prompt: Tensor, prompt_mask: Tensor, seeds: NDArray[np.uint64], settings: SamplingSettings
    ) -> CpuState:
        """prompt float32 [B, P, prompt_dim], prompt_mask bool [B, P], seeds [B]: prefill, once per distinct prompt."""
        return CpuState(self, prompt, prompt_mask, seeds, settings)

    def residual(
        self,
        h: Tensor,
        start: Tensor,
        seeds: NDArray[np.uint64],
        frame: NDArray[np.int64],
        settings: SamplingSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One frame from h, start [K, B, d]: codes, log-probabilities [B, num_codebooks], next inputs [K, B, d]."""
        try:
            codes, logprobs, inputs = self.engine.residual(
                h.contiguous().numpy(),
                start.contiguous().numpy(),
                seeds.tolist(),
                np.ascontiguousarray(frame, np.int64),
                **_settings(settings),
            )
        except self._bad_logits as error:
            raise SamplingError(str(error)) from error
        return torch.from_numpy(codes), torch.from_numpy(logprobs), torch.from_numpy(inputs)


class CpuState:
    """Sequences being decoded by the engine. Calls from several threads take turns."""

    def __init__(
        self,
        decoder: CpuDecoder,
        prompt: Tensor,
        prompt_mask: Tensor,
        seeds: NDArray[np.uint64],
        settings: SamplingSettings,
    ) -> None:
        self._bad_logits = decoder._bad_logits
        try:
            self._session = decoder.engine.start(
                prompt.contiguous().numpy(),
                prompt_mask.to(torch.uint8).contiguous().numpy(),
                seeds.tolist(),
                guidance=settings.guidance_scale,
                **_settings(settings),
            )
        except MemoryError as error:
            raise InputError(f"not enough memory for a batch of {len(seeds)}: use a smaller one") from error

    @property
    def batch(self) -> int:
        return int(self._session.batch)

    @property
    def frame(self) -> int:
        return int(self._session.frame)

    @property
    def codes(self) -> Tensor:
        """int64 [B, num_codebooks, frame]."""
        return torch.from_numpy(self._session.codes)

    @property
    def logprobs(self) -> Tensor:
        """float32 [B, num_codebooks, frame]."""
        return torch.from_numpy(self._session.logprobs)

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache; pages that sequences share count once."""
        return int(self._session.cache_bytes)

    def step(self, frames: int, on_frame: Callable[[int, int], None] | None = None) -> None:
        """Decode `frames` more frames; Ctrl-C and on_frame(done, total) come between frames."""
        self._run(frames, on_frame, None)

    def force(self, codes: Tensor) -> Tensor:
        """Advance by these codes int64 [B, num_codebooks, n]: logits float32 [B, num_codebooks, n, codebook_size]."""
        wanted = codes.to(torch.int64).contiguous()
        return torch.from_numpy(self._run(wanted.shape[-1], None, wanted.numpy()))

    def select(self, indices: list[int], seeds: NDArray[np.uint64] | None = None) -> None:
        """Keep these sequences, in this order; `seeds` gives each a new seed. An error leaves everything as it was."""
        try:
            self._session.select(indices, [] if seeds is None else seeds.tolist())
        except MemoryError as error:
            raise InputError(f"not enough memory for {len(indices)} sequences: keep fewer") from error

    def _run(self, frames: int, on_frame: Callable[[int, int], None] | None, forced: NDArray[np.int64] | None) -> Any:
        try:
            return self._session.step(frames, on_frame, forced)
        except self._bad_logits as error:
            raise SamplingError(str(error)) from error
        except ValueError as error:
            raise InputError(str(error)) from error
        except MemoryError as error:
            raise InputError(f"not enough memory for {frames} more frames of {self.batch} sequences") from error
