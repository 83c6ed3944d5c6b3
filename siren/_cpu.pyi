"""Types of the C++ extension (csrc/cpu/bind.cpp, bind_ops.cpp)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class BadLogits(RuntimeError): ...  # noqa: N818

def instruction_path() -> str: ...
def draw(
    logits: NDArray[np.float32],
    seeds: Sequence[int],
    frame: int,
    codebook: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
def gumbel_noise(seed: int, frame: int, codebook: int, n: int) -> NDArray[np.float32]: ...

class Engine:
    def __init__(self, config: dict[str, Any], weights: str, threads: int) -> None: ...
    def load(self, expert: int, name: str, values: NDArray[np.float32]) -> None: ...
    def set_positions(self, rows: NDArray[np.float32]) -> None: ...
    def check_complete(self) -> None: ...
    def start(
        self,
        prompts: NDArray[np.float32],
        mask: NDArray[np.uint8],
        seeds: Sequence[int],
        temperature: float,
        top_k: int,
        top_p: float,
        guidance: float,
    ) -> Session: ...
    def residual(
        self,
        h: NDArray[np.float32],
        start: NDArray[np.float32],
        seeds: Sequence[int],
        frame: NDArray[np.int64],
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]: ...
    def describe(self) -> dict[str, Any]: ...

class Session:
    codes: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    frame: int
    batch: int
    cache_bytes: int
    def step(
        self, frames: int, on_frame: Callable[[int, int], None] | None, forced: NDArray[np.int64] | None
    ) -> NDArray[np.float32] | None: ...
    def select(self, indices: Sequence[int], seeds: Sequence[int]) -> None: ...

class PackedMatrix:
    bytes: int
    def __init__(self, values: NDArray[np.float32], weights: str, paired: bool = False, threads: int = 1) -> None: ...
    def matmul(self, x: NDArray[np.float32]) -> NDArray[np.float32]: ...

class ReadTest:
    bytes: int
    def __init__(self, size: int, threads: int) -> None: ...
    def run(self) -> int: ...
