"""Lists of clips to evaluate: from a folder of sounds, a clip folder, the results of `siren generate`, or a manifest.

Lists are read and checked whole; sounds are not opened, but hashed where `ClipList.digests` asks for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.clips import CLIPS, ClipRecord, read_clip_folder
from ..data.layouts import READERS, Options
from ..data.shards import sha256_file
from ..data.sources import read_records
from ..errors import DataError, InputError
from ..jsonl import RESULTS

MISSING = "missing"  # stands for the hash of a file that cannot be read


@dataclass(frozen=True)
class Entry:
    """One clip. `id` is its own in the list; `pair` is the id by which the other list's clip is found.

    They differ only where `siren generate --n` made several clips of a prompt: those have one `pair`. `prompt` is the
    text, the first one if there are several, or "".
    """

    id: str
    pair: str
    path: Path
    prompt: str


@dataclass(frozen=True)
class ClipList:
    """The clips of `path`, in order."""

    path: Path
    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)


def read_list(path: str | Path) -> ClipList:
    """The list of a folder or file.

    A folder with clips.jsonl is a clip folder, one with results.jsonl is what `siren generate` made, any other is
    searched for sounds at any depth, whose ids are their paths without suffix. A .jsonl, .csv or .tsv file has columns
    for audio, caption and id by any name that `siren data import` knows, and paths from its own folder. Raises
    InputError for what is none of these, and DataError, which names the line, for a list that cannot be read or that
    gives an id twice.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        listed = [path / name for name in (CLIPS, RESULTS) if (path / name).is_file()]
        if len(listed) > 1:
            raise InputError(f"{path} has both {CLIPS} and {RESULTS}; name the file that is meant")
        if not listed:
            shard = next(path.glob("results-*-of-*.jsonl"), None)
            if shard is not None:
                raise InputError(f"{path} holds lists of shards, such as {shard.name}; join them to {path / RESULTS}")
            return ClipList(path, _folder(path))
        path = listed[0]
    if path.name == CLIPS and path.is_file():
        return ClipList(path, tuple(_entry(record, record.id) for record in read_clip_folder(path.parent)))
    kind = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv"}.get(path.suffix.lower())
    if not path.is_file():
        raise InputError(f"there is no file or folder {path}")
    if kind is None:
        raise InputError(f"{path} is no list of clips: give a folder, or a .jsonl, .csv or .tsv file")
    return ClipList(path, _manifest(path, kind))


def list_digest(clips: ClipList, digests: Iterable[str]) -> str:
    """One hash of all ids, prompts and sounds of a list; their order and the place of the files do not matter."""
    lines = sorted(json.dumps([e.id, e.prompt, digest]) for e, digest in zip(clips.entries, digests, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def prompts_digest(clips: ClipList) -> str:
    """One hash of the prompts of a list, each as often as it is there."""
    lines = sorted(json.dumps(entry.prompt) for entry in clips.entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, or MISSING."""
    try:
        return sha256_file(path) if path.is_file() else MISSING
    except (OSError, ValueError):  # unreadable; a name that no file can have
        return MISSING


def _folder(path: Path) -> tuple[Entry, ...]:
    records = read_records(path, "folder", weak_captions="none")
    stems = [record.path.with_suffix("") for record in records]
    twice = next((stem for stem, count in Counter(stems).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path} has several sounds named {twice.relative_to(path)}; their ids must differ")
    return tuple(_entry(record, record.id) for record in records)


def _manifest(path: Path, kind: str) -> tuple[Entry, ...]:
    """Rows of one sound are one clip; its first row gives the id."""
    records: dict[Path, tuple[str, ClipRecord]] = {}
    for where, record in READERS[kind](path, Options(path.parent, (), None, "none")):
        if record.path in records:
            first, known = records[record.path]
            records[record.path] = first, replace(known, captions=known.captions + record.captions)
            continue
        name = record.id or record.path.relative_to(path.parent).with_suffix("").as_posix()
        records[record.path] = where, replace(record, id=name)
    if not records:
        raise DataError(f"{path} lists no clips")
    groups: dict[str, list[tuple[str, ClipRecord]]] = {}
    for _, record in records.values():
        groups.setdefault(record.id, []).append((where, record))
    entries = []
    for _, record in records.values():
        group = groups[record.id]
        if len(group) > 1 and not all(re.fullmatch(re.escape(r.id) + r"-\d+", r.path.stem) for _, r in group):
            raise DataError(f"{group[1][0]}: the id {record.id!r} is taken by {group[0][0]}")
        entries.append(_entry(record, record.path.stem if len(group) > 1 else record.id))
    twice = next((name for name, count in Counter(entry.id for entry in entries).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the id {twice!r} is there twice")
    return tuple(entries)


def _entry(record: ClipRecord, name: str) -> Entry:
    return Entry(name, record.id, record.path, record.captions[0] if record.captions else "")
