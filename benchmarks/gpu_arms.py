"""The decoders that `benchmarks/decode.py --device cuda` compares, on the same random weights, and the check of each.

naive    siren.reference.ReferenceDecoder: every operation launched by Python; its frames include the noise, which numpy
         draws on the CPU for each
graph    the same with static shapes, a frame as one CUDA graph (static_arm.py)
compile  the same, through torch.compile(mode="max-autotune-no-cudagraphs") before it is captured
triton   siren.triton_engine.TritonDecoder
persistent   the same decoder with its residual decoders in one persistent kernel
cuda     siren.cuda_engine.CudaDecoder: all frames of a step in one persistent kernel
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import arms
import numpy as np
import torch
from static_arm import StaticDecoder
from torch import Tensor

from siren import SirenConfig
from siren.cuda_engine import CudaDecoder, machine
from siren.errors import BackendError
from siren.reference import ReferenceDecoder
from siren.sampling import SamplingSettings, gumbel_noise

PYTORCH = ("naive-fp32", "naive-bf16", "graph-fp32", "graph-bf16", "compile-bf16")
OURS = ("triton-fp32", "triton-bf16", "triton-int8", "persistent-bf16", "persistent-int8", "cuda-bf16", "cuda-int8")
ARMS = (*PYTORCH, *OURS)
DEFAULT = "naive-bf16,graph-bf16,compile-bf16,triton-bf16,triton-int8,persistent-bf16,cuda-bf16,cuda-int8"


def build(name: str, config: SirenConfig, device: str, frames: int, built: dict[str, Any]) -> Any:
    """A decoder for one arm, for clips of at most `frames` frames; graph and compile share the weights of
    `built`'s naive arm, persistent those of its triton arm."""
    kind, weights = name.split("-")
    shared = {"graph": "naive", "compile": "naive", "persistent": "triton"}
    if kind in shared:
        other = f"{shared[kind]}-{weights}"
        if other not in built:
            built[other] = build(other, config, device, frames, built)
        if kind != "persistent":
            return StaticDecoder(built[other], frames, compiled=kind == "compile")
        decoder = copy.copy(built[other])
        decoder.persistent = True
        return decoder
    experts = ((start, dict(tensors)) for start, tensors in arms.random_experts(config, 0))
    if kind == "naive":
        return ReferenceDecoder(config, experts, weights, device)
    if kind == "cuda":
        return _cuda(config, experts, weights, device)
    from siren.triton_engine import TritonDecoder

    decoder = TritonDecoder(config, experts, weights=weights, device=device)
    decoder.persistent = False  # whatever SIREN_TRITON_RESIDUAL says: an arm is what its name says
    return decoder


def build_residual(name: str, config: SirenConfig, device: str, built: dict[str, Any]) -> Any:
    """The decoder for what follows a frame's backbones alone. A cuda arm has one with only those weights, the others
    are `built`'s."""
    kind, weights = name.split("-")
    key = f"{name}-residual" if kind == "cuda" else name
    if key not in built:
        if kind == "cuda":
            experts = ((start, dict(tensors)) for start, tensors in arms.random_experts(config, 0))
            built[key] = _cuda(config, experts, weights, device, residual=True)
        else:
            built[key] = build(name, config, device, 1, built)
    return built[key]


def _cuda(config: SirenConfig, experts: Any, weights: str, device: str, residual: bool = False) -> CudaDecoder:
    """Raises BackendError where the kernel would run somewhere else: emulated, nothing is a GPU's."""
    found = machine(torch.device(device)).device.type
    if found != torch.device(device).type:
        raise BackendError(f"backend 'cuda' would run on {found} instead of {device}: unset SIREN_CUDA_EMULATE")
    return CudaDecoder(config, experts, weights, device, residual)


