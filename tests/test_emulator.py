"""Launches of the emulated kernel: what its arguments must be, and that a launch ends when nobody wants it any more."""

from __future__ import annotations

import gc
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_emulator = pytest.importorskip("siren._emulator", reason="the emulator of the CUDA kernel is not built")

POINTERS = [
    "instructions",
    "starts",
    "tape",
    "vectors",
    "tables",
    "sos",
    "positions",
    "arena",
    "keys",
    "values",
    "prompt_keys",
    "prompt_values",
    "prompt_index",
    "prompt_length",
    "seeds",
    "noise_frames",
    "forced",
    "codes_out",
    "logprobs_out",
    "trace",
]
OFFSETS = ["h", "start", "total", "logits", "noise", "codes", "dkv", "dx"]
SIZES = {
    "sms": 2, "operations": 2, "frames": 3, "first_operation": 0, "last_operation": 2, "first_frame": 0,
    "sequences": 1, "rows": 1, "dim": 32, "heads": 1, "kv_heads": 1, "head_dim": 32, "hidden": 32,
    "backbone_blocks": 1, "decoder_blocks": 0, "codebooks": 1, "experts": 1, "codes_per_codebook": 8, "capacity": 4,
    "prompts": 1, "prompt_capacity": 1, "conditioning": 0, "format": 0, "stages": 0, "staged_bytes": 4096,
    "spin_limit": 1000, "temperature": 0.0, "guidance": 1.0, "eps": 1e-5, "top_k": 0, "top_p": 1.0,
}  # fmt: skip
NORM = 5  # an instruction with an empty share of nothing: it only waits and publishes


class Program:
    """Two SMs that wait for each other, and do nothing else. It owns the memory that a launch uses."""

    def __init__(self, wait: int = 1) -> None:
        self.instructions = np.zeros((4, 32), np.int32)
        for sm in range(2):
            for operation in range(2):
                row = self.instructions[2 * sm + operation]
                row[:3] = NORM, operation, operation + 1
                row[3:6] = 1 - sm, 1, operation and wait
        self.starts = np.array([0, 2, 4], np.int32)
        self.arena = np.zeros(1024, np.float32)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        memory = {name: getattr(self, name).ctypes.data for name in ("instructions", "starts", "arena")}
        return dict.fromkeys(POINTERS, 0) | dict.fromkeys(OFFSETS, 0) | SIZES | memory | changes


def test_a_launch_runs_to_its_end() -> None:
    program = Program()
    for seed in range(4):
        run = _emulator.run(program.arguments(), seed)
        run.result()
        assert run.finished
        assert run.wait(0, 0) == 3
        assert run.wait(3, 1000) == 3  # at once: nothing more can come


def test_a_wait_that_nothing_ends() -> None:
    """The kernel gives up and says where; the handle says so as often as it is asked."""
    program = Program(wait=7)
    run = _emulator.run(program.arguments(spin_limit=100), 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"operation 1 on SM [01] of frame 0 waited for too long"):
            run.result()


def test_cancel_ends_after_a_frame() -> None:
    program = Program()
    run = _emulator.run(program.arguments(frames=1_000_000), 1)
    assert run.wait(0, 10_000) > 0
    run.cancel()
    run.result()
    done = run.wait(0, 0)
    assert 0 < done < 1_000_000


def threads_of_this_process() -> int:
    """Also those that Python does not know of."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_a_launch_that_nobody_holds_ends() -> None:
    """Its thread is gone when the handle is."""
    program = Program()
    threads = threads_of_this_process()
    run = _emulator.run(program.arguments(frames=1_000_000), 2)
    assert not run.finished
    assert run.wait(1_000_000, 1) < 1_000_000
    assert threads_of_this_process() == threads + 1
    begin = time.monotonic()
    del run
    gc.collect()
    assert time.monotonic() - begin < 10
    assert threads_of_this_process() <= threads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sms": 0}, "sms must be from 1 to 1024, not 0"),
        ({"sms": 1025}, "sms must be from 1 to 1024, not 1025"),
        ({"rows": 65}, "rows must be from 1 to 64, not 65"),
        ({"dim": 0}, "dim must be from 1"),
        ({"format": 3}, "format must be from 0 to 2"),
        ({"first_operation": 2, "last_operation": 1}, "first_operation must be from 0 to 1, not 2"),
        ({"last_operation": 3}, "last_operation must be from 0 to 2"),
        ({"stages": 33}, "stages must be from 2 to"),
        ({"staged_bytes": 232448}, "staged_bytes leaves no room"),
        ({"arena": 0}, "must not be null"),
        ({"sms": 2**31}, "arguments: sms cannot be 2147483648"),
        ({"keys": "here"}, "arguments: keys cannot be 'here'"),
        ({"top_p": None}, "arguments: top_p cannot be None"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _emulator.run(Program().arguments(**changes), 1)


def test_names_of_arguments() -> None:
    arguments = Program().arguments()
    with pytest.raises(KeyError, match="arguments: unknown progress"):
        _emulator.run(arguments | {"progress": 0}, 1)
    for name in ("sms", "arena", "top_p"):
        with pytest.raises(KeyError, match=f"arguments lacks {name}"):
            _emulator.run({key: value for key, value in arguments.items() if key != name}, 1)
