"""Sequences being decoded by Triton kernels: a frame is launched as one CUDA graph, several frames ahead of the host.

Everything that a frame changes lives on the device: the sums of the latest embeddings, the caches, the frame's number.
So the same captured launch serves every frame and the device need not wait for the host. Codes and log-probabilities
follow in pinned memory; a frame counts once they have arrived and are sound. Whatever stops the host before that (an
error, Ctrl-C, a callback that raises) leaves the device ahead of the frames that count: the next call takes it back
first, so that nothing done on the way out can go wrong.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .device_session import DeviceState, memory, on_device
from .reference import distinct_prompts
from .sampling import SamplingSettings
from .triton_weights import TritonWeights

_CAPTURE = threading.Lock()  # PyTorch allows one capture at a time in a process
_AHEAD = 8  # frames that may be launched and not yet collected, so that the device has the next one at hand


class _Flight:
    """A launched frame: where its codes and log-probabilities will arrive."""

    def __init__(self, codes: Tensor, logprobs: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if codes.device.type == "cpu":
            self.codes, self.logprobs = codes.clone(), logprobs.clone()
            return
        self.codes, self.logprobs = (torch.empty_like(t, device="cpu", pin_memory=True) for t in (codes, logprobs))
        self.codes.copy_(codes, non_blocking=True)
        self.logprobs.copy_(logprobs, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def land(self) -> None:
        if self.event is not None:
            self.event.synchronize()


class TritonState(DeviceState):
    """Sequences being decoded. Calls from several threads take turns."""

    _FORGOTTEN: ClassVar[dict[str, Any]] = {"_graph": None, "_warm": False}

    @torch.inference_mode()
    def __init__(
        self,
        weights: TritonWeights,
        prompt: Tensor,
        prompt_mask: Tensor,
        seeds: NDArray[np.uint64],
        settings: SamplingSettings,
        persistent: bool,
    ) -> None:
        device = weights.device
        super().__init__(weights.config, device, len(seeds), settings)
        self.weights, self.persistent = weights, persistent
        self._ahead = False  # whether frames were launched that may not count
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False  # whether a frame of these sizes ran, which compiles its kernels
        tokens, mask, index = distinct_prompts(prompt, prompt_mask, settings.guided)
        with memory(f"{self.batch} sequences"), on_device(device):
            tokens, mask, index = (tensor.to(device) for tensor in (tokens, mask, index))
            self._prompt_keys, self._prompt_values = weights.prompt_cache(tokens, mask)
            self._prompt_mask, self._prompt_index = mask.contiguous(), index.to(torch.int32)
            self._start = weights.decoder_starts(tokens, mask)[:, index].contiguous()
            self._seeds = torch.from_numpy(seeds.view(np.int64)).to(device)
            self._frames = torch.zeros(self.batch, dtype=torch.int64, device=device)  # on the device: its next frame
            self._inputs = weights.sos.unsqueeze(1).repeat(1, self.batch, 1)
            self._keys, self._values = self._new_cache(0)

    @torch.inference_mode()
    def step(self, frames: int, on_frame: Callable[[int, int], None] | None = None) -> None:
        """Draw `frames` more frames; on_frame(done, frames) is called as each arrives, out of inference mode."""
        what = f"{frames} more frames of {self.batch} sequences"
        with self._turn():
            self._reserve(self.frame + frames)
            self._ahead = True
            flights: deque[_Flight] = deque()
            for launched in range(1, frames + 1):
                with memory(what):
                    flights.append(_Flight(*self._launch()))
                while flights and (launched == frames or len(flights) > _AHEAD):
                    self._collect(flights.popleft())
                    if on_frame is not None:
                        with torch.inference_mode(False):
                            on_frame(launched - len(flights), frames)
            self._ahead = False

    @torch.inference_mode()
    def force(self, codes: Tensor) -> Tensor:
        """Advance with these codes int64 [B, num_codebooks, n] -> logits float32 [B, num_codebooks, n, V]."""
        what = f"{codes.shape[2]} more frames of {self.batch} sequences"
        with self._turn(), memory(what):
            self._reserve(self.frame + codes.shape[2])
            self._ahead = True
            logits = []
            for given in codes.to(self.weights.device).unbind(dim=2):
                drawn, logprobs, now = self._advance(given.contiguous())
                self._collect(_Flight(drawn, logprobs))
                logits.append(now.cpu())
            self._ahead = False
            return torch.stack(logits, dim=2)

    @torch.inference_mode()
    def select(self, indices: list[int], seeds: NDArray[np.uint64] | None = None) -> None:
        """Keep, repeat or drop sequences. Their seeds go with them, unless new ones are given."""
        what = f"{len(indices)} sequences"
        with self._turn(), memory(what):
            taken = self._kept(indices, seeds, _inputs=1, _frames=0)
            taken |= {"_graph": None, "_warm": self._warm and len(indices) == self.batch}
            self.__dict__.update(taken)  # at once: an interruption finds all or none

    def _advance(self, forced: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Launch one frame: its codes, log-probabilities and logits, on the device."""
        weights, settings = self.weights, self.settings
        hidden = weights.backbone_step(
            self._inputs.repeat(1, self.rows // self.batch, 1),
            self._frames[:1],
            weights.positions,
            self._prompt_keys,
            self._prompt_values,
            self._prompt_mask,
            self._prompt_index,
            self._keys,
            self._values,
        )
        codes, logprobs, inputs, logits = weights.residual_frame(
            hidden, self._start, self._seeds, self._frames, forced, settings, self.persistent and forced is None
        )
        self._inputs.copy_(inputs)
        self._frames += 1
        return codes, logprobs, logits

    def _launch(self) -> tuple[Tensor, Tensor]:
        """One frame: the first as it is, which compiles its kernels, later ones as a captured graph."""
        if self._graph is None and self._warm and self.weights.device.type == "cuda":
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.weights.device)
            # The outer context puts the stream back even where ending the capture fails.
            capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            with _CAPTURE, torch.cuda.stream(stream), capture:
                self._outputs = self._advance()
            self._graph = graph
        if self._graph is None:
            self._outputs = self._advance()
            self._warm = True
        else:
            self._graph.replay()
        return self._outputs[:2]

    def _collect(self, flight: _Flight) -> None:
        flight.land()
        self._count(flight.codes, flight.logprobs)

    def _begin(self) -> None:
        if self._ahead:
            with memory(f"{self.batch} sequences"):
                self._go_back()

    def _go_back(self) -> None:
        if self.weights.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._frames.fill_(self.frame)
        if self.frame:
            self._inputs.copy_(self.weights.embed(self._codes[:, :, self.frame - 1]))
        else:
            self._inputs.copy_(self.weights.sos.unsqueeze(1).expand_as(self._inputs))
        self._ahead = False

    def _new_cache(self, capacity: int) -> tuple[Tensor, Tensor]:
        weights, config = self.weights, self.weights.config
        blocks, experts = config.spatial_layers, config.num_experts
        shape = (blocks, experts, self.rows, config.n_kv_heads, capacity, config.head_dim)
        keys, values = torch.empty((2, *shape), dtype=weights.cache_dtype, device=weights.device).unbind(0)
        return keys, values
