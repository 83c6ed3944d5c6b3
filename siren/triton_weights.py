"""The weights of all experts on a GPU, stacked for the Triton kernels of siren.kernels, and the kernels over them.

What a frame does is in kernels/backbone_step.py and kernels/residual_frame.py. With TRITON_INTERPRET=1 in the
environment everything is on the CPU and runs in Triton's interpreter, slowly, for whoever wants to step through a
kernel.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import expected_shapes
from .config import SirenConfig
from .engine import folded_tensors
from .errors import BackendError, CheckpointError
from .layers import sinusoidal_positions
from .sampling import SamplingSettings

if TYPE_CHECKING:
    from types import ModuleType

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_LEAST_CAPABILITY = (8, 0)  # bfloat16 matrix units

# Where a checkpoint's tensor goes: a stacked weight, at a block, for an expert.
_BACKBONE = {
    "cross_norm.weight": "cross_norm",
    "cross_attention.query.weight": "cross_query",
    "cross_attention.query.bias": "cross_query_bias",
    "cross_attention.output.weight": "cross_output",
    "cross_attention.output.bias": "cross_output_bias",
    "self_norm.weight": "self_norm",
    "self_attention.qkv.weight": "qkv",
    "self_attention.output.weight": "self_output",
    "ffn_norm.weight": "ffn_norm",
    "feed_forward.gate_value.weight": "gate_value",
    "feed_forward.down.weight": "down",
    "cross_attention.key_value.weight": "key_value",
    "cross_attention.key_value.bias": "key_value_bias",
}
_DECODER = {
    "attention_norm.weight": "attention_norm",
    "attention.qkv.weight": "qkv",
    "attention.output.weight": "output",
    "ffn_norm.weight": "ffn_norm",
    "feed_forward.gate_value.weight": "gate_value",
    "feed_forward.down.weight": "down",
}


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU, which it decides when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel_device(wanted: torch.device | None = None) -> torch.device:
    """The device that Triton's kernels can run on here. Raises BackendError with the reason when there is none."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"backend 'triton' needs the package triton ({error}): pip install 'siren[triton]'"
        ) from error
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendError(
            "backend 'triton' needs a GPU, and PyTorch sees none: use 'auto' or 'cpu', or set TRITON_INTERPRET=1 to "
            "step through the kernels on the CPU, slowly"
        )
    device = (
        wanted if wanted is not None and wanted.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    )
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise BackendError(
            f"backend 'triton' needs compute capability 8.0, and {name} has {capability[0]}.{capability[1]}"
        )
    return device


def _kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    from siren.kernels import backbone_step, residual_frame, rvq_embed

    return backbone_step, residual_frame, rvq_embed


class _Stack:
    """Weights of one operation, stacked over blocks and experts, and the scales of int8 matrices."""

    def __init__(
        self,
        dims: Mapping[str, str],
        matrices: Iterable[str],
        sizes: Mapping[str, int],
        weights: str,
        device: torch.device,
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        for name, dim in dims.items():
            shape = [int(part.rpartition("*")[0] or 1) * sizes[part.rpartition("*")[2]] for part in dim.split()]
            dtype = torch.float32
            if name in matrices:
                dtype = _DTYPES[weights]
                if weights == "int8":
                    self.scales[name] = torch.empty(shape[:-1], device=device)
            elif name == "tables" and weights != "fp32":
                dtype = torch.bfloat16
            self.tensors[name] = torch.empty(shape, dtype=dtype, device=device)

    def put(self, name: str, place: tuple[int, ...], value: Tensor) -> None:
        """value float32, on the CPU or the device."""
        target = self.tensors[name][place]
        value = value.to(target.device).reshape(target.shape)
        if name in self.scales:
            scale = value.abs().amax(dim=-1) / 127
            self.scales[name][place] = scale
            value = (value / torch.where(scale > 0, scale, 1).unsqueeze(-1)).round()
        target.copy_(value)

    def get(self, name: str, place: int) -> Tensor:
        """One block's weight in float32."""
        value = self.tensors[name][place].float()
        return value * self.scales[name][place].unsqueeze(-1) if name in self.scales else value

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.scales.values()))

    def arguments(self, names: Iterable[str]) -> tuple[list[Tensor], list[Tensor]]:
        """The named weights and the scales among them, as the operations take them."""
        names = list(names)
        return [self.tensors[name] for name in names], [self.scales[name] for name in names if name in self.scales]


