"""Sampler, Session and ResidualSampler: the front of every decoding backend.

Arguments are checked here, once and for all backends, which then see only tensors they can trust. "auto" picks a
backend once and says why; a backend asked for by name runs or raises, it never falls back. Every call has a state of
its own, and `load_expert`, which alone changes a sampler, waits for the calls under way: threads may share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .checkpoint import Manifest, read_manifest
from .config import SirenConfig
from .cuda_engine import CudaDecoder
from .engine import CpuDecoder, extension
from .errors import BackendError, InputError
from .expert import Expert
from .reference import ReferenceDecoder
from .sampling import SamplingSettings, expand_seeds
from .triton_engine import TritonDecoder
from .weight_updates import WeightUpdates

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
WEIGHTS = ("fp32", "bf16", "int8", "fp8")

Seeds = int | Sequence[int] | NDArray[np.integer] | Tensor
Progress = Callable[[int, int], None]


class Model(Protocol):
    """What is read of a siren.Siren."""

    config: SirenConfig
    experts: nn.ModuleList
    codec_path: Path | None
    prompt_encoder_name: str | None


@dataclass(frozen=True)
class SampleOutput:
    """codes int64 [B, num_codebooks, T]; logprobs float32 of the same shape: log-softmax of logits / temperature at
    the drawn codes, before top_k and top_p. Both on the CPU."""

    codes: Tensor
    logprobs: Tensor


class Session:
    """Sequences that are being sampled, frame by frame. Made by `Sampler.start`.

    On the C++ engine threads that share a session take turns, frame by frame. After `Sampler.load_expert` a session
    that was started before can be read and no more: `step` and `select` raise InputError.
    """

    def __init__(self, state: Any, config: SirenConfig, updates: WeightUpdates, began: int) -> None:
        self._state, self._config, self._updates, self._began = state, config, updates, began

    @property
    def codes(self) -> Tensor:
        """All codes so far, int64 [batch, num_codebooks, frame]."""
        return self._state.codes

    @property
    def logprobs(self) -> Tensor:
        """Their log-probabilities, float32 [batch, num_codebooks, frame]."""
        return self._state.logprobs

    @property
    def frame(self) -> int:
        """Frames sampled so far."""
        return self._state.frame

    @property
    def batch(self) -> int:
        """Live sequences."""
        return self._state.batch

    def step(self, frames: int = 1, on_frame: Progress | None = None) -> None:
        """Sample `frames` more frames. `on_frame(done, frames)` is called after each and may raise to stop there."""
        frames = _whole("frames", frames, 1)
        _check_callback(on_frame)
        limit = self._config.max_seq_len
        if self.frame + frames > limit:
            raise InputError(f"{self.frame} + {frames} frames exceed max_seq_len, which is {limit}")
        with self._updates.call(self._began):
            self._state.step(frames, on_frame)

    def select(self, indices: Sequence[int] | Tensor, seed: Seeds | None = None) -> None:
        """Go on with these sequences, in this order: [1, 1, 0] doubles 1, keeps 0 and drops the others.

        Seeds go with their sequences, so two copies of one stay equal, unless `seed` gives new ones, as in `start`.
        """
        values = indices.tolist() if isinstance(indices, (Tensor, np.ndarray)) else indices
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)) or not len(values):
            raise InputError(f"indices must be a list of at least one sequence number, not {indices!r}")
        kept = [_whole("an index", value, 0, self.batch - 1) for value in values]
        seeds = None if seed is None else expand_seeds(seed, len(kept))
        with self._updates.call(self._began):
            self._state.select(kept, seeds)


class Sampler:
    """Samples codes from prompt tokens. Needs no codec and no text encoder.

    `model` is a siren.Siren (its weights are copied: later changes are not seen before `load_expert`) or a Manifest.
    `backend`: "auto", "reference" (plain PyTorch, on the model's device), "cpu" (the C++ engine), "triton" (kernels on
    a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter) or "cuda" (one persistent kernel on a GPU, or with
    SIREN_CUDA_EMULATE=1 its emulator on the CPU; at most 32 sequences, with guidance 16); prompts and codes stay on the
    CPU. `weights`: "fp32" (not "cuda"), "bf16", "int8" or "fp8" ("cuda" alone; e4m3; both with a scale for each output
    channel, weights only). `threads` of the C++ engine; None: the physical cores this process may use. Raises
    BackendError for a backend that cannot run here, InputError for other arguments.
    """

    def __init__(
        self, model: Model | Manifest, backend: str = "auto", weights: str = "bf16", threads: int | None = None
    ) -> None:
        self.config = model.config
        self._decoder, self._choice = _build(model, backend, weights, threads)
        self._updates = WeightUpdates(self.config, weights)
        if isinstance(model, Manifest):
            self.codec_path, self.prompt_encoder_name = model.codec, model.prompt_encoder
        else:
            self.codec_path, self.prompt_encoder_name = model.codec_path, model.prompt_encoder_name

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backend: str = "auto", weights: str = "bf16", threads: int | None = None
    ) -> Sampler:
        """Build from a checkpoint folder, one expert at a time, without a second copy of the weights."""
        return cls(read_manifest(folder), backend, weights, threads)

    def describe(self) -> dict[str, Any]:
        """Backend, the reason it was picked, weights, device, instruction path, threads, bytes of weights."""
        return {**self._decoder.describe(), **self._choice}

    def load_expert(self, index: int, expert: Expert | Mapping[str, Tensor]) -> None:
        """Give expert `index` these weights, in place: from here on as if the sampler had been built with them.

        An Expert of this model, or its tensors under their names in a state dict, any of 16 to 64 bits, on any device;
        they are copied, and must not change meanwhile. The other experts are not touched, and beside them no more than
        a tensor exists twice. Sessions started before raise InputError at their next `step` or `select`; their codes
        stay readable.

        Threads: a load waits for the calls of `start`, `step`, `select` and `sample` that are under way, to their last
        frame, and calls that come meanwhile wait for the load. So an on_frame must not wait for another thread that
        loads or samples, and calling this from one raises InputError. So does whatever is wrong with index, names,
        shapes, types or values (NaN and infinity), before anything has changed. If memory runs out (BackendError) or
        Ctrl-C comes while the weights are written, sampling raises InputError until the expert is loaded again.
        """
        index = _whole("index", index, 0, self.config.num_experts - 1)
        self._updates.load(index, expert, self._decoder.load_expert)

    def start(
        self,
        prompt: Tensor,
        prompt_mask: Tensor | None = None,
        seed: Seeds = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
    ) -> Session:
        """Read the prompts and return a Session at frame 0.

        prompt [B, P, prompt_dim] float and prompt_mask [B, P] bool (True = token; None: all), on the CPU. Seed s gives
        sequence i the seed s + i; a list gives one each. For the other arguments see SamplingSettings.
        """
        settings = _settings(self.config, temperature, top_k, top_p, guidance_scale)
        tokens, mask = _check_prompt(self.config, prompt, prompt_mask)
        seeds = expand_seeds(seed, len(tokens))
        with self._updates.call() as began:
            state = self._decoder.start(tokens, mask, seeds, settings)
        return Session(state, self.config, self._updates, began)

    def sample(
        self,
        prompt: Tensor,
        prompt_mask: Tensor | None = None,
        frames: int = 300,
        seed: Seeds = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        on_frame: Progress | None = None,
    ) -> SampleOutput:
        """Sample `frames` frames for every prompt; arguments as in `start` and `Session.step`."""
        frames = _whole("frames", frames, 1, self.config.max_seq_len)
        _check_callback(on_frame)
        with self._updates.call():  # a load does not come between
            session = self.start(prompt, prompt_mask, seed, temperature, top_k, top_p, guidance_scale)
            session.step(frames, on_frame)
        return SampleOutput(session.codes, session.logprobs)


class ResidualSampler:
    """Everything of a frame after the backbones, for projects with backbones of their own."""

    def __init__(
        self, model: Model | Manifest, backend: str = "auto", weights: str = "bf16", threads: int | None = None
    ) -> None:
        self.config = model.config
        self._decoder, self._choice = _build(model, backend, weights, threads, residual=True)
        self._updates = WeightUpdates(self.config, weights)

    def describe(self) -> dict[str, Any]:
        """As `Sampler.describe`."""
        return {**self._decoder.describe(), **self._choice}

    def load_expert(self, index: int, expert: Expert | Mapping[str, Tensor]) -> None:
        """As `Sampler.load_expert`."""
        index = _whole("index", index, 0, self.config.num_experts - 1)
        self._updates.load(index, expert, self._decoder.load_expert)

    def __call__(
        self,
        h: Tensor,
        start: Tensor,
        seed: Seeds = 0,
        frame: int | Sequence[int] | Tensor = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample the codes of one frame of B sequences.

        h [num_experts, B, dim]: backbone outputs after their norm; start, same shape: the vectors that the residual
        decoders' conditions are added to (eq. 5); both float, on the CPU. frame: the frame's number, one or [B], which
        the noise depends on. Returns codes int64 [B, num_codebooks], log-probabilities float32 [B, num_codebooks], and
        the embedding sums that are the next frame's backbone inputs, float32 [num_experts, B, dim].
        """
        settings = _settings(self.config, temperature, top_k, top_p, 1.0)
        for name, tensor in (("h", h), ("start", start)):
            _check_tensor(name, tensor, (self.config.num_experts, None, self.config.dim))
        if h.shape != start.shape:
            raise InputError(f"h and start must have one shape, got {tuple(h.shape)} and {tuple(start.shape)}")
        h, start = (tensor.detach().to(torch.float32).contiguous() for tensor in (h, start))
        for name, tensor in (("h", h), ("start", start)):
            _check_finite(name, tensor)
        batch = h.shape[1]
        values = frame.tolist() if isinstance(frame, (Tensor, np.ndarray)) else frame
        if not isinstance(values, Sequence):
            values = [values] * batch
        if len(values) != batch:
            raise InputError(f"frame lists {len(values)} values for {batch} sequences; give one each, or one number")
        frames = np.array([_whole("frame", value, 0, (1 << 32) - 1) for value in values], dtype=np.int64)
        seeds = expand_seeds(seed, batch)
        with self._updates.call():
            return self._decoder.residual(h, start, seeds, frames, settings)


