"""Sequences being decoded by Triton kernels: a frame is launched as one CUDA graph, several frames ahead of the host.

Everything that a frame changes lives on the device: the sums of the latest embeddings, the caches, the frame's number.
So the same captured launch serves every frame and the device never waits for the host. Codes and log-probabilities
follow in pinned memory; a frame counts once they have arrived and are sound. Whatever stops the host before that (an
error, Ctrl-C, a callback that raises) discards the frames launched ahead: the device's state goes back to the last
frame that counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import InputError
from .reference import distinct_prompts
from .sampling import SamplingSettings, check_drawn
from .triton_weights import TritonWeights

_FIRST_CAPACITY = 64  # frames that a session's cache has room for at first
_AHEAD = 8  # frames that may be launched and not yet collected: a frame takes the host less time than the device


@contextlib.contextmanager
def _memory(what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"not enough memory on the device for {what}: use fewer sequences or frames") from error


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


class TritonState:
    """Sequences being decoded. Calls from several threads take turns."""

    def __init__(
        self,
        weights: TritonWeights,
        prompt: Tensor,
        prompt_mask: Tensor,
        seeds: NDArray[np.uint64],
        settings: SamplingSettings,
        persistent: bool,
    ) -> None:
        config, device = weights.config, weights.device
        self.weights, self.settings, self.persistent = weights, settings, persistent
        self.batch, self.frame, self.capacity = len(seeds), 0, 0
        self.rows = self.batch * (2 if settings.guided else 1)
        self._lock = threading.Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False  # whether a frame of these sizes ran, which compiles its kernels
        tokens, mask, index = distinct_prompts(prompt, prompt_mask, settings.guided)
        with _memory(f"{self.batch} sequences"), weights.on_device():
            tokens, mask, index = (tensor.to(device) for tensor in (tokens, mask, index))
            self._prompt_keys, self._prompt_values = weights.prompt_cache(tokens)
            self._prompt_mask, self._prompt_index = mask.contiguous(), index.to(torch.int32)
            self._start = weights.decoder_starts(tokens, mask)[:, index].contiguous()
            self._seeds = torch.from_numpy(seeds.view(np.int64)).to(device)
            self._frames = torch.zeros(self.batch, dtype=torch.int64, device=device)  # on the device: its next frame
            self._inputs = weights.sos.unsqueeze(1).repeat(1, self.batch, 1)
            self._keys, self._values = self._new_cache(0)
        self._codes = torch.empty(self.batch, config.num_codebooks, 0, dtype=torch.int64)
        self._logprobs = torch.empty(self.batch, config.num_codebooks, 0)

    @property
    def codes(self) -> Tensor:
        """int64 [B, num_codebooks, frame], on the CPU."""
        return self._codes[:, :, : self.frame].clone()

    @property
    def logprobs(self) -> Tensor:
        """float32 [B, num_codebooks, frame], on the CPU."""
        return self._logprobs[:, :, : self.frame].clone()

    def step(self, frames: int, on_frame: Callable[[int, int], None] | None = None) -> None:
        """Draw `frames` more frames; on_frame(done, frames) is called as each arrives."""
        with self._lock, self._sound():
            self._reserve(self.frame + frames)
            flights: deque[_Flight] = deque()
            for launched in range(1, frames + 1):
                flights.append(_Flight(*self._launch()))
                while flights and (launched == frames or len(flights) > _AHEAD):
                    self._collect(flights.popleft())
                    if on_frame is not None:
                        on_frame(launched - len(flights), frames)

    def force(self, codes: Tensor) -> Tensor:
        """Advance with these codes int64 [B, num_codebooks, n] -> logits float32 [B, num_codebooks, n, V]."""
        with self._lock, self._sound():
            self._reserve(self.frame + codes.shape[2])
            logits = []
            for given in codes.to(self.weights.device).unbind(dim=2):
                drawn, logprobs, now = self._advance(given.contiguous())
                self._collect(_Flight(drawn, logprobs))
                logits.append(now.cpu())
            return torch.stack(logits, dim=2)

    def select(self, indices: list[int], seeds: NDArray[np.uint64] | None = None) -> None:
        """Keep, repeat or drop sequences. Their seeds go with them, unless new ones are given."""
        with self._lock, self.weights.on_device():
            kept = torch.tensor(indices)
            rows = torch.cat((kept, self.batch + kept)) if self.settings.guided else kept
            device = self.weights.device
            dims = {"_keys": 2, "_values": 2, "_start": 1, "_prompt_index": 0, "_inputs": 1, "_seeds": 0, "_frames": 0}
            with _memory(f"{len(indices)} sequences"):
                index = {name: kept if name in ("_inputs", "_seeds", "_frames") else rows for name in dims}
                taken = {n: getattr(self, n).index_select(dim, index[n].to(device)) for n, dim in dims.items()}
            if seeds is not None:
                taken["_seeds"] = torch.from_numpy(seeds.view(np.int64)).to(device)
            for name, tensor in taken.items():
                if len(indices) == self.batch:
                    getattr(self, name).copy_(tensor)  # the captured graph reads these very tensors
                else:
                    setattr(self, name, tensor)
            if len(indices) != self.batch:
                self._graph, self._warm = None, False
            self._codes, self._logprobs = self._codes[kept], self._logprobs[kept]
            self.batch, self.rows = len(kept), len(rows)

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
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._written = self._advance()
            self._graph = graph
        if self._graph is None:
            self._written = self._advance()
            self._warm = True
        else:
            self._graph.replay()
        return self._written[:2]

    def _collect(self, flight: _Flight) -> None:
        flight.land()
        check_drawn(flight.logprobs, self.frame)
        self._codes[:, :, self.frame] = flight.codes
        self._logprobs[:, :, self.frame] = flight.logprobs
        self.frame += 1

    @contextlib.contextmanager
    def _sound(self) -> Iterator[None]:
        """Leave the device at the last frame that counts, whatever happens inside."""
        with self.weights.on_device(), _memory(f"more frames of {self.batch} sequences"):
            try:
                yield
            except BaseException:
                if self.weights.device.type == "cuda":
                    torch.cuda.synchronize()
                self._frames.fill_(self.frame)
                if self.frame:
                    self._inputs.copy_(self.weights.embed(self._codes[:, :, self.frame - 1]))
                else:
                    self._inputs.copy_(self.weights.sos.unsqueeze(1).expand_as(self._inputs))
                raise

    def _new_cache(self, capacity: int) -> tuple[Tensor, Tensor]:
        weights, config = self.weights, self.weights.config
        blocks, experts = config.spatial_layers, config.num_experts
        shape = (blocks, experts, self.rows, config.n_kv_heads, capacity, config.head_dim)
        keys, values = torch.empty((2, *shape), dtype=weights.cache_dtype, device=weights.device).unbind(0)
        return keys, values

    def _reserve(self, frames: int) -> None:
        """Room for this many frames in all. Doubling keeps the copies of a long stream of short steps linear."""
        if frames <= self.capacity:
            return
        used, longest = self.frame, self.weights.config.max_seq_len
        capacity = min(max(frames, 2 * self.capacity, _FIRST_CAPACITY), longest)
        keys, values = self._new_cache(capacity)
        keys[..., :used, :], values[..., :used, :] = self._keys[..., :used, :], self._values[..., :used, :]
        shape = (self.batch, self.weights.config.num_codebooks, capacity)
        codes, logprobs = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        codes[:, :, :used], logprobs[:, :, :used] = self.codes, self.logprobs
        self._keys, self._values, self._codes, self._logprobs = keys, values, codes, logprobs
        self.capacity, self._graph, self._warm = capacity, None, False
