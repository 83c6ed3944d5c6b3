"""Frames a second and memory of training one expert: this package's step against the official one (naive_train.py).

    python benchmarks/train.py                       1.6B at a quarter of its width, on the CPU
    python benchmarks/train.py --device cuda         1.6B as it is, bfloat16, 24 crops of 6 s
    python benchmarks/train.py --arms naive,compile,siren --precision bf16 --lengths 6

A step is all of it: forward, backward, clipping and AdamW, with the preset's dropout, on codes that are on the device
already. What counts is a valid frame, one that carries a loss (20 ms of sound, 12 codes). Batches hold crops of at most
6 s with the padding that clips of different lengths bring: "2-6" are clips of 2 to 6 s, uniformly, "6" has no padding.

A gate comes first, without dropout: losses and all gradients of the siren arms against float64; nothing is timed where
an error is more than twice that of the naive arm. The compile arm, the naive one's own code, is not gated. Then rounds,
one step of every arm each, so that the machine's noise hits all alike; the first warms up and is dropped. Memory is
measured in a fresh process for each arm: on a CPU the most private memory over what there was before the model, on a
GPU the most that PyTorch allocated.

On the CPU the width is divided by four (dim, heads, SwiGLU, prompt and codec latent), with the depth, head size,
codebooks, dropout and crops of the real size, and 8 crops a batch for 24: a step then takes seconds. The codebooks'
1024 codes stay, so tables and heads weigh more in it than at the real width, and so does what is not a matrix product.
"""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import json_file
import machine
import torch
import typer
from memory import PeakMemory
from naive_train import NaiveExpert, naive_loss
from torch import Tensor, nn
from tqdm import tqdm
from train_report import draw_picture, summarise, table

from siren import SirenConfig
from siren.errors import InputError, SirenError
from siren.expert import Expert

ARMS = ("naive", "compile", "siren", "siren-plain", "siren-checkpoint")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("forward", "backward", "clip", "update")
EXPERT = 3  # of 0 to 5: in the middle, with half the codebooks before it
SECONDS = 6
FRAMES_A_SECOND = 50
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def narrowed(config: SirenConfig, factor: int) -> SirenConfig:
    """A config of a fraction of the width and as deep."""
    names = ("dim", "n_heads", "n_kv_heads", "prompt_dim", "dac_feature_dim", "ffn_multiple_of")
    if any(getattr(config, name) % factor for name in names):
        raise InputError(f"the widths of this preset cannot be divided by {factor}")
    return dataclasses.replace(config, **{name: getattr(config, name) // factor for name in names})


def random_expert(config: SirenConfig) -> Expert:
    """As a new one, with a codec's embeddings of about unit size."""
    torch.manual_seed(0)
    expert = Expert(config, EXPERT * config.codes_per_expert)
    embeddings = []
    for _ in range(config.num_codebooks):
        codebook = torch.randn(config.codebook_size, config.dac_code_dim)
        weight = torch.randn(config.dac_feature_dim, config.dac_code_dim) * config.dac_code_dim**-0.5
        embeddings.append((codebook, weight, 0.1 * torch.randn(config.dac_feature_dim)))
    expert.set_decode_embeddings(embeddings)
    return expert.train()


def random_batch(config: SirenConfig, size: int, frames: int, shortest: int, seed: int, device: str) -> Batch:
    """Codes, prompts of 16 to 32 tokens (or half of what fits, and more), and masks.

    The first clip has all frames, as one that is cut has.
    """
    generator = torch.Generator().manual_seed(seed)
    most = min(32, config.max_prompt_len)
    codes = torch.randint(config.codebook_size, (size, config.num_codebooks, frames), generator=generator)
    prompt = torch.randn(size, most, config.prompt_dim, generator=generator)
    tokens = torch.randint(most // 2, most + 1, (size, 1), generator=generator)
    lengths = torch.randint(shortest, frames + 1, (size, 1), generator=generator)
    lengths[0], tokens[0] = frames, most
    masks = torch.arange(most) < tokens, torch.arange(frames) < lengths
    return tuple(value.to(device) for value in (codes, prompt, *masks))


class Arm:
    """A model, its optimiser and the step that trains it."""

    def __init__(self, name: str, expert: Expert, precision: str, device: str) -> None:
        self.precision, self.device = precision, device
        self.model: nn.Module
        if name in ("naive", "compile"):
            self.model = NaiveExpert(expert.config, expert.start_codebook)
            self.model.load_state_dict(expert.state_dict())
            called = torch.compile(self.model) if name == "compile" else self.model
            self.loss: Callable[[Batch], Tensor] = functools.partial(naive_loss, called, expert.start_codebook)
        else:
            self.model = copy.deepcopy(expert)
            options = {"checkpoint_activations": name == "siren-checkpoint"}
            self.options = options | {"kernels": device == "cuda" and name != "siren-plain"}
            self.loss = self._siren_loss
        self.model.to(device).train()
        weights = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = {"fused": True} if name.startswith("siren") else {}
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), **fused)

    def _siren_loss(self, batch: Batch) -> Tensor:
        sums = self.model.loss_sums(*batch, **self.options)
        return sums.sum() / (len(sums) * batch[3].sum())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def step(self, batch: Batch, mark: Callable[[], None]) -> float:
        """One update; `mark` is called after each of PARTS. Returns the loss, which waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(batch)
        mark()
        loss.backward()
        mark()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        mark()
        self.optimizer.step()
        mark()
        return loss.item()

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """The loss and all gradients, without an update."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(batch)
        loss.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **found}


