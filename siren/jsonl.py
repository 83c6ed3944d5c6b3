"""A file of prompts to a folder of clips: JSON Lines in, sound files and `results.jsonl` out.

Every line is checked before anything is generated. A run that was stopped, however it was, leaves a list of the clips
it finished and can go on; shards of one file can be done by several machines. The clips are the same bytes either way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .audio import Audio, write_files
from .errors import InputError, SamplingError, SirenError
from .generate import MAX_BATCH, MAX_CLIPS, check_request, check_whole, find_codec, find_encoder, find_sampler, generate
from .manifest import Manifest
from .picture import draw_picture
from .rerank import Reward
from .results import Line, Results, check_same
from .sampling import SamplingSettings, expand_seeds
from .shard import shard_name

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


@dataclass(frozen=True)
class _Run:
    """What the clips of a run have in common. Their lines say it, and are compared with it when a run goes on.

    count of the `made` clips of a job are written, the best first if they are `ranked`.
    """

    folder: Path
    count: int
    made: int
    ranked: bool
    pictures: bool
    common: dict[str, Any]

    def files(self, name: str) -> list[Path]:
        """The files of one clip."""
        return [self.folder / f"{name}{end}" for end in ([".wav", ".png"] if self.pictures else [".wav"])]

    def about(self, job: Job, place: int, seed: int) -> dict[str, Any]:
        """The part of a line that is known before the clip is made."""
        name = job.names(self.count)[place]
        return {"id": job.id, "file": f"{name}.wav", "prompt": job.prompt, "seed": seed} | self.common

    def is_finished(self, job: Job, seconds: float, lines: list[Line], path: Path) -> bool:
        """Whether these lines of the list at `path` are of all clips of the job, and their files are there.

        Raises InputError if a line does not say what it would say now, or a sound is not the one that was written.
        """
        for place, line in enumerate(lines[: self.count]):
            seed, said = job.seed + place, line.about.get("seed")
            if self.ranked and isinstance(said, int) and 0 <= said - job.seed < self.made:
                seed = said
            check_same(line, self.about(job, place, seed) | {"seconds": seconds}, path)
        if len(lines) != self.count:
            return False
        for name, line in zip(job.names(self.count), lines, strict=True):
            if not all(file.is_file() for file in self.files(name)):
                return False
            sound = self.folder / line.about["file"]
            if _sha256(sound.read_bytes()) != line.about["sha256"]:
                raise InputError(
                    f"{sound} is not the sound of {path}, line {line.number}; move it away to have it made again"
                )
        return True

    def write(self, job: Job, clips: list[Audio], mark: str) -> list[dict[str, Any]]:
        """Write the files of a job's clips, all or none; their lines."""
        contents: dict[Path, bytes] = {}
        lines = []
        for place, (name, clip) in enumerate(zip(job.names(self.count), clips, strict=True)):
            sound = clip._encode(0, "WAV")
            drawn = [draw_picture(clip.waveform[0, 0].numpy(), clip.sample_rate, job.prompt)] if self.pictures else []
            contents |= dict(zip(self.files(name), [sound, *drawn], strict=True))
            about = self.about(job, place, clip.seeds[0]) | {"seconds": clip.seconds}
            about |= {"score": _number(clip.scores[0])} if clip.scores else {}
            about["mean_logprob"] = round(float(clip.logprobs.mean()), 6)  # type: ignore[union-attr]
            lines.append(about | {"sha256": _sha256(sound)})
        write_files(contents, mark)
        return lines


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
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
) -> Path:
    """Generate `count` WAV files for every job into `folder`, and return the path of its results.jsonl.

    They are the first of max(count, candidates) clips, by `rerank` the best first if it is given (rerank.py).
    Jobs of equal length are decoded together, up to `batch_size` clips at a time. Raises InputError for a job that
    cannot be, or a file that exists while `overwrite` is false, before the weights are read and with nothing written.

    shard (i, n): do only the jobs i, i + n and so on, counted from 1, and list them in results-i-of-n.jsonl; shards may
    share a folder. resume: keep what an earlier run listed there and do the rest; begin if there is no list. A job is
    finished once all of its clips are listed and their files are there. InputError for a listed clip that was made with
    other settings or by another model, or altered since. If a run is stopped, the clips it listed stay.
    """
    from tqdm.auto import tqdm

    check_whole("batch size", batch_size, MAX_BATCH)
    if resume and overwrite:
        raise InputError("--resume keeps the clips that are finished and --overwrite replaces them: pass one of them")
    folder = Path(folder).expanduser()
    check_folder(folder)
    path = folder / shard_name(RESULTS, shard)
    resume = resume and path.is_file()
    made = max(count, candidates)
    mine = jobs[shard[0] - 1 :: shard[1]]
    run = _Run(folder, count, made, rerank is not None, pictures, {})
    _check_files([] if resume else [path], overwrite)
    for job in mine:
        _check_files((file for name in job.names(count) for file in run.files(name)), overwrite or resume)
    sound, text = find_codec(manifest, codec), find_encoder(manifest, encoder)
    frames: dict[str, int] = {}
    for job in jobs:
        try:
            expand_seeds(job.seed, made)
            frames[job.id] = check_request(manifest.config, sound, text, job.prompt, job.seconds)
        except InputError as error:
            raise InputError(f"{job.where}: {error}") from error
    run.common.update(
        **dataclasses.asdict(settings),
        n=count,
        best_of=made,
        rerank=None if rerank is None else _name(rerank),
        model=_identity(manifest),
        codec=sound.identity,
        encoder=text.identity,
        weights=weights,
    )
    by_id = {job.id: job for job in mine}
    backends: set[str] = set()  # of the clips that are finished

    def is_finished(name: str, lines: list[Line]) -> bool:
        if name not in by_id:
            raise InputError(
                f"{path}, line {lines[0].number}: there is no {name!r} among the prompts; use the same file"
            )
        for line in lines:
            check_same(line, {} if backend == "auto" else {"backend": backend}, path)
            backends.add(str(line.about.get("backend")))
        return run.is_finished(by_id[name], frames[name] * sound.hop_length / sound.sample_rate, lines, path)

    mark = f"{shard[0]}-of-{shard[1]}-"
    with Results(path, mark) as results:
        finished = results.read(is_finished) if resume else set()
        left = [job for job in mine if job.id not in finished]
        sampler = find_sampler(manifest, backend, weights, threads) if left else None
        if sampler is not None:
            picked = run.common["backend"] = sampler.describe()["backend"]
            if backends - {picked}:
                raise InputError(f"{path} is of backend {min(backends)!r}, not {picked!r}: name it (--backend)")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SirenError(f"cannot make the folder {folder}: {error.strerror}") from error
        results.begin(overwrite)
        by_length: dict[int, list[Job]] = {}
        for job in left:
            by_length.setdefault(frames[job.id], []).append(job)
        per_batch = max(1, batch_size // made)
        batches = (group[i : i + per_batch] for group in by_length.values() for i in range(0, len(group), per_batch))
        done = len(finished) * count
        with tqdm(total=len(mine) * count, initial=done, unit="clip", desc="generating", disable=not progress) as bar:
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
                    clips = [audio[j * made + i] for i in range(count)]
                    results.append(job.id, run.write(job, clips, mark))
                    bar.update(count)
        results.finish(job.id for job in mine)
    return path


def _check_files(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise InputError for a path that cannot be written to, or exists and must not be replaced."""
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; move it away, or choose another --out-dir")
        if not overwrite and path.exists():
            raise InputError(f"{path} exists; choose another folder, or pass --overwrite (or --resume, to go on)")


def _identity(manifest: Manifest) -> str:
    """What makes the codes: one hash over the config and the hashes of the experts' weights."""
    parts = [manifest.config.to_dict(), [expert.sha256 for expert in manifest.experts]]
    return f"sha256:{_sha256(json.dumps(parts, sort_keys=True).encode())}"


def _name(rerank: Reward) -> str:
    return str(getattr(rerank, "identity", None) or getattr(rerank, "__name__", type(rerank).__name__))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _number(score: float) -> float | None:
    """JSON has no NaN."""
    return round(score, 6) if math.isfinite(score) else None
