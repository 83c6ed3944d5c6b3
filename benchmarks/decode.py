"""Milliseconds a frame of every decoder on this machine, in one interleaved run, with the read bandwidth beside them.

    python benchmarks/decode.py                  1.6B, batch 1 and 8: naive and compiled bf16, ours in bf16 and int8
    python benchmarks/decode.py --preset siren-3.1b --arms siren-bf16,siren-int8 --batch 1
    python benchmarks/decode.py --arms siren-bf16 --batch 1 --frames 50 --rounds 29 --windows 250,500,1000

A correctness gate comes first (arms.check); nothing is timed when it is red. Then, for each batch size, rounds: the
read bandwidth, and `--frames` frames of every arm, one arm after another, so that the machine's noise hits all alike.
The first round warms up and is dropped. The table says for each arm the median frame, the 10th to 90th percentile, how
many times real time that is (a frame is 20 ms of sound; B clips at once), the ratio to naive bf16, the bytes that must
be moved, and the share of the bandwidth that this is: bytes / (time x bandwidth measured in the same run).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import arms as decoders
import machine
import numpy as np
import torch
import typer
from tqdm import tqdm

from siren import SirenConfig
from siren.engine import extension
from siren.errors import InputError, SamplingError
from siren.sampling import SamplingSettings

FRAME_MS = 20.0
READ_BYTES = 1 << 30
FRAMES, ROUNDS, TOKENS = 5, 8, 20


def quick_config() -> tuple[str, SirenConfig]:
    """The 1.6B model where it fits twice (naive and ours), else a quarter of its width."""
    config = SirenConfig.preset("siren-1.6b")
    needed = sum(decoders.weight_bytes(config, name) for name in ("naive-bf16", "siren-bf16", "siren-int8"))
    if machine.available_bytes() > 1.2 * needed:
        return "siren-1.6b", config
    return "siren-1.6b at a quarter of its width", dataclasses.replace(config, dim=256, n_heads=4, n_kv_heads=4)


def check_memory(config: SirenConfig, names: list[str], batches: list[int]) -> None:
    held = {name.replace("compile", "naive") for name in names}
    needed = sum(decoders.weight_bytes(config, name) for name in held) + READ_BYTES
    cache = decoders.moved_bytes(config, "fp32", max(batches), 256, 20)["self-attention cache"]
    needed += int(cache) * len(names)
    free = machine.available_bytes()
    if free and needed > free:
        raise InputError(
            f"these arms need about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: name fewer with "
            "--arms, or a smaller --batch or --preset"
        )


def measure(
    config: SirenConfig,
    built: dict[str, Any],
    names: list[str],
    batch: int,
    frames: int,
    rounds: int,
    tokens: int,
    threads: int,
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every frame of every arm, in order, and the bandwidths read between them in bytes a second."""
    prompt, mask = decoders.random_prompts(config, batch, tokens)
    seeds = np.arange(batch, dtype=np.uint64)
    states = {name: built[name].start(prompt, mask, seeds, SamplingSettings()) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    bandwidths = []
    probe = extension().ReadTest(READ_BYTES, threads)
    with tqdm(total=(rounds + 1) * len(names) * frames, desc=f"batch {batch}", unit="frame", disable=None) as bar:
        for turn in range(rounds + 1):
            for name in names:
                start = time.perf_counter()
                probe.run()
                bandwidths.append(probe.bytes / (time.perf_counter() - start))
                for _ in range(frames):
                    start = time.perf_counter()
                    states[name].step(1, None)
                    seconds = time.perf_counter() - start
                    if turn:
                        times[name].append(seconds)
                    bar.update()
    for name, state in states.items():
        codes = state.codes
        if not 0 <= int(codes.min()) <= int(codes.max()) < config.codebook_size:
            raise SamplingError(f"{name} sampled a code outside the codebook: no figure is given")
        if not bool(torch.isfinite(state.logprobs).all()):
            raise SamplingError(f"{name} gave a log-probability that is not finite: no figure is given")
    return times, bandwidths


def summarise(
    config: SirenConfig,
    name: str,
    batch: int,
    seconds: list[float],
    first: int,
    tokens: int,
    bandwidth: float,
    naive: float | None,
) -> dict[str, Any]:
    """One row: `seconds` are those of the frames from number `first` on."""
    ms = [1e3 * value for value in seconds]
    median = statistics.median(ms)
    weights = name.split("-")[1]
    moved = decoders.moved_bytes(config, weights, batch, first + len(ms) / 2, tokens)
    low, high = np.percentile(ms, [10, 90])
    return {
        "arm": name,
        "batch": batch,
        "frames": [first, first + len(ms)],
        "ms": median,
        "ms_p10": float(low),
        "ms_p90": float(high),
        "times_real_time": batch * FRAME_MS / median,
        "ratio_to_naive_bf16": naive / median if naive else None,
        "gb_moved": sum(moved.values()) / 1e9,
        "gb_moved_parts": {part: value / 1e9 for part, value in moved.items()},
        "share_of_bandwidth": sum(moved.values()) / (median / 1e3 * bandwidth),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = [
        "decoder",
        "batch",
        "frames",
        "ms a frame",
        "10% to 90%",
        "x real time",
        "x naive bf16",
        "GB a frame",
        "of bandwidth",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        ratio = row["ratio_to_naive_bf16"]
        cells = [
            row["arm"],
            str(row["batch"]),
            f"{row['frames'][0]} to {row['frames'][1]}",
            f"{row['ms']:.1f}",
            f"{row['ms_p10']:.1f} to {row['ms_p90']:.1f}",
            f"{row['times_real_time']:.2f}",
            f"{ratio:.2f}" if ratio else "",
            f"{row['gb_moved']:.2f}",
            f"{row['share_of_bandwidth']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_picture(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar a row, its share of the bandwidth written on it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'siren[pictures]')", file=sys.stderr)
        return
    colours = {"naive": "#b0b7c0", "compile": "#7d8894", "siren": "#1f77b4"}
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['arm']}, batch {row['batch']}, frame {row['frames'][1]}" for row in rows]
    values = [row["ms"] for row in rows]
    bars = axes.barh(range(len(rows)), values, color=[colours[row["arm"].split("-")[0]] for row in rows])
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    notes = [f"{row['ms']:.0f} ms, {row['share_of_bandwidth']:.0%} of bandwidth" for row in rows]
    axes.bar_label(bars, notes, padding=4, fontsize=8)
    axes.set_xlim(0, 1.45 * max(values))
    axes.set_xlabel("ms a frame (20 ms is real time for one clip)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def numbers(text: str, name: str, low: int, high: int) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= value <= high for value in values):
        raise InputError(f"{name} must be whole numbers from {low} to {high} with commas between, not {text!r}")
    return values


def fit(config: SirenConfig, frames: int | None, rounds: int | None, tokens: int | None) -> tuple[int, int, int]:
    """Frames a round, rounds and prompt tokens: what is None becomes its default, or the most that the model takes.

    Raises InputError for a value that was given and does not fit.
    """
    limit, prompt_limit = config.max_seq_len, config.max_prompt_len
    given = {"--frames": (frames, limit), "--rounds": (rounds, limit), "--tokens": (tokens, prompt_limit)}
    for name, (value, most) in given.items():
        if value is not None:
            numbers(str(value), name, 1, most)
    if rounds is None:
        rounds = max(1, min(ROUNDS, limit // (frames or 1) - 1))
    if frames is None:
        frames = max(1, min(FRAMES, limit // (rounds + 1)))
    if (rounds + 1) * frames > limit:
        raise InputError(f"{rounds} + 1 rounds of {frames} frames exceed the model's {limit} frames")
    return frames, rounds, tokens or min(TOKENS, prompt_limit)


def run(
    preset: Annotated[str, typer.Option(help="siren-1.6b, siren-3.1b or tiny")] = "siren-1.6b",
    arms: Annotated[
        str, typer.Option(help="any of " + ", ".join(decoders.ARMS))
    ] = "naive-bf16,compile-bf16,siren-bf16,siren-int8",
    batch: Annotated[str, typer.Option(help="batch sizes, with commas between")] = "1,8",
    frames: Annotated[int | None, typer.Option(help="frames of each arm in a round; 5, or what fits")] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds that count; 8, or what fits")] = None,
    tokens: Annotated[int | None, typer.Option(help="prompt tokens; 20, or what fits")] = None,
    threads: Annotated[int, typer.Option(help="threads of the engine and of PyTorch; 0: all cores")] = 0,
    windows: Annotated[str, typer.Option(help="frame numbers at which to cut the clip into rows of their own")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="two minutes: naive bf16, bf16 and int8 at batch 1")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file to write")] = None,
) -> None:
    """Compare decoders on this machine."""
    config = SirenConfig.preset(preset)
    names = arms.split(",")
    if quick:
        preset, config = quick_config()
        names, batch, frames, rounds = ["naive-bf16", "siren-bf16", "siren-int8"], "1", 4, 4
    unknown = sorted(set(names) - set(decoders.ARMS))
    if unknown or len(set(names)) != len(names):
        raise InputError(f"--arms must be different ones of {', '.join(decoders.ARMS)}, not {arms!r}")
    batches = numbers(batch, "--batch", 1, 64)
    frames, rounds, tokens = fit(config, frames, rounds, tokens)
    edges = numbers(windows, "--windows", 1, config.max_seq_len) if windows else []
    threads = machine.thread_count(threads)
    torch.set_num_threads(threads)
    check_memory(config, names, batches)

    about = {**machine.describe(), "preset": preset, "threads": threads, "prompt_tokens": tokens}
    about["command"] = " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]])
    print(f"{about['cpu']}, {threads} threads, {about['instructions']}, torch {about['torch']}; {preset}")
    print(f"{rounds} rounds of {frames} frames after one that warms up, {tokens} prompt tokens")
    print("gate, at these widths with one block of each kind:")
    for line in decoders.check(config, threads, names):
        print("  " + line)

    built: dict[str, Any] = {}
    for name in names:
        before, start = machine.private_bytes(), time.perf_counter()
        built[name] = decoders.build(name, config, threads, built)
        print(
            f"{name}: built in {time.perf_counter() - start:.1f} s, {(machine.private_bytes() - before) / 1e9:.2f} GB",
            flush=True,
        )

    rows, bandwidth_of = [], {}
    for size in batches:
        times, bandwidths = measure(config, built, names, size, frames, rounds, tokens, threads)
        bandwidth = statistics.median(bandwidths)
        bandwidth_of[str(size)] = {"median": bandwidth / 1e9, "all": [value / 1e9 for value in bandwidths]}
        lowest, highest = min(bandwidths) / 1e9, max(bandwidths) / 1e9
        print(f"batch {size}: read bandwidth {bandwidth / 1e9:.1f} GB/s ({lowest:.1f} to {highest:.1f})")
        naive = 1e3 * statistics.median(times["naive-bf16"]) if "naive-bf16" in times else None
        for name in names:
            cuts = [frames, *(edge for edge in edges if edge > frames), frames + len(times[name])]
            for begin, end in itertools.pairwise(cuts):
                if part := times[name][begin - frames : end - frames]:
                    rows.append(summarise(config, name, size, part, begin, tokens, bandwidth, naive))
    print("\n" + table(rows))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"about": about, "read_gb_per_s": bandwidth_of, "rows": rows}, indent=1) + "\n")
        print(f"\nwrote {out}")
    if picture:
        draw_picture(rows, f"{preset} on {about['cpu']}, {threads} threads", picture)
        print(f"wrote {picture}")


if __name__ == "__main__":
    machine.main(run)