def check(config: SirenConfig, names: list[str], precision: str, device: str) -> list[str]:
    """The gate. Lines to print; raises SirenError when it is red.

    The error of a tensor is relative, its limit twice the naive arm's for that tensor, or twice what is typical for the
    naive arm where that was lucky.
    """
    expert = random_expert(dataclasses.replace(config, dropout=0.0))
    batch = random_batch(config, 3, min(40, config.max_seq_len), 10, 1, device)
    exact_expert = copy.deepcopy(expert).double().to(device)
    loss = exact_expert.loss(*batch).mean()
    loss.backward()
    exact = {"loss": loss.detach()}
    exact |= {name: p.grad for name, p in exact_expert.named_parameters() if p.grad is not None}

    def errors(name: str) -> dict[str, float]:
        found = Arm(name, expert, precision, device).gradients(batch)
        if found.keys() != exact.keys():
            raise SirenError(f"the gate is red, nothing is timed: {name} trains other parameters")
        return {
            key: float((found[key].double() - value).norm() / value.norm().clamp_min(1e-30))
            for key, value in exact.items()
        }

    naive = errors("naive")
    typical = (sum(error**2 for error in naive.values()) / len(naive)) ** 0.5
    lines = [f"naive: errors {typical:.1e} (root mean square over {len(naive) - 1} gradients and the loss)"]
    for name in names:
        if name in ("naive", "compile"):
            continue
        own = errors(name)
        ratios = {key: own[key] / max(naive[key], typical) for key in own}
        worst = max(ratios, key=lambda key: ratios[key])
        overall = (sum(error**2 for error in own.values()) / len(own)) ** 0.5
        lines.append(f"{name}: errors {overall:.1e}, at worst {ratios[worst]:.2f} of naive's ({worst}), limit 2")
        if not all(ratio <= 2 for ratio in ratios.values()):  # so that NaN is red
            raise SirenError(f"the gate is red, nothing is timed: {lines[-1]}")
    return lines


class Clock:
    """Times between marks: by events on a GPU, else of the wall clock, or of the processors if `process`."""

    def __init__(self, device: str, process: bool) -> None:
        self.cuda = device == "cuda"
        self.now = time.process_time if process else time.perf_counter
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(self.now())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        if self.cuda:
            self.marks[-1].synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def measure(arms: dict[str, Arm], batches: list[Batch], rounds: int, process: bool) -> dict[str, list[list[float]]]:
    """Seconds of each part of every step of every arm; round i trains on batch i."""
    times: dict[str, list[list[float]]] = {name: [] for name in arms}
    with tqdm(total=(rounds + 1) * len(arms), unit="step", disable=None, leave=False) as bar:
        for turn in range(rounds + 1):
            for name, arm in arms.items():
                clock = Clock(arm.device, process)
                clock.mark()
                loss = arm.step(batches[turn % len(batches)], clock.mark)
                if not loss < float("inf"):
                    raise SirenError(f"{name}: the loss became {loss}; no figure is given")
                if turn:
                    times[name].append(clock.seconds())
                bar.update()
    return times


def peak_memory(name: str, config: SirenConfig, precision: str, device: str, threads: int, batch: tuple) -> int:
    """Bytes at the worst moment of two steps, in this process, which is a fresh one."""
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.init()
    tiny = SirenConfig.preset("tiny")
    Arm(name, random_expert(tiny), precision, device).step(random_batch(tiny, 1, 9, 9, 0, device), lambda: None)
    before = machine.private_bytes()  # what a first step imports and sets up is in it
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with PeakMemory() as peak:
        arm = Arm(name, random_expert(config), precision, device)
        for seed in range(2):
            arm.step(random_batch(config, *batch, seed, device), lambda: None)
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak.bytes - before


def in_fresh_process(*arguments: Any) -> int:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_memory, *arguments).result()


def shortest_frames(lengths: str) -> int:
    """ "2-6" -> 100, "6" -> 300: frames of the shortest clip."""
    shortest = lengths.split("-")[0]
    if not shortest.isdigit() or not 1 <= int(shortest) <= SECONDS or lengths not in (f"{shortest}-6", "6"):
        raise InputError(f"--lengths must be like 2-6 or 6, seconds with commas between, not {lengths!r}")
    return int(shortest) * FRAMES_A_SECOND