def _build(
    source: Model | Manifest, backend: str, weights: str, threads: int | None, residual: bool = False
) -> tuple[Any, dict[str, str]]:
    """A decoder and what `describe` adds: the backend that was asked for and the reason for the one that runs."""
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if weights not in WEIGHTS:
        raise InputError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
    if threads is not None:
        threads = _whole("threads", threads, 1, 1024)
    if backend != "cuda" and weights == "fp8":
        raise BackendError(f"weights 'fp8' are for backend 'cuda'; {backend!r} has 'fp32', 'bf16' and 'int8'")
    device = torch.device("cpu") if isinstance(source, Manifest) else next(source.experts.parameters()).device
    chosen, reason = backend, "asked for by name"
    if backend == "auto" and device.type != "cpu":
        reason = "and no GPU has run 'triton' or 'cuda' yet, so they are used only where asked for by name"
        chosen, reason = "reference", f"the model is on {device}, {reason}"
    elif backend == "auto":
        try:
            extension()
            chosen, reason = "cpu", "the C++ engine is built, and on a CPU it is the fastest"
        except BackendError as error:
            chosen, reason = "reference", str(error)
    note = {"requested": backend, "reason": reason}
    if chosen == "cpu":
        if isinstance(source, Manifest):
            return CpuDecoder.from_folder(source, weights, threads), note
        return CpuDecoder(source.config, _states(source), weights, threads), note
    if threads is not None and chosen in ("triton", "cuda"):
        raise InputError(f"threads are the C++ engine's: leave them out with backend {chosen!r}")
    if threads is not None:
        raise InputError("the reference backend runs on PyTorch's threads: leave threads, call torch.set_num_threads")
    if chosen == "triton":
        if isinstance(source, Manifest):
            return TritonDecoder.from_folder(source, weights, persistent=residual), note
        return TritonDecoder(source.config, _states(source), weights, device, persistent=residual), note
    if chosen == "cuda":
        if isinstance(source, Manifest):
            return CudaDecoder.from_folder(source, weights, residual), note
        return CudaDecoder(source.config, _states(source), weights, device, residual), note
    if isinstance(source, Manifest):
        return ReferenceDecoder.from_folder(source, weights), note
    return ReferenceDecoder(source.config, _states(source), weights, device), note


