"""Does a run that is killed again and again end as one that was left alone? Bit for bit, on the CPU.

    python benchmarks/kill_resume.py --points 50
    python benchmarks/kill_resume.py --points 20 --align

Two runs, trainings of a tiny expert or alignments of two, go through uninterrupted and must be the same. Others are
stopped after a random time, by SIGKILL and every third time by SIGTERM, and started again until they finish; when one
has finished, another begins, until all points are used.
Checked after every stop: the state on the disk is whole, and no more updates are lost than there are between two saves
(none by SIGTERM). Checked at every end: weights, optimiser, what was logged, the checkpoint, and what every batch held
or every reward was given, in all of the run's lives. Processes are forked, so that a start takes no seconds. Exit code
1, saying what differs, if a check fails.
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

import kill_align
import numpy as np
import torch
from machine import main

from siren import SirenConfig
from siren.align.run import align as align_experts
from siren.errors import SirenError
from siren.train import TrainingStoppedError, TrainSettings, train
from siren.train.batches import Batch, Batches
from siren.train.state import latest_state, read_state

STEPS, SAVE_EVERY = 20, 3
TIMES = ("_seconds", "_per_second")  # ends of the names of what differs between two runs and may
CONFIG = SirenConfig(
    dim=16, n_heads=2, n_kv_heads=1, spatial_layers=1, factorized_layers=1, prompt_dim=8, dac_code_dim=2,
    dac_feature_dim=8, ffn_multiple_of=8, dropout=0.1, max_seq_len=64,
)  # fmt: skip


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
    return TrainSettings(
        data=data, out=out, config=CONFIG, experts=[1], allow_random_codebooks=True, max_steps=STEPS, batch_size=3,
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
        work()
        code = 0
    except TrainingStoppedError as error:
        code = error.exit_code
    except SirenError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    finally:
        os._exit(code)


def life(data: Path, out: Path, delay: float | None = None, number: int = 0) -> int:
    """Go on with a run in a process of its own, which gets the signal after so many seconds; how it ended (-9: killed).

    data: what to train on, or the folder with an alignment's inputs.
    """

    def work() -> None:
        if delay is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if data.is_dir():
            align_experts(kill_align.settings(data, out, STEPS, SAVE_EVERY))
        else:
            note_batches(Path(f"{out}.notes"))
            train(settings(data, out))

    child = forked(work)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def states(out: Path) -> Path:
    """The folder in which a run keeps its states and its log."""
    return out / "expert_2" if (out / "expert_2").exists() else out


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times; a last one that was cut short is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in values]


def notes(out: Path) -> set[str]:
    """What was noted in all of a run's lives: a step that is done again must meet what it met before."""
    return set(Path(f"{out}.notes").read_text().splitlines())


def check_stop(folder: Path, number: int, code: int) -> str | None:
    """What is wrong with what a stopped run left, None if nothing is."""
    state = latest_state(folder)
    kept = 0 if state is None else int(read_state(state).values["step"])  # raises if it is not whole
    done = max((line["step"] for line in metrics(folder) if "learning_rate" in line), default=0)
    most = SAVE_EVERY if code < 0 else 0  # SIGTERM kills too before training begins to listen
    return None if done - kept <= most else f"signal {number} lost the updates from {kept} to {done}"


def differences(ours: Path, theirs: Path) -> list[str]:
    """In what two finished runs differ: weights, optimiser, log, checkpoint, notes."""
    found = []
    folders = [states(run) for run in (ours, theirs)]
    last = [read_state(path) for path in map(latest_state, folders) if path is not None]
    if len(last) < 2 or any(state.values["step"] != STEPS for state in last):
        return ["one has not finished"]
    for part in ("model", "optimizer"):
        mine, other = (getattr(state, part) for state in last)
        found += [
            f"{part}: {name}" for name in mine.keys() | other.keys() if not _same(mine.get(name), other.get(name))
        ]
    if metrics(folders[0]) != metrics(folders[1]):
        found.append("log")
    first, second = (
        {path.name: path.read_bytes() for path in (run / "checkpoint").glob("*.*")} for run in (ours, theirs)
    )
    found += [f"checkpoint: {name}" for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    return found + [f"note {line!r}" for line in sorted(notes(ours) ^ notes(theirs))]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def run(points: int = 50, seed: int = 0, folder: Path | None = None, align: bool = False) -> None:
    """Kill `points` times at times drawn from `seed`; work in `folder`, by default a temporary one."""
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)])  # imports much, once for all processes
    root = Path(tempfile.mkdtemp()) if folder is None else folder
    root.mkdir(parents=True, exist_ok=True)
    data = kill_align.make_inputs(CONFIG, root / "inputs") if align else make_data(root)
    rng = np.random.default_rng(seed)
    whole, again = root / "whole", root / "again"
    for out in (whole, again):  # the first one's time is that of cold caches
        began = time.perf_counter()
        if life(data, out):
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
            code = life(data, out, delay, number)
            if code not in (0, -number, 128 + number):
                raise SirenError(f"a run ended with {code}; see {out}")
            if left and code != 0:
                kills, terms = kills + (number == signal.SIGKILL), terms + (number == signal.SIGTERM)
                halves += any(states(out).glob(".state-*"))
                problem = check_stop(states(out), number, code)
                problems += [] if problem is None else [f"{out.name}, stop {kills + terms}: {problem}"]
        problems += [f"{out.name}: {difference}" for difference in differences(whole, out)]
    print(
        f"{kills} kills and {terms} terminations over {runs} runs of {STEPS} {'steps' if align else 'updates'}, "
        f"saved every {SAVE_EVERY}; {halves} left a half-written state; {len(problems)} problems"
    )
    if folder is None:
        shutil.rmtree(root)
    if problems:
        print("\n".join(problems[:20]), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main(run)
