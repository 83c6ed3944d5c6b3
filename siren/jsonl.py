"""A file of prompts to a folder of clips: JSON Lines in, sound files and `results.jsonl` out.

Every line is checked before anything is generated. `results.jsonl` is written anew after each batch, so that a run
that was stopped leaves a list of the clips it finished.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .audio import write_files
from .errors import InputError, SamplingError, SirenError
from .generate import MAX_BATCH, MAX_CLIPS, check_request, check_whole, find_codec, find_encoder, find_sampler, generate
from .manifest import Manifest
from .rerank import Reward
from .sampling import SamplingSettings, expand_seeds

RESULTS = "results.jsonl"
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """One line of the file: a prompt, the name of its files, and the seed of its first clip."""

    where: str
    prompt: str
    id: str
    seed: int
    seconds: float

    def names(self, count: int) -> list[str]:
        """The names of its clips' files, without suffix."""
        return [self.id] if count == 1 else [f"{self.id}-{i:0{len(str(count - 1))}}" for i in range(count)]


def read_jobs(path: str | Path, seconds: float, seed: int, count: int, candidates: int = 1) -> list[Job]:
    """The lines of a file: {"prompt": ...} each, and if wanted "id", "seed" and "seconds". Blank lines are skipped.

    `count` clips are meant for each, out of `candidates` if those are more. A line without an id is named by its
    number; prompt i of the file, if it says no seed, has seed + i * max(count, candidates). Raises InputError naming
    the line.
    """
    check_whole("the number of clips for a prompt", count, MAX_CLIPS)
    check_whole("the number of candidates", candidates, MAX_CLIPS)
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path} is larger than {_MAX_BYTES >> 20} MiB; split it")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f'{path} holds no prompts; a line is like {{"prompt": "rain on a tin roof"}}')
    width = len(str(lines[-1][0]))
    jobs: list[Job] = []
    names: dict[str, str] = {}
    for i, (number, line) in enumerate(lines):
        where = f"{path}, line {number}"
        defaults = {"id": f"{number:0{width}}", "seed": seed + i * max(count, candidates), "seconds": seconds}
        job = _parse(line, where, defaults)
        for name in job.names(count):
            if names.setdefault(name.casefold(), where) != where:
                raise InputError(f"{where}: the name {name!r} is taken by {names[name.casefold()]}")
        jobs.append(job)
    return jobs


def _parse(line: str, where: str, defaults: dict[str, Any]) -> Job:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict) or "prompt" not in values:
        raise InputError(f'{where} must be an object with a "prompt"')
    unknown = sorted(set(values) - {"prompt", *defaults})
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; there are prompt, {', '.join(defaults)}")
    job = Job(where, **(defaults | values))
    if isinstance(job.seed, list):
        raise InputError(f"{where}: seed must be one whole number")
    if not isinstance(job.id, str) or not re.fullmatch(r"\w[\w.-]{0,99}", job.id):
        raise InputError(f"{where}: id names files: up to 100 letters, digits, '_', '-' and '.', not {job.id!r}")
    return job


def check_folder(folder: Path) -> None:
    """Raise InputError for a folder that is none, cannot be made or cannot be written to. Makes nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise InputError(f"{nearest} is not a folder; choose another path")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"no permission to write in {nearest}; choose another folder")


def generate_jobs(
    jobs: list[Job],
    manifest: Manifest,
    folder: str | Path,
    settings: SamplingSettings,
    count: int = 1,
    candidates: int = 1,
    rerank: Reward | None = None,
    batch_size: int = 8,
    codec: str | Path | None = None,
    encoder: str | Path | None = None,
    backend: str = "auto",
    weights: str = "bf16",
    threads: int | None = None,
    pictures: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Generate `count` WAV files for every job into `folder`, and return the path of its results.jsonl.

    They are the first of max(count, candidates) clips, by `rerank` the best first if it is given (rerank.py).
    Jobs of equal length are decoded together, up to `batch_size` clips at a time. Raises InputError for a job that
    cannot be, or a file that exists while `overwrite` is false, before the weights are read and with nothing written.
    If it is stopped later, the clips that were finished and their results stay.
    """
    from tqdm.auto import tqdm

    check_whole("batch size", batch_size, MAX_BATCH)
    folder = Path(folder).expanduser()
    check_folder(folder)
    ends = [".wav", ".png"] if pictures else [".wav"]
    for name in (RESULTS, *(f"{name}{end}" for job in jobs for name in job.names(count) for end in ends)):
        if (folder / name).is_dir():
            raise InputError(f"{folder / name} is a folder; move it away, or choose another --out-dir")
        if not overwrite and (folder / name).exists():
            raise InputError(f"{folder / name} exists; choose another folder, or pass --overwrite")
    sound, text = find_codec(manifest, codec), find_encoder(manifest, encoder)
    by_length: dict[int, list[Job]] = {}
    for job in jobs:
        try:
            expand_seeds(job.seed, max(count, candidates))
            by_length.setdefault(check_request(manifest.config, sound, text, job.prompt, job.seconds), []).append(job)
        except InputError as error:
            raise InputError(f"{job.where}: {error}") from error
    sampler = find_sampler(manifest, backend, weights, threads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SirenError(f"cannot make the folder {folder}: {error.strerror}") from error

    made = max(count, candidates)
    order = {job.id: i for i, job in enumerate(jobs)}
    results: dict[str, list[dict[str, Any]]] = {}
    per_batch = max(1, batch_size // made)
    batches = [group[i : i + per_batch] for group in by_length.values() for i in range(0, len(group), per_batch)]
    with tqdm(total=len(jobs) * count, unit="clip", desc="generating", disable=not progress) as bar:
        for batch in batches:
            try:
                audio = generate(
                    sampler,
                    [job.prompt for job in batch],
                    seconds=batch[0].seconds,
                    seed=[job.seed + i for job in batch for i in range(made)],
                    num_return_sequences=made,
                    rerank=rerank,
                    progress=False,
                    codec=sound,
                    encoder=text,
                    batch_size=batch_size,
                    **dataclasses.asdict(settings),
                )
            except SamplingError as error:
                raise SamplingError(f"{error} (sequence 0 is the first clip of {batch[0].where})") from error
            for j, job in enumerate(batch):
                results[job.id] = []
                for i, name in enumerate(job.names(count)):
                    clip = audio[j * made + i]
                    clip.save(folder / f"{name}.wav")
                    if pictures:
                        clip.picture(folder / f"{name}.png")
                    about = {"id": job.id, "file": f"{name}.wav", "prompt": job.prompt, "seed": clip.seeds[0]}
                    about |= {"score": _number(clip.scores[0])} if clip.scores else {}
                    about |= {"seconds": clip.seconds, **dataclasses.asdict(settings)}
                    about["mean_logprob"] = round(float(clip.logprobs.mean()), 6)  # type: ignore[union-attr]
                    results[job.id].append(about)
                    bar.update()
            done = sorted(results, key=lambda name: order[name])
            listed = "".join(json.dumps(about, ensure_ascii=False) + "\n" for name in done for about in results[name])
            write_files({folder / RESULTS: listed.encode()})
    return folder / RESULTS


def _number(score: float) -> float | None:
    """JSON has no NaN."""
    return round(score, 6) if math.isfinite(score) else None
