"""What sessions on a GPU have in common: turns, what was drawn, and caches that grow.

A frame counts once the host has seen its codes and they are sound. The device may be ahead of that: a subclass launches
frames and, at the next turn, takes the device back to the last one that counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import SirenConfig
from .errors import InputError
from .sampling import SamplingSettings, check_drawn

_FIRST_CAPACITY = 64  # frames that a session's cache has room for at first


def out_of_memory(error: Exception) -> bool:
    """Whether this says that the device's memory or the host's is full, which PyTorch has a type for on GPUs alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def memory(what: str) -> Iterator[None]:
    """Turns an error of our own allocations into one that says what to do; nothing of a caller's may run inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"not enough memory for {what}: use fewer sequences or frames") from error


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Launches inside go to this GPU; nothing on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class DeviceState:
    """Sequences being decoded. Calls from several threads take turns.

    A subclass has the frames: `_keys` and `_values` from `_new_cache`, `_start`, `_prompt_index` and `_seeds` on the
    device, and `_begin`, which every turn starts with.
    """

    _FORGOTTEN: ClassVar[dict[str, Any]] = {}  # attributes that new caches make worthless, and their new values
    _keys: Tensor
    _values: Tensor

    def __init__(self, config: SirenConfig, device: torch.device, batch: int, settings: SamplingSettings) -> None:
        self._config, self._device, self.settings = config, device, settings
        self.batch, self.frame, self.capacity = batch, 0, 0
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is
        self._codes = torch.empty(batch, config.num_codebooks, 0, dtype=torch.int64)
        self._logprobs = torch.empty(batch, config.num_codebooks, 0)

    @property
    def rows(self) -> int:
        """With guidance two a sequence: first the prompts, then as many null prompts."""
        return self.batch * (2 if self.settings.guided else 1)

    @property
    def codes(self) -> Tensor:
        """int64 [B, num_codebooks, frame], on the CPU."""
        return self._codes[:, :, : self.frame].clone()

    @property
    def logprobs(self) -> Tensor:
        """float32 [B, num_codebooks, frame], on the CPU."""
        return self._logprobs[:, :, : self.frame].clone()

    def _begin(self) -> None:
        """The device at the last frame that counts, or ready to be put there."""
        raise NotImplementedError

    def _new_cache(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Keys and values [..., capacity, head_dim], not filled."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """This thread's turn."""
        if self._owner == threading.get_ident():
            raise InputError("a session cannot be stepped or selected from its own on_frame")
        with self._lock, on_device(self._device):
            self._owner = threading.get_ident()
            try:
                self._begin()
                yield
            finally:
                self._owner = None

    def _count(self, codes: Tensor, logprobs: Tensor) -> None:
        """One more frame: codes and log-probabilities [B, num_codebooks] on the CPU. SamplingError for a bad one."""
        check_drawn(logprobs, self.frame)
        self._codes[:, :, self.frame] = codes
        self._logprobs[:, :, self.frame] = logprobs
        self.frame += 1

    def _kept(self, indices: list[int], seeds: NDArray[np.uint64] | None, **more: int) -> dict[str, Any]:
        """The attributes of a session of these sequences. `more`: tensors on the device, and which dimension has the
        sequences."""
        if max(indices) >= self.batch:  # another thread may have been here since the caller looked
            raise InputError(f"there is no sequence {max(indices)} of {self.batch}")
        kept = torch.tensor(indices)
        rows = torch.cat((kept, self.batch + kept)) if self.settings.guided else kept
        places = {"_keys": (2, rows), "_values": (2, rows), "_start": (1, rows), "_prompt_index": (0, rows)}
        places |= {name: (dim, kept) for name, dim in {"_seeds": 0, **more}.items()}
        taken: dict[str, Any] = {
            name: getattr(self, name).index_select(dim, index.to(self._device)) for name, (dim, index) in places.items()
        }
        if seeds is not None:
            taken["_seeds"] = torch.from_numpy(seeds.view(np.int64)).to(self._device)
        return {**taken, "_codes": self._codes[kept], "_logprobs": self._logprobs[kept], "batch": len(kept)}

    def _reserve(self, frames: int) -> None:
        """Room for this many frames in all. Doubling keeps the copies of a long stream of short steps linear."""
        if frames <= self.capacity:
            return
        used, longest = self.frame, self._config.max_seq_len
        if frames > longest:  # another thread may have stepped since the caller looked
            raise InputError(f"{frames} frames exceed max_seq_len, which is {longest}")
        capacity = min(max(frames, 2 * self.capacity, _FIRST_CAPACITY), longest)
        with memory(f"{frames} frames of {self.batch} sequences"):
            keys, values = self._new_cache(capacity)
            keys[..., :used, :], values[..., :used, :] = self._keys[..., :used, :], self._values[..., :used, :]
            shape = (self.batch, self._config.num_codebooks, capacity)
            codes, logprobs = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
            codes[:, :, :used], logprobs[:, :, :used] = self.codes, self.logprobs
        grown = {"_keys": keys, "_values": values, "_codes": codes, "_logprobs": logprobs, "capacity": capacity}
        self.__dict__.update(grown, **self._FORGOTTEN)  # at once: an interruption finds all or none
