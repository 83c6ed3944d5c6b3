"""From clip folders to a token set: parallel, resumable, and the same bytes however it is run.

The clips of all sources, in order, form groups of `shard_clips`; a group gives one shard. Finished shards wait in
`.NAME.partial` beside the target, each with a small JSON record, so that a run that was killed goes on behind them. In
the end the folder NAME appears as a whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..codec import MAX_SECONDS
from ..errors import DataError, InputError
from .clip_tokenizer import Models, Settings
from .clips import CLIPS, ClipRecord, is_file, read_clip_folder
from .ray_pipeline import import_ray, ray_groups
from .similarity import THRESHOLD_1_6B, ClapSimilarity
from .sound import MIN_SECONDS, MIN_SNR, SAMPLE_RATE
from .tokens import FORMAT_VERSION, KIND
from .unfinished import Unfinished, pack_group
from .workers import outcomes


@dataclass(frozen=True)
class Report:
    """What `tokenize` made. `dropped` counts by reason; `resumed` are sound files done by an earlier run."""

    path: Path
    clips: int
    frames: int
    seconds: float
    dropped: dict[str, int]
    reserve: int
    resumed: int

    def __str__(self) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "nothing"
        kept = f"{self.clips} clips, {self.seconds / 60:.1f} minutes in {self.path}"
        return f"{kept} (dropped: {lost}" + (f"; reserve: {self.reserve})" if self.reserve else ")")


def tokenize(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    codec: Any,
    encoder: Any = "minilm",
    seconds: float = 10.0,
    pad_seconds: float | None = None,
    workers: int | None = None,
    min_snr: float = MIN_SNR,
    clap: Any = None,
    threshold: float | None = None,
    reserve: int = 0,
    captioner: Any = None,
    polisher: Any = None,
    shard_clips: int = 512,
    device: str = "cpu",
    ray: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Tokenize the clips of one or more clip folders into the token set `out`, and say what came of it.

    codec, encoder: a folder or name, or an object such as `siren.Codec` and `siren.PromptEncoder`.
    seconds: longer sounds are cut into pieces of this length, without overlap; the rest is dropped.
    pad_seconds: silence put after a shorter sound, at most up to `seconds`; None fills it up, 0 adds nothing.
    workers: processes, of one thread each; None is one per CPU. With 1, all happens in this process.
    min_snr: dB; pieces whose activity is not above it are dropped.
    clap: a folder or name, or an object such as `ClapSimilarity`; captions less similar than `threshold` are dropped,
        clips without another one too, and crops may begin where their similarity is at least 0.20 (appendix B).
    threshold: of the similarity; None is 0.40, the paper's for its 1.6B model.
    reserve: set aside this many clips of the highest similarity for reinforcement learning (`open_tokens`).
    captioner, polisher: what gives captions to clips that have none, and what rewrites these: a folder or name, or
        a callable (captioner.py).
    shard_clips: sound files that give one shard.
    device: where models named by folder run; on a GPU few workers do.
    ray: spread the work over a Ray cluster (ray_pipeline.py) instead of processes here.
    overwrite: replace a token set `out`, and begin anew where an unfinished one was made in another way.
    progress: show a bar, if stderr is a terminal.

    Bad files are listed in `dropped.jsonl` beside the manifest, with the reason. A run that was killed, or met a full
    disk, keeps its finished shards: called again with the same arguments, it goes on and gives the same bytes as an
    uninterrupted run, whatever `workers` is. If `out` is already what would be made, nothing is done. A script that
    asks for more than one worker needs `if __name__ == "__main__":`, as always with processes.

    Raises InputError for arguments, DataError for sources, a target or an unfinished run that do not fit, if no clip is
    left or nothing can be written, and what loading the models raises; all but the last two before anything is written.
    """
    folders = [Path(source).expanduser() for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    if clap is not None and threshold is None:
        threshold = THRESHOLD_1_6B
    settings = Settings(seconds, pad_seconds, min_snr, threshold, device)
    count = _check_arguments(folders, settings, shard_clips, workers)
    if clap is None and (threshold is not None or reserve):
        raise InputError("threshold and reserve need clap, the model that measures similarity")
    if reserve < 0:
        raise InputError(f"reserve must be 0 or more, not {reserve!r}")
    if ray:
        import_ray()
    records, origins, changed = _read_sources(folders)
    models = Models(codec, encoder, clap, captioner, polisher)
    loaded = models.load(device)
    if loaded.codec.sample_rate != SAMPLE_RATE:
        raise InputError(f"the codec must be at {SAMPLE_RATE} Hz, not {loaded.codec.sample_rate} Hz")
    if isinstance(loaded.clap, ClapSimilarity) and seconds > loaded.clap.max_seconds:
        raise InputError(f"seconds must be at most {loaded.clap.max_seconds:g}, which is what this CLAP hears")
    job = _job(models, loaded, asdict(settings) | {"shard_clips": shard_clips, "reserve": reserve}, origins)
    unfinished = Unfinished(Path(out), job, changed)
    values = None if overwrite else unfinished.finished()
    if values is not None:
        return _report(unfinished.target, values, resumed=len(records))

    groups = [records[i : i + shard_clips] for i in range(0, len(records), shard_clips)]
    todo = unfinished.open(len(groups), overwrite)
    resumed = len(records) - sum(len(groups[i]) for i in todo)
    bar = tqdm(total=len(records), initial=resumed, unit="clip", desc="tokenizing", disable=None if progress else True)
    with bar:
        if ray and todo:
            with contextlib.closing(ray_groups([(i, groups[i]) for i in todo], models, settings, workers)) as found:
                for i, shard, record in found:
                    unfinished.write(i, shard, record)
                    bar.update(len(groups[i]))
        elif todo:
            # Models loaded here serve this process; others load their own.
            given = loaded if count == 1 else models
            with contextlib.closing(outcomes([c for i in todo for c in groups[i]], given, settings, count)) as found:
                for i in todo:
                    group = []
                    for outcome in itertools.islice(found, len(groups[i])):
                        group.append(outcome)
                        bar.update()
                    unfinished.write(i, *pack_group(i, group, loaded.codec.codebook_size))
    return _report(unfinished.target, unfinished.finish(len(groups)), resumed)


def _report(path: Path, values: dict[str, Any], resumed: int) -> Report:
    seconds = values["frames"] * values["codec"]["hop_length"] / values["codec"]["sample_rate"]
    dropped, reserve = values["dropped"], len(values["reserve"])
    return Report(path, values["clips"], values["frames"], seconds, dropped, reserve, resumed)


def _check_arguments(folders: Sequence[Path], settings: Settings, shard_clips: int, workers: int | None) -> int:
    """The number of workers."""
    if not folders:
        raise InputError("sources must name at least one clip folder")
    if not MIN_SECONDS <= settings.seconds <= MAX_SECONDS:
        raise InputError(f"seconds must be from {MIN_SECONDS} to {MAX_SECONDS}, not {settings.seconds!r}")
    if settings.pad_seconds is not None and not 0 <= settings.pad_seconds <= MAX_SECONDS:
        raise InputError(f"pad_seconds must be from 0 to {MAX_SECONDS}, not {settings.pad_seconds!r}")
    if math.isnan(settings.min_snr):
        raise InputError("min_snr must be a number of dB, not NaN")
    if settings.threshold is not None and not -1 <= settings.threshold <= 1:
        raise InputError(f"threshold must be from -1 to 1, not {settings.threshold!r}")
    if not 1 <= shard_clips <= 1 << 16:
        raise InputError(f"shard_clips must be from 1 to {1 << 16}, not {shard_clips!r}")
    if workers is not None and not 1 <= workers <= 1024:
        raise InputError(f"workers must be from 1 to 1024, not {workers!r}")
    return workers or os.cpu_count() or 1


def _read_sources(folders: Sequence[Path]) -> tuple[list[ClipRecord], list[dict[str, Any]], float]:
    """All clips in order; for each folder what it holds; and the time of the latest change, in seconds."""
    records: list[ClipRecord] = []
    origins: list[dict[str, Any]] = []
    owners: dict[str, Path] = {}
    changed = 0.0
    for folder in folders:
        clips = read_clip_folder(folder)
        size = 0
        for clip in clips:
            if clip.id in owners:
                raise DataError(f"clip {clip.id!r} is in {owners[clip.id]} and in {folder}; give one another id")
            owners[clip.id] = folder
            if is_file(clip.path):  # a missing one is dropped later, like any unreadable file
                status = clip.path.stat()
                size, changed = size + status.st_size, max(changed, status.st_mtime)
        listing = folder / CLIPS
        changed = max(changed, listing.stat().st_mtime)
        digest = hashlib.sha256(listing.read_bytes()).hexdigest()
        origins.append({"name": folder.resolve().name, "clips": len(clips), "bytes": size, "clips_sha256": digest})
        records.extend(clips)
    if not records:
        raise DataError(f"there are no clips in {', '.join(map(str, folders))}")
    return records, origins, changed


def _job(models: Models, loaded: Models, settings: dict[str, Any], origins: list[dict[str, Any]]) -> dict[str, Any]:
    """What decides about the bytes of a token set: the beginning of its manifest."""
    sizes = ("sample_rate", "hop_length", "num_codebooks", "codebook_size")
    return {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "codec": {"identity": loaded.codec.identity} | {name: getattr(loaded.codec, name) for name in sizes},
        "encoder": {"identity": loaded.encoder.identity, "dim": loaded.encoder.dim},
        "clap": None if loaded.clap is None else loaded.clap.identity,
        "captioner": _name(models.captioner),
        "polisher": _name(models.polisher),
        "settings": settings,
        "sources": origins,
    }


def _name(model: Any) -> str | None:
    """What a captioner or polisher is called; its weights are not hashed."""
    if model is None or isinstance(model, (str, Path)):
        return None if model is None else str(model)
    return str(getattr(model, "__qualname__", type(model).__qualname__))
