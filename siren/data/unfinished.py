"""A token set while it is made: finished shards in a folder beside the target, and the step that puts it in place.

`.NAME.partial` holds `job.json`, what decides about the bytes, and for each group of clips a record and, if any clip
is left, a shard. Everything appears whole or not at all; a record comes after its shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..audio import write_files
from ..checkpoint import replace_folder, sync
from ..errors import DataError, SirenError
from .clip_tokenizer import Outcome
from .shards import pack_shard, sha256_file
from .similarity import reserve_top
from .tokens import MANIFEST, read_manifest

DROPPED = "dropped.jsonl"
_JOB = "job.json"


class Unfinished:
    """The work on one token set. `job` begins its manifest; `changed` is when its sources last did, in seconds.

    What fails to be written is a DataError that says where finished shards are.
    """

    def __init__(self, out: Path, job: dict[str, Any], changed: float) -> None:
        self.target = out.expanduser().resolve()
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self.job = json.loads(json.dumps(job))  # as it will be read back
        self._changed = changed

    def finished(self) -> dict[str, Any] | None:
        """The manifest of the target, if it is whole, and the job and its sources are still those that made it."""
        try:
            values = read_manifest(self.target)
            fresh = (self.target / MANIFEST).stat().st_mtime >= self._changed
        except (DataError, OSError):
            return None
        if not fresh or self._difference(values) or self._altered(values):
            return None
        if not self._unfinished_difference() and not self._in_the_way():
            with contextlib.suppress(OSError):
                self._discard()  # of a run killed after its last step
        return values

    def open(self, groups: int, overwrite: bool) -> list[int]:
        """Begin, or go on behind what an earlier run did. Returns the groups that are still to be done.

        Raises DataError, before anything is written, for a target that may not be replaced and for an unfinished run
        that differs, unless `overwrite`.
        """
        self._check_target(self.target, overwrite)
        if self._in_the_way():
            raise DataError(
                f"{self.folder} is in the way: it is no unfinished token set; move it, or choose another name"
            )
        difference = self._unfinished_difference()
        if difference and not overwrite:
            raise DataError(
                f"{self.folder} holds an unfinished run that differs in: {difference}; finish it with the same "
                "arguments, or overwrite it to begin anew"
            )
        try:
            for stale in self.target.parent.glob(f".{self.target.name}.saving-*"):
                shutil.rmtree(stale)  # of a run killed while it put the folder in place
            if difference is None or difference:
                self._discard()
                self.folder.mkdir(parents=True)
                write_files({self.folder / _JOB: _dump(self.job)})
            for stale in self.folder.glob(".siren-*"):
                stale.unlink()  # half-written
        except OSError as error:
            raise DataError(f"cannot write {self.folder}: {error.strerror or error}") from error
        return [i for i in range(groups) if self._read(i) is None]

    def write(self, group: int, shard: bytes, record: dict[str, Any]) -> None:
        """Keep a group as `pack_group` gives it: shard first, then the record that says it is there."""
        record_path = self.folder / f"{_stem(group)}.json"
        try:
            if shard:
                write_files({self.folder / record["shard"]["file"]: shard})
            write_files({record_path: _dump(record)})
            sync(self.folder)
        except (OSError, SirenError) as error:
            raise self._failed(error) from error

    def finish(self, groups: int) -> dict[str, Any]:
        """Put the token set in the place of the target. Returns its manifest."""
        records = [self._read(i) for i in range(groups)]
        if None in records:
            raise DataError(f"a shard in {self.folder} was altered; run the same command again")
        done = [record for record in records if record is not None]
        dropped = [value for record in done for value in record["dropped"]]
        shards = [record["shard"] for record in done if record["shard"] is not None]
        counts = dict(sorted(Counter(value["reason"] for value in dropped).items()))
        if not shards:
            with contextlib.suppress(OSError):
                self._discard()
            example = f"{dropped[0]['id']}: {dropped[0]['detail'] or dropped[0]['reason']}"
            raise DataError(f"no clip is left for {self.target}; dropped: {counts}; for example {example}")
        manifest = self.job | {
            "clips": sum(shard["clips"] for shard in shards),
            "frames": sum(shard["frames"] for shard in shards),
            "dropped": counts,
            "reserve": self._reserve(done),
            "shards": shards,
        }
        lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in dropped)

        def fill(folder: Path) -> None:
            for shard in shards:
                _link(self.folder / shard["file"], folder / shard["file"])
            write_files({folder / DROPPED: lines.encode()})
            write_files({folder / MANIFEST: _dump(manifest)})
            sync(folder)

        try:
            replace_folder(self.target, MANIFEST, lambda target: self._check_target(target, overwrite=True), fill)
        except DataError:
            raise
        except SirenError as error:
            raise self._failed(error) from error
        with contextlib.suppress(OSError):
            self._discard()
        return manifest

    def _discard(self) -> None:
        """Delete the unfinished run, the job last: what a kill leaves here is still known as a run of this job."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name != _JOB:
                path.unlink()
        (self.folder / _JOB).unlink(missing_ok=True)
        self.folder.rmdir()

    def _reserve(self, records: Iterable[dict[str, Any]]) -> list[str]:
        """The ids of the clips that are set aside, in their order."""
        names, scores = [], []
        for record in records:
            for name, score in record["scores"]:
                names.append(name)
                scores.append(score)
        return [names[i] for i in reserve_top(scores, self.job["settings"]["reserve"])]

    def _read(self, group: int) -> dict[str, Any] | None:
        """The record of a finished group; None if it is not finished, or not what was written."""
        path = self.folder / f"{_stem(group)}.json"
        try:
            record = json.loads(path.read_bytes())
            shard = record["shard"]
            if shard is not None and sha256_file(path.with_suffix(".safetensors")) != shard["sha256"]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record

    def _altered(self, values: dict[str, Any]) -> str:
        """The first shard of the target that is not what was written, in words; empty if there is none."""
        for shard in values["shards"]:
            try:
                whole = sha256_file(self.target / shard["file"]) == shard["sha256"]
            except (OSError, ValueError):
                whole = False
            if not whole:
                return f"{shard['file']}, which is missing or was altered"
        return ""

    def _difference(self, values: dict[str, Any]) -> str:
        """The parts in which something made earlier differs from the job, in words; empty if it does not."""
        return ", ".join(name for name, part in self.job.items() if values.get(name) != part)

    def _unfinished_difference(self) -> str | None:
        """As `_difference`, for the unfinished run; None if there is none."""
        path = self.folder / _JOB
        try:
            values = json.loads(path.read_bytes())
            newer = path.stat().st_mtime < self._changed
        except FileNotFoundError:
            return None  # a run killed before its first shard leaves at most an empty folder
        except (OSError, ValueError):
            return f"its {_JOB} is damaged"
        return self._difference(values) or ("sources, which have changed since" if newer else "")

    def _in_the_way(self) -> bool:
        """Whether something else than an unfinished run has its name, such as work on another kind of folder."""
        if (self.folder / _JOB).exists() or not os.path.lexists(self.folder):
            return False
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else [self.folder.name]
        return not all(name.startswith(".siren-") for name in names)

    def _check_target(self, target: Path, overwrite: bool) -> None:
        """DataError if something is there that may not be replaced."""
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        try:
            values = read_manifest(target)
        except DataError as error:
            raise DataError(f"{target} exists and is no token set ({error}); choose another folder") from error
        ours = {MANIFEST, DROPPED, *(shard["file"] for shard in values["shards"])}
        others = sorted(path.name for path in target.iterdir() if path.name not in ours)
        if others:
            raise DataError(f"{target} also holds {others[0]!r}; move it out, or choose another folder")
        if not overwrite:
            parts = self._difference(values) or self._altered(values) or "sources, which have changed since"
            raise DataError(f"{target} is a token set that differs in: {parts}; overwrite it, or choose another folder")

    def _failed(self, error: Exception) -> DataError:
        reason = getattr(error, "strerror", None) or error
        return DataError(f"{reason}; finished shards are kept in {self.folder}: make room, run the same command again")


def pack_group(group: int, outcomes: Sequence[Outcome], codebook_size: int) -> tuple[bytes, dict[str, Any]]:
    """The shard of a group of clips, empty if none is left, and the record of what became of them."""
    clips = [clip for outcome in outcomes for clip in outcome.clips]
    record: dict[str, Any] = {
        "shard": None,
        "dropped": [asdict(dropped) for outcome in outcomes for dropped in outcome.dropped],
        "scores": [[clip.id, clip.score] for clip in clips if clip.score is not None],
    }
    if not clips:
        return b"", record
    shard = pack_shard(clips, codebook_size)
    record["shard"] = {
        "file": f"{_stem(group)}.safetensors",
        "clips": len(clips),
        "frames": sum(len(clip.codes) for clip in clips),
        "sha256": hashlib.sha256(shard).hexdigest(),
    }
    return shard, record


def _stem(group: int) -> str:
    return f"shard-{group:05d}"


def _dump(values: Any) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def _link(source: Path, target: Path) -> None:
    """Both names for one file; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)
