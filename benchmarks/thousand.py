"""Do a thousand clips take the memory of a hundred, and does a kill cost only what was not finished?

    python benchmarks/thousand.py --kills 8 --out benchmarks/results/thousand.json
    python benchmarks/thousand.py --clips 200 --kills 3 --seconds 1 --reference out/recordings

`siren generate --resume` makes the first tenth of the prompts in one go, and all of them while it is killed with
SIGKILL again and again and started anew, at points drawn over the first half of the clips. So its last life makes at
least half of them at once, and its peak of memory is compared with that of the tenth. `siren evaluate` goes over all
clips likewise, once left alone and once killed. Checked after every kill: each listed clip is there, and no clip that
was listed before was written again. At the end: each prompt has one clip and one line, in order, sounds and lines are
those of the run that was left alone, and so are the figures. Processes are forked, so that a start takes no seconds;
the memory they share with this one counts in every peak. Exit code 1, saying what is wrong, if a check fails.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import json_file
import numpy as np
import torch
import typer
from machine import describe, main
from retrieval_classes import CLASSES

import siren.cli
import siren.model  # the children's imports, done once for all
from siren.errors import SirenError
from siren.jsonl import RESULTS
from siren.manifest import MINI

PLACES = (
    "", "far away", "close by", "in a large hall", "in a small room", "at night", "in the city", "in a forest",
    "behind a wall", "under a bridge", "on an old tape", "by the sea",
)  # fmt: skip
TIMES = ("", "once", "twice", "again and again", "slowly", "quickly")
POLL = 0.02  # seconds between two looks at a process
WAIT = 0.5  # seconds: a kill comes up to so long after the clip it was drawn for
NOISE = 32 << 20  # bytes: how much two peaks of one and the same work can differ by the allocators' arenas


@dataclass
class Life:
    """One process: its seconds, the most memory it held, and how it ended (-9: killed)."""

    seconds: float
    peak_bytes: int
    ended: int


def prompts(count: int) -> list[str]:
    """So many different captions: every sound, then every sound at every place, then at every time."""
    words = (f"{c.prompt} {when} {where}".split() for when, where, c in itertools.product(TIMES, PLACES, CLASSES))
    found = [" ".join(parts) for parts in itertools.islice(words, count)]
    if len(found) < count:
        raise SirenError(f"there are {len(found)} captions, not {count}: ask for fewer --clips")
    return found


def live(arguments: list[str], errors: Path, is_over: Callable[[float], bool] = lambda _: False) -> Life:
    """Run a command of `siren` in a process of its own; kill it once is_over(seconds) says so."""
    sys.stdout.flush()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        code = 1
        try:
            with errors.open("a") as file, redirect_stdout(file), redirect_stderr(file):
                try:
                    siren.cli.main(arguments)
                    code = 0
                except SystemExit as error:
                    code = error.code if isinstance(error.code, int) else 1
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    peak, status = 0, (0, 0)
    while status[0] == 0:
        peak = max(peak, peak_of(child))
        if is_over(time.perf_counter() - began):
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)
        else:
            time.sleep(POLL)
            status = os.waitpid(child, os.WNOHANG)
    life = Life(time.perf_counter() - began, peak, os.waitstatus_to_exitcode(status[1]))
    if life.ended not in (0, -signal.SIGKILL):
        raise SirenError(f"siren {arguments[0]} ended with {life.ended}: {errors.read_text()[-300:].strip()}")
    return life


def peak_of(process: int) -> int:
    """The most memory that a process has held so far; 0 for one that is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def listed(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a list of results."""
    path = folder / RESULTS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def line_count(folder: Path) -> int:
    """As `listed`, but cheap enough for every look."""
    try:
        return (folder / RESULTS).read_bytes().count(b"\n")
    except OSError:
        return 0


class Watch:
    """What was finished when a process was killed; whether the next one left it alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self._seen: dict[str, tuple[int, int]] = {}

    def look(self, when: str) -> int:
        """Compare with the last look; the number of clips that are finished."""
        names = [line["file"] for line in listed(self.folder)]
        if len(set(names)) < len(names):
            self.problems.append(f"{when}: a clip is listed twice")
        now = {}
        for name in names:
            path = self.folder / name
            if not path.is_file():
                self.problems.append(f"{when}: {name} is listed and not there")
                continue
            stat = path.stat()
            now[name] = (stat.st_ino, stat.st_mtime_ns)
        for name, stamp in self._seen.items():
            if now.get(name) != stamp:
                self.problems.append(f"{when}: {name} was finished before and was made again, or lost")
        self._seen = now
        return len(names)


def differences(folder: Path, tenth: Path, ids: list[str]) -> list[str]:
    """What is wrong with the finished run in `folder`, of which `tenth` holds the first clips, made in one go."""
    lines, first = listed(folder), listed(tenth)
    found = [] if [line["id"] for line in lines] == ids else ["the list is not that of the prompts, in their order"]
    found += [] if lines[: len(first)] == first else ["the first lines differ from those of the run left alone"]
    for line in lines:
        if hashlib.sha256((folder / line["file"]).read_bytes()).hexdigest() != line["sha256"]:
            found.append(f"{line['file']} is not the sound of its line")
    for line in first:
        if (folder / line["file"]).read_bytes() != (tenth / line["file"]).read_bytes():
            found.append(f"{line['file']} differs from that of the run left alone")
    others = {path.name for path in folder.iterdir()} - {line["file"] for line in lines} - {RESULTS}
    return found + [f"{name} was left in the folder" for name in sorted(others)]


def generate_killed(command: list[str], folder: Path, clips: int, kills: int, rng: np.random.Generator) -> Any:
    """The lives of a run that is killed so often, their clips so far, and what was wrong between them."""
    points = sorted(rng.integers(0, max(1, clips // 2), kills).tolist())
    lives: list[Life] = []
    finished: list[int] = []
    watch = Watch(folder)
    for point in [*points, None]:
        reached: list[float] = []
        delay = rng.uniform(0, WAIT)

        def is_over(
            seconds: float, point: int | None = point, reached: list[float] = reached, delay: float = delay
        ) -> bool:
            if point is not None and not reached and line_count(folder) >= point:
                reached.append(seconds)
            return bool(reached) and seconds >= reached[0] + delay

        lives.append(live(command, folder.parent / "errors", is_over))
        finished.append(watch.look(f"after life {len(lives)}"))
        if lives[-1].ended == 0:
            break
    return lives, finished, watch.problems


def evaluate_killed(clips: Path, reference: Path | None, root: Path, kills: int, rng: np.random.Generator) -> Any:
    """Lives of `siren evaluate`, the first one left alone and the others of one run, and what differs."""

    def command(name: str) -> list[str]:
        given = [] if reference is None else ["--reference", str(reference)]
        return [
            "evaluate",
            str(clips / RESULTS),
            *given,
            "--out",
            str(root / f"{name}.json"),
            "--work",
            str(root / name),
        ]

    lives = [live(command("alone"), root / "errors")]
    for _ in range(kills):
        over = rng.uniform(0, lives[0].seconds / kills)  # together about half of the work, so every kill comes in time
        lives.append(live(command("killed"), root / "errors", lambda seconds, over=over: seconds >= over))
    lives.append(live(command("killed"), root / "errors"))
    alone, killed = (json.loads((root / f"{name}.json").read_text())["figures"] for name in ("alone", "killed"))
    return lives, alone, [] if alone == killed else ["the figures differ from those of the run left alone"]


def run(
    clips: Annotated[int, typer.Option(help="How many, from 10.")] = 1000,
    kills: Annotated[int, typer.Option(help="Of generate, and of evaluate.")] = 8,
    model: Annotated[str, typer.Option(help="Checkpoint folder.")] = MINI,
    seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 6.0,
    batch_size: Annotated[int, typer.Option(help="Clips decoded together.")] = 8,
    threads: Annotated[int, typer.Option(help="Of the engine and of PyTorch.")] = 1,
    evaluate: Annotated[bool, typer.Option(help="Evaluate the clips too.")] = True,
    reference: Annotated[Path | None, typer.Option(help="What to evaluate against; by default nothing.")] = None,
    seed: Annotated[int, typer.Option(help="Of the kills.")] = 0,
    work: Annotated[Path | None, typer.Option(help="An empty folder; by default a temporary one.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
) -> None:
    """Generate and evaluate under kills, and measure."""
    if clips < 10 or kills < 0:
        raise SirenError("--clips must be from 10 and --kills from 0")
    torch.set_num_threads(threads)
    root = Path(tempfile.mkdtemp()) if work is None else work
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ids = [f"clip-{i:05}" for i in range(clips)]
    jobs = zip(ids, prompts(clips), strict=True)
    lines = [json.dumps({"prompt": text, "id": name, "seed": i}) + "\n" for i, (name, text) in enumerate(jobs)]
    few = clips // 10
    (root / "tenth.jsonl").write_text("".join(lines[:few]))
    (root / "all.jsonl").write_text("".join(lines))
    options = ["--model", model, "--seconds", str(seconds), "--batch-size", str(batch_size), "--backend", "cpu"]
    options += ["--threads", str(threads), "--resume", "--out-dir"]

    alone = live(["generate", str(root / "tenth.jsonl"), *options, str(root / "tenth")], root / "errors")
    command = ["generate", str(root / "all.jsonl"), *options, str(root / "all")]
    lives, finished, problems = generate_killed(command, root / "all", clips, kills, rng)
    problems += differences(root / "all", root / "tenth", ids)
    before = finished[-2] if len(finished) > 1 else 0
    more = finished[-1] - before - few  # clips that the last life made beyond the tenth
    held = more * sum(path.stat().st_size for path in (root / "tenth").glob("*.wav")) // few
    growth = lives[-1].peak_bytes - alone.peak_bytes
    if growth > max(held // 2, NOISE):
        problems.append(f"{more} more clips took {growth / 1e6:.0f} MB more; all their sounds are {held / 1e6:.0f} MB")
    result: dict[str, Any] = {
        "machine": describe(),
        "clips": clips,
        "seconds_of_a_clip": seconds,
        "model": Path(model).name,
        "batch_size": batch_size,
        "threads": threads,
        "generate": {
            "alone": {"clips": few, "seconds": round(alone.seconds, 1), "peak_mb": round(alone.peak_bytes / 1e6)},
            "lives": [
                {"finished": done, "seconds": round(life.seconds, 1), "peak_mb": round(life.peak_bytes / 1e6)}
                for life, done in zip(lives, finished, strict=True)
            ],
            "kills": sum(life.ended != 0 for life in lives),
            "last_life_made": finished[-1] - before,
            "sounds_mb_beyond_alone": round(held / 1e6, 1),
        },
    }
    if evaluate:
        lives, figures, wrong = evaluate_killed(root / "all", reference, root, kills, rng)
        problems += wrong
        result["evaluate"] = {
            "alone": {"seconds": round(lives[0].seconds, 1), "peak_mb": round(lives[0].peak_bytes / 1e6)},
            "kills": sum(life.ended != 0 for life in lives),
            "seconds": round(sum(life.seconds for life in lives[1:]), 1),
            "peak_mb": round(max(life.peak_bytes for life in lives[1:]) / 1e6),
            "figures": {figure["label"]: figure["value"] for figure in figures},
        }
    result["problems"] = problems
    json_file.write(out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))
    if work is None:
        shutil.rmtree(root)
    if problems:
        print("\n".join(problems[:20]), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main(run)
