"""A clip folder of procedural sound, any amount of it, made by several processes; a killed run goes on where it was.

The sounds are made in synth_clips.py, and its parts synth_*.py. PyTorch is not imported: every process would.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from pathlib import Path
from typing import Any

import soundfile
from tqdm import tqdm

from ..errors import DataError, InputError
from .processes import ENDED, worker_pool
from .synth_clips import CLASSES, VERSION, ProceduralClip, check_arguments, label_in_turn, synthesize
from .synth_tools import RATE

__all__ = ["CLASSES", "ProceduralClip", "make_procedural", "synthesize"]

LICENCE = "CC0-1.0"
_CLIPS = "clips.jsonl"
_JOB = "procedural.json"
_PARTS = "parts"
Job = dict[str, Any]  # the arguments that the sounds depend on
_GROUP = 16  # clips; what a killed run loses of each process at most


def make_procedural(
    folder: str | Path,
    clips: int,
    seed: int = 0,
    seconds: float = 4.0,
    scenes: float = 0.2,
    workers: int | None = None,
    progress: bool = True,
    labels: Sequence[str] = CLASSES,
) -> dict[str, int]:
    """Write clips 0 to `clips` - 1 of `synthesize` as a clip folder: 16-bit FLAC and clips.jsonl.

    Single events are of `labels` in turn. Returns the number of clips of each class, and of scenes as "scene". The
    folder appears whole. Until then the work is in `.NAME.partial` beside it, where the same call goes on after a run
    that was killed: finished groups of 16 clips are not made again, and the bytes are those of an undisturbed run,
    whatever the number of `workers` (None: one for each CPU). A folder that the same call made is left as it is. Raises
    InputError for arguments that cannot be and for any other folder that holds something, DataError if the disk cannot
    be written or a process ends.
    """
    check_arguments(0, seed, seconds, scenes)
    for name, count in (("clips", clips), ("workers", 1 if workers is None else workers)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {count!r}")
    unknown = [label for label in labels if label not in CLASSES]
    if unknown or not labels:
        named = f"there is no class {unknown[0]!r}" if unknown else "labels names no class"
        raise InputError(f"{named}; there are {', '.join(CLASSES)}")
    job: Job = {"version": VERSION, "clips": clips, "seed": seed, "seconds": float(seconds), "scenes": float(scenes)}
    if tuple(labels) != tuple(CLASSES):
        job["labels"] = list(labels)
    target = Path(folder).expanduser().resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        if not _is_made(target, job):
            _open(partial, job)
            if not (partial / _CLIPS).is_file():
                _fill(partial, job, workers or os.cpu_count() or 1, progress)
            if (partial / _PARTS).exists():
                shutil.rmtree(partial / _PARTS)
            if target.exists():
                target.rmdir()  # it is empty
            partial.rename(target)
            _sync(target.parent)
        lines = (target / _CLIPS).read_bytes().splitlines()
        return dict(Counter(json.loads(line).get("label", "scene") for line in lines))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {target}: {reason}; the same call goes on with what is finished") from error


def _is_made(target: Path, job: Job) -> bool:
    """Whether the same call has made the target; InputError if something else is there."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        made = json.loads((target / _JOB).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{target} exists and is no folder of procedural sound; choose another folder") from error
    if made != job or not (target / _CLIPS).is_file():
        raise InputError(f"{target} holds procedural sound of other arguments ({made}); choose another folder")
    return True


def _open(partial: Path, job: Job) -> None:
    """Begin, or go on with, the work on a folder. InputError if it is work on another one."""
    try:
        begun = json.loads((partial / _JOB).read_bytes())
    except FileNotFoundError:
        (partial / "audio").mkdir(parents=True, exist_ok=True)
        (partial / _PARTS).mkdir(exist_ok=True)
        _write(partial / _JOB, json.dumps(job).encode() + b"\n")
        return
    except ValueError as error:
        raise InputError(f"{partial / _JOB} is damaged; delete {partial}") from error
    if begun != job:
        raise InputError(f"{partial} holds an unfinished run of other arguments ({begun}); finish it, or delete it")


def _fill(partial: Path, job: Job, workers: int, progress: bool) -> None:
    """Make the groups that are not finished, then put their parts together."""
    clips = job["clips"]
    groups = range((clips + _GROUP - 1) // _GROUP)
    todo = [group for group in groups if not _part(partial, group).is_file()]
    done = clips - sum(len(_indices(group, clips)) for group in todo)
    with tqdm(desc="sounds", unit="clip", total=clips, initial=done, disable=None if progress else True) as bar:
        for count in _run(partial, todo, job, workers):
            bar.update(count)
    _write(partial / _CLIPS, b"".join(_part(partial, group).read_bytes() for group in groups))


def _part(partial: Path, group: int) -> Path:
    return partial / _PARTS / f"{group:06d}.jsonl"


def _indices(group: int, clips: int) -> range:
    return range(group * _GROUP, min((group + 1) * _GROUP, clips))


def _run(partial: Path, todo: list[int], job: Job, workers: int) -> Iterator[int]:
    """Make groups of clips; yields the number of clips of each."""
    if workers == 1 or len(todo) < 2:
        yield from map(_make_group, repeat(partial), todo, repeat(job))
        return
    pool = worker_pool(min(workers, len(todo)))
    try:
        yield from pool.map(_make_group, repeat(partial), todo, repeat(job))
    except BrokenProcessPool as error:
        raise DataError(f"{ENDED}; the same call goes on with what is finished") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make_group(partial: Path, group: int, job: Job) -> int:
    """Write the sounds of a group, then the part of clips.jsonl that says they are there."""
    lines = []
    indices = _indices(group, job["clips"])
    for index in indices:
        label = label_in_turn(index, job["scenes"], job.get("labels", CLASSES))
        clip = synthesize(index, job["seed"], job["seconds"], label, job["scenes"])
        file = io.BytesIO()
        soundfile.write(file, clip.waveform, RATE, format="FLAC", subtype="PCM_16")
        name = f"audio/{clip.id}.flac"
        _write(partial / name, file.getvalue())
        line = {"id": clip.id, "audio": name, "caption": list(clip.captions)}
        line |= {} if clip.label is None else {"label": clip.label}
        line |= {"licence": LICENCE, "source": f"procedural sound, seed {job['seed']}"}
        lines.append(json.dumps(line) + "\n")
    _write(_part(partial, group), "".join(lines).encode())
    return len(indices)


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.unfinished")  # always this name, so that a later run replaces it
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
