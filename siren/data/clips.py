"""Clips, and the clip folder: sound files with a `clips.jsonl` that says what is heard in them.

    {"id": "rain-01", "audio": "rain/01.wav", "caption": "rain on a tin roof", "licence": "CC0", "source": "..."}

One object a line. `caption` is a text or a list of texts; it, `label`, `licence` and `source` may be missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..audio import write_files
from ..errors import DataError, InputError, SirenError

CLIPS = "clips.jsonl"
DROPPED = "dropped.jsonl"
_KEYS = ("id", "audio", "caption", "label", "licence", "source")
_MAX_LINE = 1 << 20  # bytes
_MAX_ID = 200  # characters


@dataclass(frozen=True)
class ClipRecord:
    """One sound file and what is known about it. A clip without captions may be given some by a captioner.

    The file need not be there, or be sound: whoever opens it counts it as dropped. `label` is its class.
    """

    id: str
    path: Path
    captions: tuple[str, ...]
    label: str | None = None
    licence: str | None = None
    source: str | None = None


def read_clip_folder(folder: str | Path) -> list[ClipRecord]:
    """The clips of a folder, in the order of its `clips.jsonl`. Empty captions are left out.

    Raises DataError naming the line if it is not valid JSON, has an unknown key, lacks "id" or "audio", repeats an id,
    or names a file outside the folder.
    """
    folder = Path(folder).expanduser()
    if not (folder / CLIPS).is_file():
        raise DataError(f"{folder} is no clip folder: it has no {CLIPS}")
    records, lines = [], dict[str, str]()
    for where, values in read_json_lines(folder / CLIPS):
        unknown = sorted(values.keys() - set(_KEYS))
        if unknown:
            raise DataError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
        name = check_id(values.get("id"), where)
        if name in lines:
            raise DataError(f"{where}: the id {name!r} is taken by {lines[name]}")
        lines[name] = where
        captions = values.get("caption")
        records.append(
            ClipRecord(
                name,
                locate(folder, check_text(values.get("audio"), "audio", where), where),
                check_captions(captions if isinstance(captions, list) else [captions], where),
                *(optional_text(values.get(key), key, where) for key in ("label", "licence", "source")),
            )
        )
    if not records:
        raise DataError(f"{folder / CLIPS} lists no clips")
    return records


def write_clip_folder(
    folder: str | Path, records: Sequence[ClipRecord], root: Path, link: bool = False, progress: bool = True
) -> list[ClipRecord]:
    """Copy the sounds of clips, all of them under `root`, into a new clip folder; `link` makes hard links instead.

    Returns the clips whose sound is missing, cannot be opened or has a name that is not UTF-8. They are left out and
    listed in `dropped.jsonl`. `clips.jsonl` is written last, so a folder that has one is whole; what was copied by a
    run that was stopped is not copied again. Raises InputError if the folder holds clips already or cannot have links,
    SirenError if writing fails.
    """
    from tqdm.auto import tqdm

    folder = Path(folder).expanduser()
    if (folder / CLIPS).exists():
        raise InputError(f"{folder} holds clips already; choose another folder")
    lines, lost, dropped = [], [], []
    target = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for record in tqdm(records, unit="clip", desc="copying", disable=None if progress else True):
            name = PurePosixPath("audio", record.path.relative_to(root).as_posix())
            target = folder / name
            try:
                str(name).encode()
                if not is_file(record.path):  # before opening: a pipe would be waited for
                    raise FileNotFoundError
                file = record.path.open("rb")
            except (OSError, UnicodeEncodeError) as error:
                dropped.append(record)
                reason = "missing" if isinstance(error, FileNotFoundError) else "cannot be opened"
                reason = "name is not UTF-8" if isinstance(error, UnicodeEncodeError) else reason
                detail = str(name).encode(errors="backslashreplace").decode()
                lost.append(_dump({"id": record.id, "reason": reason, "detail": detail}))
                continue
            with file:
                _copy(file, target, link)
            about = {"id": record.id, "audio": str(name), "caption": list(record.captions)}
            about |= {"label": record.label, "licence": record.licence, "source": record.source}
            lines.append(_dump({key: value for key, value in about.items() if value}))
    except OSError as error:
        raise SirenError(f"cannot write {target}: {error.strerror}") from error
    if not lines:
        raise DataError(f"none of the {len(records)} sounds in {root} can be read")
    write_files({folder / DROPPED: "".join(lost).encode(), folder / CLIPS: "".join(lines).encode()})
    return dropped


def _copy(file: BinaryIO, target: Path, link: bool) -> None:
    """Copy an open file whole or not at all, with its time, by which a copy made before is known."""
    about = os.fstat(file.fileno())
    with contextlib.suppress(FileNotFoundError):
        there = target.stat()
        if (there.st_size, there.st_mtime_ns) == (about.st_size, about.st_mtime_ns):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".siren-{secrets.token_hex(8)}")
    try:
        if link:
            try:
                os.link(Path(file.name).resolve(), temporary)
            except OSError as error:
                raise InputError(f"cannot link {file.name} into {target.parent}: {error.strerror}; copy it") from error
        else:
            with temporary.open("xb") as copy:
                shutil.copyfileobj(file, copy)
                copy.flush()
                os.fsync(copy.fileno())
            os.utime(temporary, ns=(about.st_atime_ns, about.st_mtime_ns))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _dump(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with "file, line number" for messages; blank lines are skipped."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > _MAX_LINE:
                    raise DataError(f"{where} is longer than {_MAX_LINE} bytes")
                if not line.strip():
                    continue
                try:
                    values = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where} is not valid JSON ({error})") from error
                if not isinstance(values, dict):
                    raise DataError(f"{where} must hold a JSON object")
                yield where, values
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def locate(folder: Path, name: str, where: str) -> Path:
    """`folder` / `name`. DataError if the name leads out of the folder; links are followed, as the folder's owner's."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.parts:
        raise DataError(f"{where}: {name!r} is not a path inside {folder}")
    return folder / parts


def is_file(path: Path) -> bool:
    """Whether there is such a file. No list can make this fail: a name may be longer than any file's."""
    try:
        return path.is_file()
    except OSError:
        return False


def check_text(value: object, key: str, where: str) -> str:
    """A text with something in it, without surrounding space; whole numbers become one."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {key} must be a text, not {value!r}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: {key} is not valid Unicode")
    return text.strip()


def optional_text(value: object, key: str, where: str) -> str | None:
    """As `check_text`; None for null and for a text without anything in it."""
    return None if value is None or (isinstance(value, str) and not value.strip()) else check_text(value, key, where)


def check_id(value: object, where: str) -> str:
    """A text that can be printed, of at most 200 characters."""
    name = check_text(value, "id", where)
    if not name.isprintable() or len(name) > _MAX_ID:
        raise DataError(f"{where}: id must be at most {_MAX_ID} printable characters, not {name[:_MAX_ID]!r}")
    return name


def check_captions(values: list[Any], where: str) -> tuple[str, ...]:
    """The texts that say something, each once, with single spaces."""
    texts = (optional_text(value, "caption", where) for value in values)
    return tuple(dict.fromkeys(" ".join(text.split()) for text in texts if text is not None))
