"""How each published layout lists its clips: one reader a layout, from a list's path to rows.

A row is "file, line number", for messages, and a clip; its id is empty if the list gives none. Readers look for sounds
by name but open none. They raise DataError, which names the line.
"""

from __future__ import annotations

import csv
import functools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .clips import ClipRecord, check_captions, check_id, check_text, locate, optional_text, read_json_lines

COLUMNS = {  # the names by which a column is known if the caller gives none
    "audio": ("audio", "file_name", "filename", "path", "file"),
    "caption": ("caption", "captions", "text", "prompt", "description"),
    "id": ("id", "clip_id"),
    "label": ("label", "category", "class"),
    "licence": ("licence", "license"),
    "source": ("source",),
}

_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64", ".rf64")

Row = tuple[str, ClipRecord]  # "file, line number" and what stands there


@dataclass(frozen=True)
class Options:
    """`audio` is the folder of the sounds; the others are `read_records`' arguments of that name."""

    audio: Path
    columns: tuple[tuple[str, str], ...]
    split: str | None
    weak_captions: str


def _read_folder(_: Path, options: Options) -> Iterator[Row]:
    for path in _sounds(options.audio):
        parent = _words(path.parent.name) if path.parent != options.audio else ""
        name = {"file": _words(path.stem) or parent, "folder": parent, "none": ""}[options.weak_captions]
        yield str(path), ClipRecord("", path, check_captions([name], str(path)), parent or None)


def _read_csv(path: Path, options: Options) -> Iterator[Row]:
    for where, values in _csv_rows(path):
        yield _listed_clip(where, values, options)


def _read_jsonl(path: Path, options: Options) -> Iterator[Row]:
    for where, values in read_json_lines(path):
        yield _listed_clip(where, values, options)


def _listed_clip(where: str, values: Mapping[str, Any], options: Options) -> Row:
    names = _pick(tuple(values), options.columns)
    if names["missing"]:
        raise DataError(f"{where} has no {names['missing']}; it has {', '.join(values)}")
    captions = [values[key] for key in names["caption"]]
    captions = [text for value in captions for text in (value if isinstance(value, list) else [value])]
    texts = {key: optional_text(values.get(names[key]), key, where) for key in ("id", "label", "licence", "source")}
    path = locate(options.audio, check_text(values.get(names["audio"]), "audio", where), where)
    name = texts.pop("id")
    return where, ClipRecord(check_id(name, where) if name else "", path, check_captions(captions, where), **texts)


def _read_audiocaps(path: Path, options: Options) -> Iterator[Row]:
    find = _by_name(options.audio)
    for where, row in _csv_rows(path, {"youtube_id", "start_time", "caption"}):
        video, start = row["youtube_id"], _seconds(row["start_time"], where)
        # Nobody may publish the sounds, so downloaders name them as they like; a video gives one clip at most.
        names = (f"{video}_{start}", video, f"Y{video}", f"{video}_{start * 1000}_{(start + 10) * 1000}")
        captions = check_captions([row["caption"]], where)
        yield where, ClipRecord(f"{video}_{start}", find(names, where), captions, source="AudioCaps")


def _read_clotho(path: Path, options: Options) -> Iterator[Row]:
    find = _by_name(options.audio)
    for where, row in _csv_rows(path, {"file_name", "caption_1"}):
        captions = check_captions([text for key, text in row.items() if key.startswith("caption_")], where)
        yield where, ClipRecord("", find((row["file_name"],), where), captions, source="Clotho")


def _read_esc50(listed: Path, options: Options) -> Iterator[Row]:
    for where, row in _csv_rows(listed, {"filename", "fold", "category"}):
        if options.split in (None, row["fold"]):
            label = _words(row["category"])
            captions = () if options.weak_captions == "none" else (label,)
            # The licences are those of its LICENSE file.
            licence = "CC BY 3.0" if row.get("esc10", "").lower() == "true" else "CC BY-NC 3.0"
            yield (
                where,
                ClipRecord("", locate(options.audio, row["filename"], where), captions, label, licence, "ESC-50"),
            )


