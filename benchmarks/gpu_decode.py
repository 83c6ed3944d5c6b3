"""What `benchmarks/decode.py --device cuda` does: the arms of gpu_arms.py, interleaved with device-to-device copies.

A time is that of `--frames` frames between two events, divided by their number: what the host does between frames is
in it. The naive arms, which take many times as long, get a fifth of the frames. An arm that fails its gate is not
timed; the others are, and the exit code is 2.

Beside that, for arms that have it, one frame's work after the backbones alone, `residual()`, as a project with
backbones of its own calls it: the host's time of a call, in which tensors go to the GPU and come back.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_arms
import json_file
import machine
import numpy as np
import torch
from arms import moved_bytes, random_prompts
from decode_report import draw_picture, residual_table, summarise, table
from gpu_timing import CopyProbe, elapsed

from siren import SirenConfig
from siren.errors import SamplingError
from siren.sampling import SamplingSettings

FRAMES, ROUNDS = 50, 5
RESIDUAL_ARMS = ("naive", "triton", "persistent", "cuda")
RESIDUAL_CALLS = 40


def gated(
    config: SirenConfig, names: list[str], device: str, residual: list[str]
) -> tuple[list[str], list[str], dict[str, str]]:
    """The arms whose gate is green, those of `residual` whose residual() is, and what is wrong with the others."""
    gate, red = gpu_arms.Gate(config, device), {}
    green: dict[bool, list[str]] = {False: [], True: []}
    for name, alone in [(name, False) for name in names] + [(name, True) for name in residual]:
        label = f"residual() of {name}" if alone else name
        try:
            line = gate.check(name, residual=True) if alone else gate.check(name)
            print(f"  {'residual() of ' if alone else ''}{line}", flush=True)
            green[alone].append(name)
        except Exception as error:
            red[label] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            print(f"  RED, not timed: {label}: {red[label]}", flush=True)
    return green[False], green[True], red


def frames_of(name: str, frames: int) -> int:
    """Frames of a round of this arm."""
    return max(1, frames // 5) if name.startswith("naive") else frames


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

    def stepped(name: str) -> Callable[[], object]:
        return lambda: states[name].step(frames_of(name, frames), None)

    for turn in range(rounds + 1):
        for name in names:
            bandwidths.append(probe.run())
            seconds = elapsed(stepped(name))
            if turn:
                times[name].append(seconds / frames_of(name, frames))
    for name, state in states.items():
        codes = state.codes
        if not 0 <= int(codes.min()) <= int(codes.max()) < config.codebook_size:
            raise SamplingError(f"{name} sampled a code outside the codebook: no figure is given")
        if not bool(torch.isfinite(state.logprobs).all()):
            raise SamplingError(f"{name} gave a log-probability that is not finite: no figure is given")
    return times, bandwidths


def measure_residual(
    config: SirenConfig, built: dict[str, Any], names: list[str], device: str, batch: int, bandwidth: float
) -> list[dict[str, Any]]:
    """A row for each arm: microseconds of a call of residual(), the arms one after another."""
    h, start = gpu_arms.residual_inputs(config, batch)
    seeds, settings = np.arange(batch, dtype=np.uint64), SamplingSettings()
    decoders = {name: gpu_arms.build_residual(name, config, device, built) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-3, RESIDUAL_CALLS):  # the first ones warm up
        frame = np.full(batch, turn + 3, dtype=np.int64)
        for name, decoder in decoders.items():
            begin = time.perf_counter()
            decoder.residual(h, start, seeds, frame, settings)  # returns when the codes are on the CPU
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    rows = []
    for name, seconds in times.items():
        low, median, high = (float(value) for value in np.percentile(seconds, [10, 50, 90]))
        parts = moved_bytes(config, name.split("-")[1], batch, 0, 0)
        moved = parts["residual decoders"] + parts["heads"]
        row: dict[str, Any] = {"arm": name, "batch": batch, "us": 1e6 * median}
        row |= {"us_p10": 1e6 * low, "us_p90": 1e6 * high}
        rows.append({**row, "gb_moved": moved / 1e9, "share_of_bandwidth": moved / (median * bandwidth)})
    return rows


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
    names, alone, red = gated(config, names, device, [name for name in names if name.split("-")[0] in RESIDUAL_ARMS])
    length = -(-(rounds + 1) * frames // 64) * 64  # whole tiles, for the attention kernels that mask
    built: dict[str, Any] = {}
    for name in names:
        if name not in built:
            built[name] = gpu_arms.build(name, config, device, length, built)
    result: dict[str, Any] = {"about": about, "copy_gb_per_s": {}, "rows": [], "residual": [], "red": red}
    for size in batches if names else []:
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()  # shapes are constants: other batches' would count against torch.compile's limit
        times, bandwidths = measure(config, built, names, size, frames, rounds, tokens)
        bandwidth = statistics.median(bandwidths)
        result["copy_gb_per_s"][str(size)] = {"median": bandwidth / 1e9, "all": [rate / 1e9 for rate in bandwidths]}
        naive = 1e3 * statistics.median(times["naive-bf16"]) if "naive-bf16" in times else None
        for name in names:
            each = frames_of(name, frames)
            row = summarise(config, name, size, times[name], each, tokens, bandwidth, naive, each)
            result["rows"].append(row)
        print(f"batch {size}: copy bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
        about["clocks_after"] = machine.gpu_clocks()
        json_file.write(out, result)
        result["residual"] += measure_residual(config, built, alone, device, size, bandwidth)
        json_file.write(out, result)
    json_file.write(out, result)
    print(f"\n{table(result['rows'])}\n\n{residual_table(result['residual'])}")
    if picture and result["rows"]:
        draw_picture(result["rows"], f"{about['preset']} on {about['gpu']}", picture)
    if red:
        raise SamplingError(f"the gate is red for {', '.join(red)}: not timed")