def residual_inputs(config: SirenConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Random outputs of the backbones, as large as their norm makes them, and random starts: [num_experts, B, dim]."""
    generator = torch.Generator().manual_seed(3)
    shape = (config.num_experts, batch, config.dim)
    return torch.randn(shape, generator=generator), 0.1 * torch.randn(shape, generator=generator)


@dataclasses.dataclass
class Errors:
    """How far an arm is from PyTorch in fp32 that is given the codes which the arm drew."""

    logits: float  # root mean square, of the logits' own
    worst: float  # the largest of a logit
    logprobs: float  # root mean square, of the log-probabilities that the arm reported
    regret: float  # the most that a drawn code's logit + noise is below the largest
    codes: Tensor


class Gate:
    """Checks arms on a model of the same widths with one block of each kind, two sequences.

    An arm draws codes, frame by frame as it is timed; then both it and PyTorch in fp32 are given those codes. Errors of
    logits and of the reported log-probabilities are at most twice those of plain PyTorch at the arm's precision. In
    fp32 every code is the one PyTorch draws; in others, where rounding may change a draw, a drawn code may be below the
    best by no more than logits that are off by that limit explain.
    """

    def __init__(self, config: SirenConfig, device: str) -> None:
        self.config = dataclasses.replace(config, spatial_layers=1, factorized_layers=min(1, config.factorized_layers))
        self.device, self.frames = device, min(arms.GATE_FRAMES, config.max_seq_len)
        self.prompt, self.mask = arms.random_prompts(self.config, 2, min(9, config.max_prompt_len))
        self.seeds = np.arange(2, dtype=np.uint64)
        count, size = config.num_codebooks, config.codebook_size
        noise = [gumbel_noise(self.seeds, frame, range(count), size) for frame in range(self.frames)]
        self.noise = torch.stack(noise, dim=2).double()  # [B, num_codebooks, T, V]
        self.decoders: dict[str, Any] = {}
        self.errors = functools.cache(self._errors)
        self.residual_errors = functools.cache(self._residual_errors)

    def _start(self, name: str) -> Any:
        if name not in self.decoders:
            self.decoders[name] = build(name, self.config, self.device, self.frames, self.decoders)
        return self.decoders[name].start(self.prompt, self.mask, self.seeds, SamplingSettings())

    def _errors(self, name: str) -> Errors:
        state = self._start(name)
        state.step(self.frames, None)
        codes, logprobs = state.codes, state.logprobs
        size = self.config.codebook_size
        if codes.shape[2] != self.frames or not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(f"codes {list(codes.shape)} from {int(codes.min())} to {int(codes.max())} of {size}")
        own, plain = self._start(name).force(codes).double(), self._start("naive-fp32")
        truth = plain.force(codes).double()
        scores = truth + self.noise
        drawn = scores.gather(3, codes.unsqueeze(3)).squeeze(3)
        return Errors(
            logits=_size(own - truth) / _size(truth),
            worst=float((own - truth).abs().max()),
            logprobs=_size(logprobs.double() - plain.logprobs.double()),
            regret=float((scores.amax(dim=3) - drawn).max()),
            codes=codes,
        )

    def _residual_errors(self, name: str) -> Errors:
        """Of one frame after the backbones. An arm does not show its logits there, so they count as without error;
        the log-probabilities and the draws are judged."""
        h, start = residual_inputs(self.config, len(self.seeds))
        frame = np.zeros(len(self.seeds), dtype=np.int64)
        decoder = build_residual(name, self.config, self.device, self.decoders)
        codes, logprobs, _ = decoder.residual(h, start, self.seeds, frame, SamplingSettings())
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codebook_size:
            raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} of {self.config.codebook_size}")
        truth = self._residual_logits("naive-fp32", h, start, codes)
        own = self._residual_logits(name, h, start, codes) if name.startswith("naive") else truth
        scores = truth + self.noise[:, :, 0]
        place = codes.unsqueeze(2)
        expected = truth.log_softmax(dim=2).gather(2, place).squeeze(2)
        return Errors(
            logits=_size(own - truth) / _size(truth),
            worst=float((own - truth).abs().max()),
            logprobs=_size(logprobs.double() - expected),
            regret=float((scores.amax(dim=2) - scores.gather(2, place).squeeze(2)).max()),
            codes=codes,
        )

    def _residual_logits(self, name: str, h: Tensor, start: Tensor, codes: Tensor) -> Tensor:
        """float64 [B, num_codebooks, V] of a naive arm that is given these codes."""
        decoder, logits = build_residual(name, self.config, self.device, self.decoders), []

        def pick(codebook: int, now: Tensor) -> Tensor:
            logits.append(now.double().cpu())
            return codes[:, codebook].to(now.device)

        with torch.inference_mode():
            decoder.codes_of_frame(h.to(self.device, decoder.dtype), start.to(self.device), len(codes), pick)
        return torch.stack(logits, dim=1)

    def check(self, name: str, residual: bool = False) -> str:
        """A line that says what was found. Raises ValueError when the arm is red. `residual`: of its residual(), which
        has what follows the backbones alone."""
        weights = name.split("-")[1]
        if name.startswith("naive"):
            return f"{name}: plain PyTorch, the measure"
        errors = self.residual_errors if residual else self.errors
        found, plain = errors(name), errors(f"naive-{weights}")
        if weights == "fp32":
            different = int((found.codes != plain.codes).sum())
            limits = {"logits": 1e-5}
            line = f"{name}: {different} of {found.codes.numel()} codes differ from PyTorch's, "
        else:
            different = 0
            limits = {"logits": 2 * plain.logits, "logprobs": 2 * plain.logprobs, "regret": 4 * plain.worst}
            line = f"{name}: "
        line += ", ".join(f"{key} {getattr(found, key):.2e} of at most {limit:.2e}" for key, limit in limits.items())
        if different or not all(getattr(found, key) <= limit for key, limit in limits.items()):  # so that NaN is red
            raise ValueError(line)
        return line


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
