"""Seconds of an alignment step of siren-mini, and of its parts: with this package's decoder and with the naive one.

    python benchmarks/align.py                    prompts of procedural sounds, made for the purpose
    python benchmarks/align.py --tokens out/mini/tokens --prompts-per-step 8 --num-generations 8 --seconds 4

Both arms are the loop of `siren align` itself with the offline reward, "aligner", and fp32 rollouts, from the same
weights, on the same prompts, with the same seeds; "naive" samples with backend "reference", plain PyTorch with a cache,
"siren" with "cpu". They take turns step by step, so that the machine's noise hits both alike.

The first step warms up and is the gate: no other is taken if the arms' rollouts differ in more than rounding. As long
as two rollouts have the same codes, their log-probabilities must agree, to 1e-5 of their root mean square. The first
code in which they differ must be a near-tie: with its noise (siren.sampling) each arm's choice scores the same to twice
the largest difference of log-probabilities. Sounds with the same codes must have the same rewards, bit for bit.

The table has medians over the steps after it. Sampling, codec and reward overlap when `--rollout-batch-size` makes
several batches of a step's rollouts, so their busy seconds may add up to more than the step takes. A rollout frame is
20 ms of sound, 12 codes; "frames/s" counts the seconds of sampling alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import json_file
import machine
import torch
import typer
from align_report import summarise, table
from tqdm import tqdm

import siren
from siren.align.loop import Alignment
from siren.align.prompts import Prompt
from siren.align.rollout import Rollouts
from siren.align.run import make_job
from siren.align.settings import AlignSettings
from siren.data import tokenize
from siren.data.procedural import make_procedural
from siren.errors import SirenError
from siren.sampling import expand_seeds, gumbel_noise
from siren.train.distributed import World
from siren.train.stop import StopSignals

ARMS = {"naive": "reference", "siren": "cpu"}  # and their backends
CLIPS = 24  # that are made where no token set is given
LIMIT = 1e-5  # of the log-probabilities' root mean square


class Arm(Alignment):
    """An alignment that remembers its last rollouts and their seeds."""

    def roll_out(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollouts:
        self.rollouts, self.seeds = super().roll_out(prompts, seeds), list(seeds)
        return self.rollouts


def make_tokens(folder: Path) -> Path:
    """A small token set of procedural sounds, of siren-mini's codec."""
    make_procedural(folder / "clips", CLIPS, seconds=1.0, scenes=0.0, workers=1, progress=False)
    codec = siren.Siren.from_pretrained("siren-mini").codec_path
    tokenize(folder / "clips", folder / "tokens", codec, seconds=1.0, workers=1, progress=False)
    return folder / "tokens"


def check(naive: Rollouts, own: Rollouts, seeds: Sequence[int], codebook_size: int) -> str:
    """The gate. A line to print; raises SirenError when it is red."""
    count, codebooks, frames = own.codes.shape
    # As they are drawn: frame by frame, and in a frame codebook by codebook.
    codes, other_codes = (part.codes.transpose(1, 2).reshape(count, -1) for part in (own, naive))
    logprobs, other_logprobs = (part.logprobs.transpose(1, 2).reshape(count, -1) for part in (own, naive))
    differs = codes != other_codes
    same = differs.cumsum(1) == 0
    errors = (logprobs - other_logprobs)[same].double()
    error = float(errors.square().mean().sqrt() / other_logprobs[same].double().square().mean().sqrt())
    rows = differs.any(1)
    gap = 0.0
    for row in rows.nonzero()[:, 0].tolist():
        place = int(differs[row].to(torch.uint8).argmax())
        frame, codebook = divmod(place, codebooks)
        noise = gumbel_noise(expand_seeds([seeds[row]], 1), frame, [codebook], codebook_size)[0, 0]
        scores = [
            part[row, place] + noise[code[row, place]]
            for part, code in ((logprobs, codes), (other_logprobs, other_codes))
        ]
        gap = max(gap, abs(float(scores[0] - scores[1])))
    limit = 2 * float(errors.abs().max())
    rewards = int((own.rewards != naive.rewards)[~rows].sum())
    line = (
        f"{int(rows.sum())} of {count} rollouts of {frames} frames leave the naive ones, at near-ties of at most "
        f"{gap:.1e} (limit {limit:.1e}); log-probabilities until there: error {error:.1e}, limit {LIMIT:.0e}; "
        f"{rewards} of {int((~rows).sum())} rewards of the same codes differ"
    )
    if not (error <= LIMIT and gap <= limit and rewards == 0 and bool(own.rewards.isfinite().all())):
        raise SirenError(f"the gate is red, nothing is timed: {line}")
    return line


def measure(arms: dict[str, Arm], steps: int) -> dict[str, list[dict[str, float]]]:
    """The records of every arm's steps, with "step_seconds", after one that warms up and is checked."""
    records: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    with tqdm(total=(steps + 1) * len(arms), unit="step", disable=None, leave=False) as bar:
        for turn in range(steps + 1):
            for name, arm in arms.items():
                start = time.perf_counter()
                record = arm.one_step()
                if turn:
                    records[name].append(record | {"step_seconds": time.perf_counter() - start})
                bar.update()
            if not turn:
                naive, own = arms["naive"], arms["siren"]
                size = own.job.model.config.codebook_size
                tqdm.write(f"gate: {check(naive.rollouts, own.rollouts, own.seeds, size)}")
    return records


def run(
    tokens: Annotated[Path | None, typer.Option(help="token set with prompts; by default one is made")] = None,
    prompts_per_step: Annotated[int, typer.Option(help="prompts of a step")] = 4,
    num_generations: Annotated[int, typer.Option(help="rollouts of each prompt")] = 8,
    seconds: Annotated[float, typer.Option(help="of a rollout")] = 2.0,
    rollout_batch_size: Annotated[int, typer.Option(help="rollouts sampled at once")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="of each arm that count")] = 5,
    threads: Annotated[int, typer.Option(help="of the engine and of PyTorch; 0: all cores")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
) -> None:
    """Compare alignment steps on this machine."""
    threads = machine.thread_count(threads)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        sizes: dict[str, Any] = {"prompts_per_step": prompts_per_step, "num_generations": num_generations}
        sizes |= {"seconds": seconds, "rollout_batch_size": rollout_batch_size}
        settings = {
            name: AlignSettings(
                "siren-mini", tokens or where / "tokens", where / name, max_steps=steps + 1, eval_prompts=0,
                device="cpu", backend=backend, threads=threads if backend == "cpu" else None, **sizes,
            )
            for name, backend in ARMS.items()
        }  # fmt: skip
        if tokens is None:
            make_tokens(where)
        world = World(0, 1, torch.device("cpu"))
        arms = {name: Arm(make_job(values, world), where, StopSignals()) for name, values in settings.items()}
        about = machine.describe() | sizes | {"threads": threads, "prompts": "procedural" if tokens is None else "own"}
        about["command"] = " ".join(["python", "benchmarks/align.py", *sys.argv[1:]])
        print(f"{about['cpu']}, {threads} threads, {about['instructions']}, torch {about['torch']}; siren-mini")
        print(f"{prompts_per_step} prompts of {num_generations} rollouts of {seconds:g} s, {steps} steps", flush=True)
        records = measure(arms, steps)
    rows = [{"arm": name} | summarise(records[name], records["naive"]) for name in arms]
    print("\n" + table(rows))
    json_file.write(out, {"about": about, "rows": rows})
    if out:
        print(f"\nwrote {out}")


if __name__ == "__main__":
    machine.main(run)