def _states(model: Model) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(start_codebook, state dict) of every expert, refused if a weight is NaN or infinite."""
    for k, expert in enumerate(model.experts):
        state = {name: value.detach() for name, value in expert.state_dict().items()}
        for name, value in state.items():
            _check_finite(f"expert {k}: {name}", value)
        yield k * model.config.codes_per_expert, state


def _settings(
    config: SirenConfig, temperature: float, top_k: int, top_p: float, guidance_scale: float
) -> SamplingSettings:
    settings = SamplingSettings(temperature, top_k, top_p, guidance_scale)
    if settings.top_k > config.codebook_size:
        raise InputError(f"top_k must be from 0 to the {config.codebook_size} codes of a codebook, not {top_k}")
    return settings


def _check_prompt(config: SirenConfig, prompt: Tensor, prompt_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The prompt in float32 with zeros for its padding, which may have held anything, and its mask."""
    _check_tensor("prompt", prompt, (None, None, config.prompt_dim))
    batch, length, _ = prompt.shape
    if length > config.max_prompt_len:
        raise InputError(f"prompt has {length} tokens; max_prompt_len is {config.max_prompt_len}")
    if prompt_mask is None:
        prompt_mask = torch.ones(batch, length, dtype=torch.bool)
    _check_tensor("prompt_mask", prompt_mask, (batch, length), torch.bool)
    empty = (~prompt_mask.any(dim=1)).nonzero()
    if len(empty):
        raise InputError(f"prompt_mask of sequence {int(empty[0])} holds no True; every prompt needs a token")
    prompt = prompt.detach().masked_fill(~prompt_mask.unsqueeze(-1), 0).to(torch.float32)
    _check_finite("prompt", prompt)
    return prompt.contiguous(), prompt_mask.contiguous()


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> None:
    """CPU tensor of this shape (None: any, at least 1) and dtype (None: any floating point), or InputError."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    fits = len(shape) == tensor.ndim and all(
        actual >= 1 if wanted is None else actual == wanted for wanted, actual in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")
    if tensor.dtype != dtype if dtype else not tensor.is_floating_point():
        raise InputError(f"{name} must be {dtype or 'floating point'}, not {tensor.dtype}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor on the CPU, not {tensor.layout} on {tensor.device}")


def _check_finite(name: str, tensor: Tensor) -> None:
    low, high = torch.aminmax(tensor)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InputError(f"{name} holds NaN or infinity")


def _whole(name: str, value: object, low: int, high: int | None = None) -> int:
    limits = f"from {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name} must be a whole number {limits}, not {value!r}")
    if value < low or (high is not None and value > high):
        raise InputError(f"{name} must be {limits}, not {value}")
    return int(value)


def _check_callback(on_frame: object) -> None:
    if on_frame is not None and not callable(on_frame):
        raise InputError(f"on_frame must be callable, not {type(on_frame).__name__}")
