"""Does a training run that is killed again and again end as one that was left alone? Bit for bit, on the CPU.

    python benchmarks/kill_resume.py --points 50

Two runs of a tiny expert go through uninterrupted and must be the same. Others are stopped after a random time, by
SIGKILL and every third time by SIGTERM, and started again until they finish; when one has finished, another begins,
until all points are used.
Checked after every stop: the state on the disk is whole, and no more updates are lost than there are between two saves
(none by SIGTERM). Checked at every end: weights, optimiser, losses and what every batch held. Processes are forked, so
that a start takes no seconds. Exit code 1, saying what differs, if a check fails.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import main

from siren import SirenConfig
from siren.errors import SirenError
from siren.train import TrainingStoppedError, TrainSettings, train
from siren.train.batches import Batch, Batches
from siren.train.state import latest_state, read_state

STEPS, SAVE_EVERY = 20, 3
TIMES = ("frames_per_second",)  # what differs between two runs and may


def make_data(folder: Path, clips: int = 23) -> Path:
    """Random clips in the official format."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(clips):
        codes = rng.integers(0, 1024, (12, int(rng.integers(3, 20))))
        prompt = rng.standard_normal((int(rng.integers(1, 6)), 8)).astype(np.float32)
        np.savez(folder / f"{i}.npz", codes=codes, prompt_embeddings=prompt)
        lines.append(json.dumps({"id": f"clip-{i}", "npz": f"{i}.npz"}) + "\n")
    path = folder / "data.jsonl"
    path.write_text("".join(lines))
    return path


def settings(data: Path, out: Path) -> TrainSettings:
    """A run of one expert with everything random that there is: crops, dropout, prompt dropout."""
    config = SirenConfig(
        dim=16, n_heads=2, n_kv_heads=1, spatial_layers=1, factorized_layers=1, prompt_dim=8, dac_feature_dim=8,
        ffn_multiple_of=8, dropout=0.1, max_seq_len=64,
    )  # fmt: skip
    return TrainSettings(
        data=data, out=out, config=config, experts=[1], allow_random_codebooks=True, max_steps=STEPS, batch_size=3,
        accumulate=2, warmup_steps=4, crop_seconds=0.2, prompt_dropout=0.2, bucket=2, val_fraction=0.2, val_every=7,
        save_every=SAVE_EVERY, tensorboard=False, device="cpu", progress=False,
    )  # fmt: skip


def note_batches(path: Path) -> None:
    """From now on every batch that is made in this process leaves a line: update, number, checksum of what it holds."""
    make = Batches.batch

    def noting(self: Batches, step: int, micro_batch: int) -> Batch:
        batch = make(self, step, micro_batch)
        parts = [part.numpy().tobytes() for part in batch.arguments() if part is not None]
        with path.open("a") as file:
            file.write(f"{step} {micro_batch} {zlib.crc32(b''.join(parts)):08x}\n")
        return batch

    Batches.batch = noting  # type: ignore[method-assign]


def forked(work: Callable[[], Any]) -> int:
    """Do `work` in a process of its own; its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except TrainingStoppedError as error:
        code = error.exit_code
    except SirenError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    finally:
        os._exit(code)


def life(options: TrainSettings, batches: Path, delay: float | None = None, number: int = 0) -> int:
    """Train in a process of its own, which gets the signal after so many seconds; how it ended (-9: was killed)."""

    def work() -> None:
        if delay is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        note_batches(batches)
        train(options)

    child = forked(work)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times; a last one that was cut short is left out."""
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True) if folder.exists() else []
    values = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in values]


def held(path: Path) -> dict[tuple[int, int], set[str]]:
    """What the batch of each update and number held, in any of the run's lives."""
    found: dict[tuple[int, int], set[str]] = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            step, number, checksum = line.split()
            found.setdefault((int(step), int(number)), set()).add(checksum)
    return found


def check_stop(folder: Path, number: int, code: int) -> str | None:
    """What is wrong with what a stopped run left, None if nothing is."""
    state = latest_state(folder)
    kept = 0 if state is None else int(read_state(state).values["step"])  # raises if it is not whole
    done = max((line["step"] for line in metrics(folder) if "loss" in line), default=0) if folder.exists() else 0
    most = SAVE_EVERY if code < 0 else 0  # SIGTERM kills too before training begins to listen
    return None if done - kept <= most else f"signal {number} lost the updates from {kept} to {done}"


def differences(ours: Path, theirs: Path) -> list[str]:
    """In what two finished runs differ: weights, optimiser, losses, batches."""
    found = []
    folders = [run / "expert_2" for run in (ours, theirs)]
    states = [read_state(path) for path in map(latest_state, folders) if path is not None]
    if len(states) < 2 or any(state.values["step"] != STEPS for state in states):
        return ["one has not finished"]
    for part in ("model", "optimizer"):
        mine, other = (getattr(state, part) for state in states)
        found += [
            f"{part}: {name}" for name in mine.keys() | other.keys() if not _same(mine.get(name), other.get(name))
        ]
    if metrics(folders[0]) != metrics(folders[1]):
        found.append("losses")
    first, second = (held(Path(f"{run}.batches")) for run in (ours, theirs))
    found += [f"batch {key}" for key in sorted(first.keys() | second.keys()) if first.get(key) != second.get(key)]
    return found


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def run(points: int = 50, seed: int = 0, folder: Path | None = None) -> None:
    """Kill `points` times at times drawn from `seed`; work in `folder`, by default a temporary one."""
    torch.optim.AdamW([torch.zeros(1)])  # imports much, once for all processes
    root = Path(tempfile.mkdtemp()) if folder is None else folder
    root.mkdir(parents=True, exist_ok=True)
    data, rng = make_data(root), np.random.default_rng(seed)
    whole, again = root / "whole", root / "again"
    for out in (whole, again):  # the first one's time is that of cold caches
        began = time.perf_counter()
        if life(settings(data, out), Path(f"{out}.batches")):
            raise SirenError("the uninterrupted run failed")
        seconds = time.perf_counter() - began
    problems = [f"uninterrupted: {difference}" for difference in differences(whole, again)]
    kills = terms = halves = runs = 0
    while kills + terms < points or runs == 0:
        out = root / f"run-{runs}"
        runs += 1
        code = -1
        while code != 0:
            left = kills + terms < points
            number = signal.SIGTERM if (kills + terms) % 3 == 2 else signal.SIGKILL
            delay = rng.uniform(0, 0.8) * seconds if left else None
            code = life(settings(data, out), Path(f"{out}.batches"), delay, number)
            if code not in (0, -number, 128 + number):
                raise SirenError(f"a run ended with {code}; see {out}")
            if left and code != 0:
                kills, terms = kills + (number == signal.SIGKILL), terms + (number == signal.SIGTERM)
                expert = out / "expert_2"
                halves += any(expert.glob(".state-*")) if expert.exists() else False
                problem = check_stop(expert, number, code)
                problems += [] if problem is None else [f"{out.name}, stop {kills + terms}: {problem}"]
        problems += [f"{out.name}: {difference}" for difference in differences(whole, out)]
    print(
        f"{kills} kills and {terms} terminations over {runs} runs of {STEPS} updates, saved every {SAVE_EVERY}; "
        f"{halves} left a half-written state; {len(problems)} problems"
    )
    if folder is None:
        shutil.rmtree(root)
    if problems:
        print("\n".join(problems[:20]), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main(run)