class TritonWeights:
    """Weights "fp32", "bf16" or "int8" (per output channel, symmetric; embedding tables and caches bf16)."""

    def __init__(
        self,
        config: SirenConfig,
        experts: Iterable[tuple[int, Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]]],
        weights: str,
        device: torch.device | str | None,
    ) -> None:
        self.device = kernel_device(None if device is None else torch.device(device))
        self.config, self.kind = config, weights
        self.cache_dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        self._backbone_step, self._residual_frame, self._rvq_embed = _kernels()
        self._check_sizes()
        sizes = {
            "L": config.spatial_layers,
            "K": config.num_experts,
            "d": config.dim,
            "n": (config.n_heads + 2 * config.n_kv_heads) * config.head_dim,
            "hidden": config.ffn_hidden,
            "J": config.num_codebooks,
            "V": config.codebook_size,
            "p": config.codes_per_expert + 1,
            "prompt": config.prompt_dim,
        }
        backbone = {
            **self._backbone_step.WEIGHTS,
            "key_value": "L K 2*d prompt",
            "key_value_bias": "L K 2*d",
            "sos": "K d",
        }
        decoder = {**self._residual_frame.WEIGHTS, "start": "K d", "prompt_summary": "K d prompt"}
        with self.on_device():
            matrices = (*self._backbone_step.MATRICES, "key_value")
            self._backbone = _Stack(backbone, matrices, sizes, weights, self.device)
            sizes["L"] = config.factorized_layers
            matrices = (*self._residual_frame.MATRICES, "prompt_summary")
            self._decoder = _Stack(decoder, matrices, sizes, weights, self.device)
            positions = sinusoidal_positions(config.codes_per_expert + 1, config.dim)
            self._decoder.put("positions", (), positions)
            self.positions = sinusoidal_positions(config.max_seq_len, config.dim).to(self.device)
            self._load(experts)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Launches inside go to this decoder's GPU."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def load_expert(self, k: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of expert k, under their checkpoint's names, where kernels and captured graphs read."""
        with self.on_device(), torch.inference_mode():  # where the weights themselves may have been made
            self._put_all(k, tensors)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # other threads may have streams of their own

    @property
    def sos(self) -> Tensor:
        """The backbones' first inputs, float32 [K, d]."""
        return self._backbone.tensors["sos"]

    @property
    def bytes(self) -> int:
        return self._backbone.bytes + self._decoder.bytes

    def backbone_step(self, *state: Tensor) -> Tensor:
        """Backbone outputs [K, R, d] of one frame; `state` as the operation takes it up to the weights."""
        operation = self._backbone_step
        weights = self._backbone.arguments(operation.WEIGHTS)
        return operation.backbone_step(*state, *weights, self.config.n_heads, self.config.norm_eps)

    def residual_frame(
        self,
        h: Tensor,
        start: Tensor,
        seeds: Tensor,
        frames: Tensor,
        forced: Tensor | None,
        settings: SamplingSettings,
        persistent: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, log-probabilities, embedding sums and logits of one frame; see kernels/residual_frame.py."""
        config, operation = self.config, self._residual_frame
        weights, scales = self._decoder.arguments(operation.WEIGHTS)
        return operation.residual_frame(
            h, start, seeds, frames, forced, weights, scales, config.n_heads, config.conditioning,
            settings.temperature, settings.top_k, settings.top_p, settings.guidance_scale, config.norm_eps, persistent,
        )  # fmt: skip

    def embed(self, codes: Tensor) -> Tensor:
        """Sums of the codes' embeddings float32 [K, B, d], codes [B, num_codebooks], as the draws add them up."""
        codes = codes.to(self.device).unsqueeze(-1)
        return self._rvq_embed.rvq_embed(self._decoder.tensors["tables"], codes)[:, :, 0]

    def prompt_cache(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, K, U, n_heads, P, head_dim] of prompts float32 [U, P, prompt_dim], mask [U, P].

        Prompt by prompt, each as long as it is: libraries of matrix products choose by the size how they add, and a
        sequence must not depend on the prompts beside it. Padding is zero.
        """
        config = self.config
        lengths = [int(row.nonzero()[-1]) + 1 for row in mask.cpu()]
        shape = (2, config.spatial_layers, config.num_experts, len(tokens), config.n_heads, tokens.shape[1])
        caches = torch.zeros((*shape, config.head_dim), dtype=self.cache_dtype, device=self.device)
        for i in range(config.spatial_layers):
            weight, bias = self._backbone.get("key_value", i), self._backbone.tensors["key_value_bias"][i]
            for u, length in enumerate(lengths):
                both = torch.einsum("pc,kdc->kpd", tokens[u, :length], weight) + bias[:, None]
                parts = both.view(config.num_experts, length, 2, config.n_heads, config.head_dim)
                caches[:, i, :, u, :, :length] = parts.permute(2, 0, 3, 1, 4)
        keys, values = caches.unbind(0)
        return keys, values

    def decoder_starts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the residual decoders' conditions are added to, float32 [K, U, d]: of the prompts' means, or learned."""
        config, start = self.config, self._decoder.tensors["start"].unsqueeze(1)
        if config.decoder_start == "learned" or not config.factorized_layers:
            return start.repeat(1, len(tokens), 1)
        summary = torch.stack([self._decoder.get("prompt_summary", k) for k in range(config.num_experts)])
        means = [row[valid].mean(dim=0) for row, valid in zip(tokens, mask, strict=True)]
        return torch.stack([torch.einsum("c,kdc->kd", mean, summary) for mean in means], dim=1) + start

    def _check_sizes(self) -> None:
        config, most = self.config, self._residual_frame.sample_heads.MOST_CODES
        if config.codebook_size > most:
            raise BackendError(f"backend 'triton' takes codebooks of at most {most} codes, not {config.codebook_size}")
        if self.device.type != "cuda":
            return
        numbers = config.num_experts * sum(math.prod(shape) for shape in expected_shapes(config).values())
        needed, (free, _) = numbers * _DTYPES[self.kind].itemsize, torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)  # PyTorch's to reuse
        if needed > free:
            lighter = "" if self.kind == "int8" else "; weights='int8' need less"
            raise BackendError(
                f"{self.kind} weights of this model need {needed / 1e9:.1f} GB on {self.device} and "
                f"{free / 1e9:.1f} GB are free{lighter}"
            )

    def _load(self, experts: Iterable[tuple[int, Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]]]) -> None:
        config, loaded = self.config, 0
        self._decoder.tensors["start"].zero_()
        self._decoder.put("final_norm", (), torch.ones(config.num_experts, config.dim))
        for start_codebook, tensors in experts:
            self._put_all(start_codebook // config.codes_per_expert, tensors)
            loaded += 1
        if loaded != config.num_experts:
            raise CheckpointError(f"expected {config.num_experts} experts, got {loaded}")

    def _put_all(self, k: int, tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
        items = tensors.items() if isinstance(tensors, Mapping) else tensors
        for name, tensor in folded_tensors(items):
            self._put(k, name, tensor.detach().float())

    def _put(self, k: int, name: str, value: Tensor) -> None:
        """One tensor of expert k under its checkpoint's name."""
        parts = name.split(".")
        if parts[0] == "spatial_blocks":
            self._backbone.put(_BACKBONE[".".join(parts[2:])], (int(parts[1]), k), value)
        elif parts[0] == "factorized_blocks":
            self._decoder.put(_DECODER[".".join(parts[2:])], (int(parts[1]), k), value)
        elif parts[0] == "codebooks":
            self._decoder.put("tables", (k, int(parts[2])), value)
        elif parts[0] == "heads":
            self._decoder.put("heads", (k * self.config.codes_per_expert + int(parts[1]),), value)
        elif name == "sos":
            self._backbone.put("sos", (k,), value)
        elif name == "spatial_norm.weight":
            self._backbone.put("final_norm", (k,), value)
        elif name == "factorized_norm.weight":
            self._decoder.put("final_norm", (k,), value)
        elif name == "prompt_summary.weight":
            self._decoder.put("prompt_summary", (k,), value)
        elif name in ("prompt_summary.bias", "start"):
            self._decoder.put("start", (k,), value)
        else:
            raise CheckpointError(f"unexpected tensor {name!r}")