def run(
    preset: Annotated[str, typer.Option(help="siren-1.6b, siren-3.1b or tiny")] = "siren-1.6b",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    narrow: Annotated[int, typer.Option(min=0, help="divide the width by this; 0: 4 on a CPU, 1 on a GPU")] = 0,
    arms: Annotated[str, typer.Option(help=f"of {', '.join(ARMS)}")] = "naive,siren",
    precision: Annotated[str, typer.Option(help="of fp32 and bf16 (autocast); empty: both, on a GPU bf16")] = "",
    lengths: Annotated[str, typer.Option(help="seconds of the clips, with commas between")] = "2-6,6",
    batch: Annotated[int, typer.Option(min=0, help="crops in a batch; 0: 8 on a CPU, 24 on a GPU")] = 0,
    frames: Annotated[int, typer.Option(min=1, help="frames of a crop")] = SECONDS * FRAMES_A_SECOND,
    rounds: Annotated[int, typer.Option(min=1, help="steps of each arm that count")] = 5,
    memory: Annotated[bool, typer.Option(help="measure memory too")] = True,
    threads: Annotated[int, typer.Option(help="of PyTorch; 0: all cores")] = 0,
    busy: Annotated[bool, typer.Option("--busy", help="count processor time, where other programs run")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file to write")] = None,
) -> None:
    """Compare training steps on this machine."""
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, not {device!r}")
    if busy and (device == "cuda" or threads != 1):
        raise InputError("--busy counts the time of one thread on a CPU: give --threads 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"torch {torch.__version__} sees no CUDA device")
    names = arms.split(",")
    known = ARMS if device == "cuda" else tuple(name for name in ARMS if name != "siren-plain")  # without siren.kernels
    if not set(names) <= set(known) or len(set(names)) != len(names):
        raise InputError(f"--arms must be different ones of {', '.join(known)}, not {arms!r}")
    kinds = (precision or ("bf16" if device == "cuda" else "fp32,bf16")).split(",")
    if not set(kinds) <= set(PRECISIONS):
        raise InputError(f"--precision must be of {', '.join(PRECISIONS)}, not {precision!r}")
    clips = lengths.split(",")
    shortest = {clip: min(shortest_frames(clip), frames) for clip in clips}
    narrow = narrow or (1 if device == "cuda" else 4)
    config = narrowed(SirenConfig.preset(preset), narrow)
    if frames > config.max_seq_len:
        raise InputError(f"{preset} takes at most {config.max_seq_len} frames: give fewer --frames")
    batch = batch or (24 if device == "cuda" else 8)
    threads = machine.thread_count(threads)
    torch.set_num_threads(threads)

    about = machine.describe_gpu() if device == "cuda" else machine.describe()
    size = f"{preset}, width / {narrow}" if narrow > 1 else preset
    about |= {"preset": size, "config": config.to_dict(), "threads": threads, "batch": batch, "frames": frames}
    about["clock"] = "process" if busy else "wall"
    about["command"] = " ".join(["python", "benchmarks/train.py", *sys.argv[1:]])
    parameters = sum(p.numel() for p in Expert(config, 0).parameters() if p.requires_grad)
    about["parameters"] = parameters
    where = about.get("gpu") or f"{about['cpu']}, {threads} threads"
    print(f"{where}, torch {about['torch']}; one expert of {size}: {parameters / 1e6:.1f} M trainable parameters")
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        print(f"gate, {kind}, without dropout:", flush=True)
        for line in check(config, names, kind, device):
            print("  " + line, flush=True)
        start = random_expert(config)
        built = {name: Arm(name, start, kind, device) for name in names}
        for clip in clips:
            batches = [random_batch(config, batch, frames, shortest[clip], seed, device) for seed in range(rounds + 1)]
            times = measure(built, batches, rounds, busy)
            valid = [int(batches[turn % len(batches)][3].sum()) for turn in range(1, rounds + 1)]
            for name in names:
                row = {"arm": name, "precision": kind, "clips": clip, "filled": statistics.mean(valid) / batch / frames}
                rows.append(row | summarise(times[name], times.get("naive"), valid, PARTS))
            json_file.write(out, {"about": about, "rows": rows})
        del built
    if memory:
        for row in rows:
            batch_size = (batch, frames, shortest[row["clips"]])
            row["peak_bytes"] = in_fresh_process(row["arm"], config, row["precision"], device, threads, batch_size)
        for row in rows:
            same = ("precision", "clips")
            naive = [r for r in rows if r["arm"] == "naive" and all(r[key] == row[key] for key in same)]
            row["memory_to_naive"] = row["peak_bytes"] / naive[0]["peak_bytes"] if naive else None
    print("\n" + table(rows, PARTS))
    json_file.write(out, {"about": about, "rows": rows})
    if out:
        print(f"\nwrote {out}")
    if picture:
        draw_picture(rows, f"Training one expert: {size}, {where}", picture)


if __name__ == "__main__":
    machine.main(run)
