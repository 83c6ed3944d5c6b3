"""Sequences being decoded by the persistent CUDA kernel: all frames of a step are one launch.

The kernel writes codes and log-probabilities of a frame into the host's memory and then says that the frame is done.
The host looks every now and then; a frame counts once the host has seen it and it is sound. Whatever stops the host
before that (an error, Ctrl-C, a callback that raises) cancels the launch and waits for its end. The kernel may then be
ahead of the frames that count: the next launch puts back the little that a frame leaves to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cuda_weights import CudaWeights, Plan, settle
from .device_session import DeviceState, memory, on_device
from .errors import BackendError
from .reference import distinct_prompts
from .sampling import SamplingSettings

_MOST_FRAMES = 4096  # of a launch
_MOST_EPOCHS = 1 << 31  # frames times operations, which the kernel counts in 32 bits
_PATIENCE = 50  # milliseconds between two looks at a launch, and so until Ctrl-C is noticed


class Handle(Protocol):
    """A launch, as siren._cuda and siren._emulator give it.

    It knows addresses only: until it has finished, whoever launched it keeps the tensors that they came from alive. One
    that nobody holds any more cancels its launch and waits for its end.
    """

    @property
    def finished(self) -> bool: ...
    def wait(self, seen: int, milliseconds: int) -> int: ...
    def cancel(self) -> None: ...
    def result(self) -> None: ...


Launcher = Callable[[dict[str, Any]], Handle]


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host that the device can write to."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def follow(handle: Handle, frames: int, collect: Callable[[int], None]) -> None:
    """Wait for a launch of `frames` frames, with collect(frame) for each in order, as they are done.

    However this ends, the launch has ended too. Raises BackendError for what went wrong on the device.
    """
    try:
        seen = 0
        while seen < frames:
            ended = handle.finished  # before the look: frames that are done after it are in the look
            done = handle.wait(seen, _PATIENCE)
            for frame in range(seen, done):
                collect(frame)
            seen = done
            if ended:
                break
        _check(handle)
        if seen < frames:
            raise BackendError(f"backend 'cuda': the launch ended after {seen} of {frames} frames")
    except BaseException:
        _end(handle)
        raise


def _check(handle: Handle) -> None:
    try:
        handle.result()
    except RuntimeError as error:
        raise BackendError(f"backend 'cuda': {error}") from error


def _end(handle: Handle) -> None:
    """Wait until a launch that is no longer wanted uses no memory any more.

    Ctrl-C on the way does not stop that, nor does it take the place of the error that led here.
    """
    while True:
        try:
            handle.cancel()
            while not handle.finished:
                handle.wait(_MOST_EPOCHS - 1, _PATIENCE)  # more frames than there are: until the end
            return
        except KeyboardInterrupt:
            continue


class CudaState(DeviceState):
    """Sequences being decoded. Calls from several threads take turns."""

    _launched: Handle | None = None  # the latest launch, which may still be under way where an interruption came early
    _buffers: tuple[Tensor | None, ...] = ()  # memory of that launch which nothing else keeps

    @torch.inference_mode()
    def __init__(
        self,
        weights: CudaWeights,
        launch: Launcher,
        prompt: Tensor,
        prompt_mask: Tensor,
        seeds: NDArray[np.uint64],
        settings: SamplingSettings,
    ) -> None:
        device = weights.device
        super().__init__(weights.config, device, len(seeds), settings)
        self.weights, self._launch = weights, launch
        tokens, mask, index = distinct_prompts(prompt, prompt_mask, settings.guided)
        with memory(f"{self.batch} sequences"), on_device(device):
            self._plan = weights.plan(self.batch, settings.guided)
            prompts = [row[valid].to(device) for row, valid in zip(tokens, mask, strict=True)]
            self._prompt_keys, self._prompt_values = weights.prompt_cache(prompts)
            self._prompt_length = torch.tensor([len(own) for own in prompts], dtype=torch.int32, device=device)
            self._prompt_index = index.to(device, torch.int32)
            self._start = weights.decoder_starts(prompts)[:, index.to(device)].contiguous()
            self._seeds = torch.from_numpy(seeds.view(np.int64)).to(device)
            self._keys, self._values = self._new_cache(0)
            self._arena = self._new_arena(self._plan, self._start)
            settle(device)
        self._ahead = True  # whether the arena may not be that of the last frame that counts

    def __del__(self) -> None:
        self._end_launch()  # before its memory goes

    @torch.inference_mode()
    def step(self, frames: int, on_frame: Callable[[int, int], None] | None = None) -> None:
        """Draw `frames` more frames; on_frame(done, frames) is called as each arrives, out of inference mode."""
        with self._turn():
            self._reserve(self.frame + frames)
            first = self.frame

            def collected() -> None:
                if on_frame is not None:
                    with torch.inference_mode(False):
                        on_frame(self.frame - first, frames)

            while self.frame < first + frames:
                self._decode(min(first + frames - self.frame, self._most_frames()), None, collected)

    @torch.inference_mode()
    def force(self, codes: Tensor) -> Tensor:
        """Advance with these codes int64 [B, num_codebooks, n] -> logits float32 [B, num_codebooks, n, V]."""
        with self._turn(), memory(f"{codes.shape[2]} more frames of {self.batch} sequences"):
            self._reserve(self.frame + codes.shape[2])
            logits = []
            for given in codes.unbind(dim=2):
                forced = given.T.to(self.weights.device, torch.int32).contiguous()
                self._decode(1, forced, lambda: None)
                logits.append(self._region("logits").transpose(0, 1).cpu().clone())
            return torch.stack(logits, dim=2)

    @torch.inference_mode()
    def select(self, indices: list[int], seeds: NDArray[np.uint64] | None = None) -> None:
        """Keep, repeat or drop sequences. Their seeds go with them, unless new ones are given."""
        with self._turn(), memory(f"{len(indices)} sequences"):
            taken = self._kept(indices, seeds)
            plan = self.weights.plan(len(indices), self.settings.guided)
            taken |= {"_plan": plan, "_arena": self._new_arena(plan, taken["_start"]), "_ahead": True}
            self.__dict__.update(taken)  # at once: an interruption finds all or none
            settle(self._device)

    def _decode(self, frames: int, forced: Tensor | None, collected: Callable[[], None]) -> None:
        """One launch: `frames` more frames, or one with codes int32 [num_codebooks, B] that are given."""
        weights, device = self.weights, self.weights.device
        shape = (frames, weights.config.num_codebooks, self.batch)
        what = f"{frames} more frames of {self.batch} sequences"
        with memory(what):
            if self._ahead:
                self._go_back()
            codes, logprobs = host_tensor(shape, torch.int32, device), host_tensor(shape, torch.float32, device)
            noise_frames = torch.full((self.batch,), self.frame, dtype=torch.int32, device=device)

        def collect(frame: int) -> None:
            self._count(codes[frame].T, logprobs[frame].T)
            collected()

        arguments = {
            **weights.arguments(self._plan),
            **settings_arguments(self.settings),
            "arena": self._arena.data_ptr(),
            "keys": self._keys.data_ptr(),
            "values": self._values.data_ptr(),
            "prompt_keys": self._prompt_keys.data_ptr(),
            "prompt_values": self._prompt_values.data_ptr(),
            "prompt_index": self._prompt_index.data_ptr(),
            "prompt_length": self._prompt_length.data_ptr(),
            "seeds": self._seeds.data_ptr(),
            "noise_frames": noise_frames.data_ptr(),
            "forced": 0 if forced is None else forced.data_ptr(),
            "codes_out": codes.data_ptr(),
            "logprobs_out": logprobs.data_ptr(),
            "frames": frames,
            "first_frame": self.frame,
            "capacity": self.capacity,
            "prompts": self._prompt_keys.shape[2],
            "prompt_capacity": self._prompt_keys.shape[4],
        }
        self._ahead = True
        self._buffers = (codes, logprobs, noise_frames, forced)
        with memory(what):
            self._launched = self._launch(arguments)
        follow(self._launched, frames, collect)
        self._launched, self._buffers, self._ahead = None, (), False

    def _begin(self) -> None:
        self._end_launch()

    def _end_launch(self) -> None:
        """End the latest launch where an interruption came before `follow` could, so that its memory is free again."""
        if self._launched is not None:
            _end(self._launched)
            self._launched, self._buffers = None, ()

    def _most_frames(self) -> int:
        """Frames that one launch can count."""
        return min(_MOST_FRAMES, (_MOST_EPOCHS - 1) // len(self._plan.program.operations))

    def _region(self, name: str) -> Tensor:
        """A region of the arena, in its shape; float32."""
        return region(self._arena, self._plan, name)

    def _new_arena(self, plan: Plan, start: Tensor) -> Tensor:
        arena = torch.empty(plan.program.arena_floats, device=self.weights.device)
        if "start" in plan.program.regions:
            region(arena, plan, "start").copy_(start)
        return arena

    def _go_back(self) -> None:
        """Put into the arena what the next frame takes from the last one that counts."""
        if self.frame:
            codebooks = self.weights.config.num_codebooks
            codes = self._codes[:, :, self.frame - 1]
            if codebooks > 1:
                self._region("total")[codebooks % 2] = self.weights.embed(codes, codebooks - 1)
            self._region("codes").view(torch.int32)[-1] = codes[:, -1].to(self.weights.device)
        self._ahead = False

    def _new_cache(self, capacity: int) -> tuple[Tensor, Tensor]:
        config, rows = self.weights.config, self._plan.program.rows
        blocks, experts = config.spatial_layers, config.num_experts
        shape = (2, experts, blocks, rows, config.n_kv_heads, capacity, config.head_dim)
        keys, values = torch.empty(shape, dtype=torch.bfloat16, device=self.weights.device).unbind(0)
        return keys, values


def settings_arguments(settings: SamplingSettings) -> dict[str, Any]:
    """How codes are drawn, for the kernel."""
    return {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "guidance": settings.guidance_scale,
    }


def region(arena: Tensor, plan: Plan, name: str) -> Tensor:
    """A view of a region of an arena, in its shape; float32."""
    offset, shape = plan.program.regions[name]
    return arena[offset : offset + math.prod(shape)].view(shape)
