"""Plain PyTorch decoding with static shapes, so that a whole frame is one CUDA graph: what PyTorch can do at its best.

The weights, modules and arithmetic are ReferenceDecoder's. What differs: caches are as long as the clip from the start
and attention masks what is not there yet, the frame's number lives on the device, the noise of all frames is there
beforehand, and the host waits for nothing until codes are asked for. With `compiled` each block, and the residual
decoder, also goes through torch.compile(mode="max-autotune-no-cudagraphs") before the graph is captured.

Left out, as the benchmark does not use it: guidance, top_k, top_p, temperature 0, select, and the check for NaN at
every draw (decode.py looks at the log-probabilities after the last frame).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siren.errors import InputError
from siren.expert import Expert
from siren.layers import BackboneBlock, attend, sinusoidal_positions
from siren.reference import Cache, ReferenceDecoder, decoder_positions
from siren.sampling import SamplingSettings, gumbel_noise

WARM_UP = 2  # frames before capture: lazily made handles and torch.compile's products must exist by then


def static_block(
    block: BackboneBlock,
    x: Tensor,
    position: Tensor,
    slot: Tensor,
    allowed: Tensor,
    past: tuple[Tensor, Tensor],
    prompt: tuple[Tensor, Tensor],
    prompt_mask: Tensor | None,
) -> Tensor:
    """A backbone block on one frame: x [B, 1, d], position [1, d], slot [1] its number, allowed [1, 1, 1, L]."""
    x = x + position
    q = block.cross_attention.queries(block.cross_norm(x))
    x = x + block.cross_attention.output(attend(q, *prompt, prompt_mask))
    q, k, v = block.self_attention.project(block.self_norm(x))
    for cache, new in zip(past, (k, v), strict=True):
        cache.index_copy_(2, slot, new.to(cache.dtype))
    x = x + block.self_attention.output(attend(q, *past, allowed))
    return x + block.feed_forward(block.ffn_norm(x))


class StaticDecoder:
    """The decoder protocol for clips of at most `frames` frames, on the weights of `reference`.

    On a GPU the frame is captured by a CUDA graph; on a CPU it runs as it is.
    """

    def __init__(self, reference: ReferenceDecoder, frames: int, compiled: bool = False) -> None:
        self.reference, self.frames = copy.copy(reference), frames
        self.run_block: Callable[..., Tensor] = static_block
        if compiled:
            mode = "max-autotune-no-cudagraphs"
            self.run_block = torch.compile(static_block, mode=mode, dynamic=False, fullgraph=True)
            self.reference.run_decoder = torch.compile(decoder_positions, mode=mode, dynamic=False, fullgraph=True)

    @torch.inference_mode()
    def start(
        self, prompt: Tensor, prompt_mask: Tensor, seeds: NDArray[np.uint64], settings: SamplingSettings
    ) -> StaticState:
        if settings != SamplingSettings():
            raise InputError("the static arm draws with the default settings only")
        return StaticState(self, prompt, prompt_mask, seeds)


class StaticState:
    """A clip being decoded. L: frames it has room for."""

    def __init__(self, decoder: StaticDecoder, prompt: Tensor, prompt_mask: Tensor, seeds: NDArray[np.uint64]) -> None:
        reference, length = decoder.reference, decoder.frames
        config, device = reference.config, reference.device
        self.decoder, self.batch, self.frame = decoder, len(seeds), 0
        self.clip = reference.start(prompt, prompt_mask, seeds, SamplingSettings())  # the prompts' keys and values
        # Zeros: a masked key's weight is 0, and 0 x NaN would not be.
        self.past: list[Cache] = [
            [tuple(cache.zero_() for cache in reference.new_cache(self.batch, length)) for _ in expert.spatial_blocks]
            for expert in reference.experts
        ]
        self.positions = sinusoidal_positions(length, config.dim).to(device, reference.dtype)
        self.slots = torch.arange(length, device=device)
        count, size = config.num_codebooks, config.codebook_size
        self.noise = torch.empty(length, self.batch, count, size, device=device)
        for frame in range(length):
            self.noise[frame] = gumbel_noise(seeds, frame, range(count), size)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.x = torch.empty(config.num_experts, self.batch, 1, config.dim, dtype=reference.dtype, device=device)
        self._codes = torch.empty(self.batch, count, length, dtype=torch.int64, device=device)
        self._logprobs = torch.empty(self.batch, count, length, device=device)
        self._rewind()
        self.graph = self._capture() if device.type == "cuda" else None

    @property
    def codes(self) -> Tensor:
        """int64 [B, num_codebooks, frame], on the CPU."""
        return self._codes[:, :, : self.frame].to("cpu", copy=True)

    @property
    def logprobs(self) -> Tensor:
        """float32 [B, num_codebooks, frame], on the CPU."""
        return self._logprobs[:, :, : self.frame].to("cpu", copy=True)

    @torch.inference_mode()
    def step(self, frames: int, on_frame: Callable[[int, int], None] | None = None) -> None:
        """Draw `frames` more frames; on a GPU they may still be running when this returns."""
        self._claim(frames)
        for done in range(1, frames + 1):
            if self.graph is None:
                self._advance(self._draw)
            else:
                self.graph.replay()
            self.frame += 1
            if on_frame is not None:
                on_frame(done, frames)

    @torch.inference_mode()
    def force(self, codes: Tensor) -> Tensor:
        """Advance with these codes int64 [B, num_codebooks, n] -> logits [B, num_codebooks, n, V]; not captured."""
        self._claim(codes.shape[2])
        frames = []
        for given in codes.to(self._codes.device).unbind(dim=2):
            logits: list[Tensor] = []

            def take(codebook: int, row: Tensor, given: Tensor = given, logits: list[Tensor] = logits) -> Tensor:
                logits.append(row)
                self._keep(codebook, row, given[:, codebook])
                return given[:, codebook]

            self._advance(take)
            self.frame += 1
            frames.append(torch.stack(logits, dim=1))
        return torch.stack(frames, dim=2).cpu()

    def _claim(self, frames: int) -> None:
        if self.frame + frames > self.decoder.frames:
            raise InputError(f"this clip has room for {self.decoder.frames} frames, not {self.frame} + {frames}")

    def _rewind(self) -> None:
        self.slot.zero_()
        for x, expert in zip(self.x, self.decoder.reference.experts, strict=True):
            x.copy_(expert.sos.expand_as(x.unsqueeze(0))[0])

    def _advance(self, pick: Callable[[int, Tensor], Tensor]) -> None:
        """One frame, without a look at a value: it can be captured."""
        reference = self.decoder.reference
        position = self.positions.index_select(0, self.slot)
        allowed = (self.slots <= self.slot).view(1, 1, 1, -1)
        hidden = [self._backbone(k, expert, position, allowed) for k, expert in enumerate(reference.experts)]
        sums = reference.codes_of_frame(torch.stack(hidden), self.clip.start, self.batch, pick)
        self.x.copy_(sums.unsqueeze(2))
        self.slot += 1

    def _backbone(self, k: int, expert: Expert, position: Tensor, allowed: Tensor) -> Tensor:
        x = self.x[k]
        for block, past, prompt in zip(expert.spatial_blocks, self.past[k], self.clip.prompts[k], strict=True):
            x = self.decoder.run_block(block, x, position, self.slot, allowed, past, prompt, self.clip.prompt_mask)
        return expert.spatial_norm(x)[:, 0]

    def _draw(self, codebook: int, logits: Tensor) -> Tensor:
        noise = self.noise.index_select(0, self.slot)[0, :, codebook]
        codes = (logits + noise).argmax(dim=-1)
        self._keep(codebook, logits, codes)
        return codes

    def _keep(self, codebook: int, logits: Tensor, codes: Tensor) -> None:
        self._codes[:, codebook].index_copy_(1, self.slot, codes.unsqueeze(1))
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, codes.unsqueeze(1))
        self._logprobs[:, codebook].index_copy_(1, self.slot, logprobs)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The frame as a graph. Warm-up frames write slots that are written again before they are read."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(min(WARM_UP, self.decoder.frames)):
                self._advance(self._draw)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance(self._draw)
        self._rewind()
        return graph
