"""Data sets as they are published, read as clips or copied into a clip folder.

Layouts: `folder` (sound files at any depth), `csv` and `jsonl` (one clip a row), `audiocaps`, `clotho`, `esc50` and
`vggsound`. Lists are read and checked whole; sounds are only looked for. Left out: downloading, and sound in videos.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, InputError
from .clips import ClipRecord, check_id, is_file, read_clip_folder, write_clip_folder
from .layouts import COLUMNS, READERS, SEARCHED, Options, Row

__all__ = ["LAYOUTS", "ClipRecord", "Imported", "import_clips", "read_clip_folder", "read_records"]

_LISTS = {  # where in a folder a layout has its list
    "csv": "*.csv",
    "jsonl": "*.jsonl",
    "audiocaps": "*.csv",
    "clotho": "clotho_captions_*.csv",
    "esc50": "meta/esc50.csv",
    "vggsound": "vggsound.csv",
}
LAYOUTS = ("folder", *_LISTS)
_LONG_PATH = 160  # characters; ids may have 200
WEAK_CAPTIONS = ("file", "folder", "none")


def read_records(
    source: str | Path,
    layout: str,
    audio: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | int | None = None,
    weak_captions: str = "file",
    licence: str | None = None,
) -> list[ClipRecord]:
    """The clips of a data set, in the order of its list, or of the file names if it has none.

    source: the data set's folder, or its list (CSV, JSONL).
    audio: the folder of the sounds, if it is not where the layout has it: the source (`esc50`: its "audio"). Names in
        a `csv`, `jsonl` or `esc50` list are paths from there; the others' sounds are found by name at any depth.
    columns: the list's names for audio, caption, id, label, licence, source (`csv`, `jsonl`). Numbered columns such as
        caption_1, caption_2 are captions too.
    split: only this fold (`esc50`) or split (`vggsound`).
    weak_captions: what stands in where nobody wrote captions: of a `folder` the words of the "file" name or of the
        "folder" name, of `esc50` and `vggsound` the class; "none" leaves it to a captioner.
    licence: of clips of which the list does not say it.

    Rows of one sound are one clip with all their captions, and the first row's id. Ids that a list gives must differ;
    ids made from file names (the path without suffix) are numbered where they do not: "rain", "rain-2". Clips whose
    sound is missing stay in the result; reading them says so. Raises InputError for an argument that cannot be, and
    DataError, which names the line, for a list that cannot be read, a path that leaves the folder, or if no sound at
    all is there.
    """
    return _read(source, layout, audio, columns, split, weak_captions, licence)[0]


@dataclass(frozen=True)
class Imported:
    """What `import_clips` did: clips in the new folder, those of them without captions, and the ids left out."""

    clips: int
    without_caption: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.clips} clips ({self.without_caption} without caption), {len(self.missing)} sounds missing"


def import_clips(
    source: str | Path, folder: str | Path, layout: str, link: bool = False, progress: bool = True, **options: Any
) -> Imported:
    """Make a clip folder of a data set: `read_records` with its `options`, then copies of the sounds, or hard links.

    Sounds that are missing are counted, and listed in the folder's `dropped.jsonl`. Raises what `read_records` and
    `write_clip_folder` raise, and InputError for a folder among sounds that are searched; the list is checked before
    anything is written.
    """
    records, root = _read(source, layout, **options)
    if layout in SEARCHED and Path(folder).expanduser().resolve().is_relative_to(root.resolve()):
        # A run that was stopped would leave copies there, and the next one would take them for sounds of the data set.
        raise InputError(f"{folder} is in {root}, which is searched for sounds at any depth; choose a folder beside it")
    missing = {record.id for record in write_clip_folder(folder, records, root, link, progress)}
    kept = [record for record in records if record.id not in missing]
    return Imported(len(kept), sum(not record.captions for record in kept), tuple(sorted(missing)))


def _read(
    source: str | Path,
    layout: str,
    audio: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | int | None = None,
    weak_captions: str = "file",
    licence: str | None = None,
) -> tuple[list[ClipRecord], Path]:
    """As `read_records`, with the folder that all sounds are in."""
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if weak_captions not in WEAK_CAPTIONS:
        raise InputError(f"weak_captions must be one of {', '.join(WEAK_CAPTIONS)}, not {weak_captions!r}")
    if columns and (layout not in ("csv", "jsonl") or columns.keys() - COLUMNS.keys()):
        raise InputError(f"columns are for csv and jsonl, and name some of {', '.join(COLUMNS)}")
    if split is not None and layout not in ("esc50", "vggsound"):
        raise InputError(f"the layout {layout} has no split; pass the list of the split")
    source = Path(source).expanduser()
    if not source.exists() or (layout == "folder" and not source.is_dir()):
        raise DataError(f"there is no {'folder' if layout == 'folder' else 'file or folder'} {source}")
    listed = source if layout == "folder" else _find_list(source, layout)
    root = source if source.is_dir() else listed.parent
    if layout == "esc50":
        root = (listed.parent.parent if listed.parent.name == "meta" else listed.parent) / "audio"
    root = root if audio is None else Path(audio).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root} to find the sounds in")
    options = Options(root, tuple((columns or {}).items()), None if split is None else str(split), weak_captions)
    records = _merge(READERS[layout](listed, options), root)
    if not records:
        raise DataError(f"{source} has no clips" + ("" if split is None else f" of the split {split}"))
    if not any(is_file(record.path) for record in records):
        raise DataError(f"none of the {len(records)} sounds that {listed} lists is in {root}")
    if licence is not None:
        records = [record if record.licence else replace(record, licence=licence) for record in records]
    return records, root


def _find_list(source: Path, layout: str) -> Path:
    if not source.is_dir():
        return source
    found = sorted(source.glob(_LISTS[layout]))
    if not found:
        raise DataError(f"{source} has no {_LISTS[layout]}, where the layout {layout} has its list")
    if len(found) > 1:
        raise DataError(f"{source} has several lists, pass one of them: {', '.join(path.name for path in found)}")
    return found[0]


def _merge(rows: Iterable[Row], root: Path) -> list[ClipRecord]:
    """Rows of one sound become one clip; clips without an id get one from their file's path."""
    clips: dict[Path, Row] = {}  # by sound
    given: dict[str, str] = {}
    for where, record in rows:
        if record.path in clips:
            first, known = clips[record.path]
            captions = tuple(dict.fromkeys(known.captions + record.captions))
            clips[record.path] = (first, replace(known, captions=captions))
            continue
        if record.id and given.setdefault(record.id, where) != where:
            raise DataError(f"{where}: the id {record.id!r} is taken by {given[record.id]}")
        clips[record.path] = (where, record)
    names = set(given)
    records = []
    for where, record in clips.values():
        name = record.id or _unused(record.path.relative_to(root).with_suffix("").as_posix(), names)
        names.add(name)
        records.append(replace(record, id=check_id(name, where)))
    return records


def _unused(path: str, names: set[str]) -> str:
    """An id made of a path, with a number if it is in `names` already."""
    name = "".join(character if character.isprintable() else "_" for character in path)
    if len(name) > _LONG_PATH:
        name = f"{name[:_LONG_PATH]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    if name not in names:
        return name
    return next(numbered for i in itertools.count(2) if (numbered := f"{name}-{i}") not in names)