def _read_vggsound(path: Path, options: Options) -> Iterator[Row]:
    find = _by_name(options.audio)
    for where, row in _csv_rows(path, names=("video", "start", "label", "split")):
        if options.split in (None, row["split"]):
            video, start = row["video"], _seconds(row["start"], where)
            captions = check_captions([] if options.weak_captions == "none" else [row["label"]], where)
            found = find((f"{video}_{start:06d}", f"{video}_{start}", video), where)
            yield where, ClipRecord(f"{video}_{start:06d}", found, captions, row["label"] or None, source="VGGSound")


def _csv_rows(
    path: Path, needed: Collection[str] = (), names: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV or TSV file by column; `names` are the columns of one without a header. Blank rows are skipped."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = list(names) if names else [name.strip() for name in next(reader, [])]
            missing = sorted(set(needed) - set(header))
            if missing:
                raise DataError(f"{path} has no column {missing[0]!r}; it has {', '.join(header) or 'nothing'}")
            for row in reader:
                number = reader.line_num
                if not any(row):
                    continue
                where = f"{path}, line {number}"
                if len(row) != len(header):
                    raise DataError(f"{where} has {len(row)} fields; there are {len(header)} columns")
                yield where, {name: value.strip() for name, value in zip(header, row, strict=True)}
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {number + 1} or later is not valid CSV ({error})") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


@functools.lru_cache(maxsize=256)  # a file's rows share their columns
def _pick(present: tuple[str, ...], columns: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The column of every field, or None, and those of captions; and the name that is "missing" but must be there."""
    picked: dict[str, Any] = {"missing": None}
    for field, defaults in COLUMNS.items():
        wanted = dict(columns).get(field)
        for name in (wanted,) if wanted else defaults:
            pattern = re.escape(name) + (r"(_\d+)?" if field == "caption" else "")
            keys = [key for key in present if re.fullmatch(pattern, key)]
            if keys:
                break
        picked[field] = keys if field == "caption" else keys[0] if keys else None
        if not keys and (wanted or field == "audio"):
            picked["missing"] = wanted or " or ".join(defaults)
    return picked


def _sounds(folder: Path) -> list[Path]:
    """All sound files under a folder, by name, hidden ones left out."""
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(path, name) for name in files if not name.startswith(".") and name.lower().endswith(_SUFFIXES)]
    return sorted(found)


def _by_name(folder: Path) -> Callable[[Sequence[str], str], Path]:
    """A search for the first of some file names, with or without suffix, at any depth of a folder."""
    known = defaultdict[str, list[Path]](list)
    for path in _sounds(folder):
        known[path.name].append(path)
        known[path.stem].append(path)

    def find(names: Sequence[str], where: str) -> Path:
        for name in names:
            if len(known.get(name, ())) > 1:
                both = " or ".join(str(path.relative_to(folder)) for path in known[name][:2])
                raise DataError(f"{where}: {name!r} may be {both}; say in which folder the sounds are")
            if name in known:
                return known[name][0]
        return locate(folder, names[0], where)  # a file that is not there

    return find


def _seconds(text: str, where: str) -> int:
    """A whole number of seconds, as YouTube clips have them."""
    if not re.fullmatch(r"\d{1,6}(\.0*)?", text, re.ASCII):
        raise DataError(f"{where}: {text!r} is not a start in seconds")
    return int(text.partition(".")[0])


def _words(name: str) -> str:
    """The words of a file's or a class's name: "DogBark_02-far" has "dog bark far"."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(word for word in re.split(r"[\W_]+", name.lower()) if not re.fullmatch(r"\d*", word))


READERS: dict[str, Callable[[Path, Options], Iterator[Row]]] = {
    "folder": _read_folder,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "audiocaps": _read_audiocaps,
    "clotho": _read_clotho,
    "esc50": _read_esc50,
    "vggsound": _read_vggsound,
}

SEARCHED = ("folder", "audiocaps", "clotho", "vggsound")  # those that look for sounds at any depth
