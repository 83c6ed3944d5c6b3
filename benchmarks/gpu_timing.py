"""Times on a GPU, by events: operations one after another, and the two rates that bound them.

The host's time is not in an operation's figure, up to 2 ms of it: the GPU spins that long before, while the host queues
the operation, so that many small launches are not charged for the gaps between them. The L2 cache is flushed before
every call, by writing zeros over more than it holds: what the operation reads is not in it, but it is full of lines
that are yet to be written back, which costs every arm some bandwidth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

SPIN_CYCLES = 4_000_000  # about 2 ms
FEWEST, MOST = 10, 100  # repetitions of each arm
COPY_BYTES = 1 << 30


def elapsed(call: Callable[[], object]) -> float:
    """Seconds of device time between two events around the call; waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class CopyProbe:
    """Device-to-device copies of 1 GiB: bytes read plus bytes written, a second."""

    def __init__(self) -> None:
        self.source = torch.randint(127, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
        self.target = torch.empty_like(self.source)
        self.run()

    def run(self) -> float:
        return 2 * COPY_BYTES / elapsed(lambda: self.target.copy_(self.source))


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations a second of a bf16 product of two random square matrices, the median of ten."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    return 2 * size**3 / statistics.median(elapsed(lambda: torch.mm(a, b)) for _ in range(10))


def interleaved(arms: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call of every arm, one arm after another, for at most about `seconds` of wall time.

    The arms have run before, so that nothing compiles here.
    """
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(4 * l2, 1 << 26), dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in arms}
    stop = time.perf_counter() + seconds
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() > stop:
            break
        for name, arm in arms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SPIN_CYCLES)
            flush.zero_()
            start.record()
            arm()
            end.record()
            end.synchronize()
            if turn:  # the first round warms up
                times[name].append(start.elapsed_time(end) / 1e3)
    return times
