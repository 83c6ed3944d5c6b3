"""How much memory a sampler takes that is built straight from a checkpoint folder, as a multiple of its weights.

    python benchmarks/memory.py                                     1.6B in bf16, written to a temporary folder first
    python benchmarks/memory.py --folder out/1.6b --weights int8    keep the checkpoint, and use it again next time
    python benchmarks/memory.py --preset siren-3.1b --blocks 4      fewer blocks, for a machine with less disk or memory

For each weight type a fresh process imports everything, notes its memory, builds `siren.Sampler.from_pretrained(folder,
backend="cpu")`, samples frames for one prompt, and says how far its memory rose meanwhile. Private memory is what no
file backs (RssAnon, read a thousand times a second); the peak of everything resident (VmHWM) has the mapped file and
the libraries in it too. The target: private memory rises by at most 1.15 times the weights. Exit code 1 if it does not.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import arms
import machine
import numpy as np
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from siren import Sampler, SirenConfig
from siren.checkpoint import expected_shapes, read_manifest, save_checkpoint
from siren.errors import BackendError, CheckpointError, InputError, SamplingError

WEIGHTS = ("fp32", "bf16", "int8")


class PeakMemory:
    """The most private memory that this process holds between entry and exit, by a thread that keeps looking."""

    def __enter__(self) -> PeakMemory:
        self.bytes = machine.private_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, machine.private_bytes())


def measure(folder: Path, weights: str, frames: int, tokens: int, threads: int) -> dict[str, Any]:
    """Load and sample in this process, which is a fresh one. Bytes and seconds."""
    torch.set_num_threads(threads)
    before = machine.private_bytes()
    start = time.perf_counter()
    with PeakMemory() as loading:
        sampler = Sampler.from_pretrained(folder, backend="cpu", weights=weights, threads=threads)
    seconds = time.perf_counter() - start
    loaded = machine.private_bytes()
    prompt, mask = arms.random_prompts(sampler.config, 1, tokens)
    with PeakMemory() as sampling:
        codes = sampler.sample(prompt, mask, frames=frames).codes
    if codes.shape[-1] != frames:
        raise SamplingError(f"{codes.shape[-1]} frames came for {frames} that were asked for")
    about = sampler.describe()
    peak = max(loading.bytes, sampling.bytes)
    return {
        "weights": weights,
        "instructions": about["instructions"],
        "frames": frames,
        "weight_bytes": about["weight_bytes"],
        "private_before": before,
        "private_loading_peak": loading.bytes,
        "private_loaded": loaded,
        "private_sampling_peak": sampling.bytes,
        "resident_peak": machine.peak_bytes(),
        "growth": (peak - before) / about["weight_bytes"],
        "load_seconds": seconds,
    }


def in_fresh_process(*arguments: Any) -> dict[str, Any]:
    """measure() where nothing has been done yet but importing."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise BackendError("the measuring process was killed, most likely because memory ran out") from error


def bf16_experts(config: SirenConfig) -> Iterator[tuple[int, dict[str, Tensor]]]:
    experts = tqdm(arms.random_experts(config, 0), total=config.num_experts, unit="expert", disable=None, leave=False)
    for start, tensors in experts:
        yield start, {name: tensor.bfloat16() for name, tensor in tensors}


def make_checkpoint(folder: Path, config: SirenConfig) -> int:
    """Write random bf16 weights, unless a checkpoint of this very config is there already. Bytes of its files."""
    if folder.exists() and any(folder.iterdir()):
        if read_manifest(folder).config != config:
            raise CheckpointError(f"{folder} holds a model of another size: name another --folder, or delete it")
        print(f"using {folder}")
    else:
        needed = 2 * config.num_experts * sum(int(np.prod(shape)) for shape in expected_shapes(config).values())
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < 1.01 * needed:
            raise InputError(
                f"the checkpoint needs {needed / 1e9:.2f} GB and {folder.parent} has {free / 1e9:.2f} GB left: name a "
                "--folder on another disk, or use a smaller --preset or --blocks"
            )
        start = time.perf_counter()
        save_checkpoint(folder, config, bf16_experts(config))
        print(f"wrote {folder} in {time.perf_counter() - start:.1f} s")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, in megabytes."""
    heads = ["weights", "weights MB", "before", "peak loading", "loaded", "peak sampling", "peak resident", "growth"]
    lines = [f"| {' | '.join(heads)} | load s |", "| --- |" + " ---: |" * len(heads)]
    names = ("weight_bytes", "private_before", "private_loading_peak", "private_loaded", "private_sampling_peak")
    for row in rows:
        sizes = " | ".join(f"{row[name] / 1e6:.0f}" for name in (*names, "resident_peak"))
        lines.append(f"| {row['weights']} | {sizes} | {row['growth']:.3f} x | {row['load_seconds']:.1f} |")
    return "\n".join(lines)


def run(
    preset: Annotated[str, typer.Option(help="siren-1.6b, siren-3.1b or tiny")] = "siren-1.6b",
    blocks: Annotated[int, typer.Option(min=0, help="at most this many blocks of each kind; 0: the preset's")] = 0,
    weights: Annotated[str, typer.Option(help="weight types, with commas between")] = "bf16,int8",
    frames: Annotated[int, typer.Option(min=1, help="frames to sample")] = 100,
    tokens: Annotated[int, typer.Option(min=1, help="prompt tokens")] = 20,
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
    limit: Annotated[float, typer.Option(help="growth that is allowed, as a multiple of the weights")] = 1.15,
    folder: Annotated[Path | None, typer.Option(help="keep the checkpoint here, and use it if it is there")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Measure the memory of a sampler built from a checkpoint folder."""
    config = SirenConfig.preset(preset)
    if blocks:
        backbone, decoder = min(blocks, config.spatial_layers), min(blocks, config.factorized_layers)
        config = dataclasses.replace(config, spatial_layers=backbone, factorized_layers=decoder)
    kinds = weights.split(",")
    if not set(kinds) <= set(WEIGHTS):
        raise InputError(f"--weights must be any of {', '.join(WEIGHTS)} with commas between, not {weights!r}")
    if frames > config.max_seq_len or tokens > config.max_prompt_len:
        raise InputError(
            f"{preset} takes at most {config.max_seq_len} frames and {config.max_prompt_len} prompt tokens"
        )
    needed = max(arms.weight_bytes(config, f"siren-{kind}") for kind in kinds)
    free = machine.available_bytes()
    if free and needed > free:
        raise InputError(f"this needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: use fewer --blocks")
    threads = machine.thread_count(threads)
    about = {**machine.describe(), "preset": preset, "blocks": [config.spatial_layers, config.factorized_layers]}
    with tempfile.TemporaryDirectory(prefix="siren-memory-") as temporary:
        target = folder if folder is not None else Path(temporary) / "checkpoint"
        about["checkpoint_bytes"] = make_checkpoint(target, config)
        model = f"{preset}, {config.spatial_layers} + {config.factorized_layers} blocks"
        written = f"{about['checkpoint_bytes'] / 1e9:.2f} GB in files"
        print(f"{model}, {written}; {about['cpu']}, {threads} threads, {frames} frames", flush=True)
        rows = []
        for kind in kinds:
            rows.append(in_fresh_process(target, kind, frames, tokens, threads))
    print("\n" + table(rows))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        print(f"\nwrote {out}")
    over = [row for row in rows if not row["growth"] <= limit]
    for row in over:
        print(
            f"{row['weights']}: memory rose by {row['growth']:.3f} times the weights, over {limit:g}", file=sys.stderr
        )
    if over:
        raise SystemExit(1)


if __name__ == "__main__":
    machine.main(run)
