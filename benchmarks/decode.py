"""Milliseconds a frame of every decoder on this machine, in one interleaved run, with the read bandwidth beside them.

    python benchmarks/decode.py                  1.6B, batch 1 and 8: naive and compiled bf16, ours in bf16 and int8
    python benchmarks/decode.py --preset siren-3.1b --arms siren-bf16,siren-int8 --batch 1
    python benchmarks/decode.py --arms siren-bf16 --batch 1 --frames 50 --rounds 29 --windows 250,500,1000
    python benchmarks/decode.py --device cuda    the decoders of gpu_arms.py on a GPU, timed by gpu_decode.py

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
import gpu_arms
import gpu_decode
import machine
import numpy as np
import torch
import typer
from decode_report import draw_picture, summarise, table
from tqdm import tqdm

from siren import SirenConfig
from siren.engine import extension
from siren.errors import InputError, SamplingError
from siren.sampling import SamplingSettings

READ_BYTES = 1 << 30
FRAMES, ROUNDS, TOKENS = 5, 8, 20
DEFAULT = "naive-bf16,compile-bf16,siren-bf16,siren-int8"


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


def numbers(text: str, name: str, low: int, high: int) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(low <= value <= high for value in values):
        raise InputError(f"{name} must be whole numbers from {low} to {high} with commas between, not {text!r}")
    return values


def fit(
    config: SirenConfig,
    frames: int | None,
    rounds: int | None,
    tokens: int | None,
    usual_frames: int = FRAMES,
    usual_rounds: int = ROUNDS,
) -> tuple[int, int, int]:
    """Frames a round, rounds and prompt tokens: what is None becomes its default, or the most that the model takes.

    Raises InputError for a value that was given and does not fit.
    """
    limit, prompt_limit = config.max_seq_len, config.max_prompt_len
    given = {"--frames": (frames, limit), "--rounds": (rounds, limit), "--tokens": (tokens, prompt_limit)}
    for name, (value, most) in given.items():
        if value is not None:
            numbers(str(value), name, 1, most)
    if rounds is None:
        rounds = max(1, min(usual_rounds, limit // (frames or 1) - 1))
    if frames is None:
        frames = max(1, min(usual_frames, limit // (rounds + 1)))
    if (rounds + 1) * frames > limit:
        raise InputError(f"{rounds} + 1 rounds of {frames} frames exceed the model's {limit} frames")
    return frames, rounds, tokens or min(TOKENS, prompt_limit)


def run(
    preset: Annotated[str, typer.Option(help="siren-1.6b, siren-3.1b or tiny")] = "siren-1.6b",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    arms: Annotated[
        str,
        typer.Option(help=f"of {', '.join(decoders.ARMS)}; with --device cuda of {', '.join(gpu_arms.ARMS)}"),
    ] = "",
    batch: Annotated[str, typer.Option(help="batch sizes, with commas between")] = "1,8",
    frames: Annotated[
        int | None, typer.Option(help="frames of each arm in a round; 5 (cuda: 50), or what fits")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="rounds that count; 8 (cuda: 5), or what fits")] = None,
    tokens: Annotated[int | None, typer.Option(help="prompt tokens; 20, or what fits")] = None,
    threads: Annotated[int, typer.Option(help="threads of the engine and of PyTorch; 0: all cores")] = 0,
    windows: Annotated[str, typer.Option(help="frame numbers at which to cut the clip into rows of their own")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="two minutes: naive bf16, bf16 and int8 at batch 1")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file to write")] = None,
) -> None:
    """Compare decoders on this machine."""
    config = SirenConfig.preset(preset)
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, not {device!r}")
    known, chosen = (gpu_arms.ARMS, gpu_arms.DEFAULT) if device == "cuda" else (decoders.ARMS, DEFAULT)
    names = (arms or chosen).split(",")
    if quick:
        preset, config = quick_config()
        names, batch, frames, rounds = ["naive-bf16", "siren-bf16", "siren-int8"], "1", 4, 4
    if not set(names) <= set(known) or len(set(names)) != len(names):
        raise InputError(f"--arms must be different ones of {', '.join(known)}, not {arms!r}")
    batches = numbers(batch, "--batch", 1, 64)
    command = " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]])
    if device == "cuda":
        if quick or windows or threads:
            raise InputError("--quick, --windows and --threads are for --device cpu")
        if not torch.cuda.is_available():
            raise InputError(f"torch {torch.__version__} sees no CUDA device")
        frames, rounds, tokens = fit(config, frames, rounds, tokens, gpu_decode.FRAMES, gpu_decode.ROUNDS)
        about: dict[str, Any] = {"preset": preset, "prompt_tokens": tokens, "command": command}
        gpu_decode.compare(config, device, about, names, batches, frames, rounds, tokens, out, picture)
        return
    frames, rounds, tokens = fit(config, frames, rounds, tokens)
    edges = numbers(windows, "--windows", 1, config.max_seq_len) if windows else []
    threads = machine.thread_count(threads)
    torch.set_num_threads(threads)
    check_memory(config, names, batches)

    about = {**machine.describe(), "preset": preset, "threads": threads, "prompt_tokens": tokens}
    about["command"] = command
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
