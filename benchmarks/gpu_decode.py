"""What `benchmarks/decode.py --device cuda` does: the arms of gpu_arms.py, interleaved with device-to-device copies.

A time is that of `--frames` frames between two events, divided by their number: what the host does between frames is
in it. An arm that fails its gate is not timed; the others are, and the exit code is 2.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_arms
import json_file
import machine
import numpy as np
import torch
from arms import random_prompts
from decode_report import draw_picture, summarise, table
from gpu_timing import CopyProbe, elapsed

from siren import SirenConfig
from siren.errors import SamplingError
from siren.sampling import SamplingSettings

FRAMES, ROUNDS = 50, 5


def gated(config: SirenConfig, names: list[str], device: str) -> tuple[list[str], dict[str, str]]:
    """The arms whose gate is green, and what is wrong with the others."""
    gate, green, red = gpu_arms.Gate(config, device), [], {}
    for name in names:
        try:
            print(f"  {gate.check(name)}", flush=True)
            green.append(name)
        except Exception as error:
            red[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            print(f"  RED, not timed: {name}: {red[name]}", flush=True)
    return green, red


def measure(
    config: SirenConfig, built: dict[str, Any], names: list[str], batch: int, frames: int, rounds: int, tokens: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds a frame of every round of every arm, and the copy bandwidths between them in bytes a second."""
    prompt, mask = random_prompts(config, batch, tokens)
    seeds = np.arange(batch, dtype=np.uint64)
    states = {name: built[name].start(prompt, mask, seeds, SamplingSettings()) for name in names}
    for state in states.values():
        if hasattr(state, "_reserve"):  # a cache that grows is copied and its graph captured anew: not in a timed round
            state._reserve((rounds + 1) * frames)
    times: dict[str, list[float]] = {name: [] for name in names}
    probe, bandwidths = CopyProbe(), []

    def frames_of(state: Any) -> Callable[[], object]:
        return lambda: state.step(frames, None)

    for turn in range(rounds + 1):
        for name, state in states.items():
            bandwidths.append(probe.run())
            seconds = elapsed(frames_of(state))
            if turn:
                times[name].append(seconds / frames)
    for name, state in states.items():
        codes = state.codes
        if not 0 <= int(codes.min()) <= int(codes.max()) < config.codebook_size:
            raise SamplingError(f"{name} sampled a code outside the codebook: no figure is given")
        if not bool(torch.isfinite(state.logprobs).all()):
            raise SamplingError(f"{name} gave a log-probability that is not finite: no figure is given")
    return times, bandwidths


def compare(
    config: SirenConfig,
    device: str,
    about: dict[str, Any],
    names: list[str],
    batches: list[int],
    frames: int,
    rounds: int,
    tokens: int,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Gate, time, print and write. Raises SamplingError at the end if a gate was red."""
    about |= machine.describe_gpu()
    print(f"{about['gpu']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}")
    print(f"{rounds} rounds of {frames} frames after one that warms up, {tokens} prompt tokens")
    print("gate, at these widths with one block of each kind:")
    names, red = gated(config, names, device)
    length = -(-(rounds + 1) * frames // 64) * 64  # whole tiles, for the attention kernels that mask
    built: dict[str, Any] = {}
    for name in names:
        if name not in built:
            built[name] = gpu_arms.build(name, config, device, length, built)
    result: dict[str, Any] = {"about": about, "copy_gb_per_s": {}, "rows": [], "red": red}
    for size in batches if names else []:
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()  # shapes are constants: other batches' would count against torch.compile's limit
        times, bandwidths = measure(config, built, names, size, frames, rounds, tokens)
        bandwidth = statistics.median(bandwidths)
        result["copy_gb_per_s"][str(size)] = {"median": bandwidth / 1e9, "all": [rate / 1e9 for rate in bandwidths]}
        naive = 1e3 * statistics.median(times["naive-bf16"]) if "naive-bf16" in times else None
        for name in names:
            row = summarise(config, name, size, times[name], frames, tokens, bandwidth, naive, frames)
            result["rows"].append(row)
        print(f"batch {size}: copy bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
        about["clocks_after"] = machine.gpu_clocks()
        json_file.write(out, result)
    json_file.write(out, result)
    print("\n" + table(result["rows"]))
    if picture and result["rows"]:
        draw_picture(result["rows"], f"{about['preset']} on {about['gpu']}", picture)
    if red:
        raise SamplingError(f"the gate is red for {', '.join(red)}: not timed")
