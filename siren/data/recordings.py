"""A clip folder of real recordings: five Debian packages of sound effects, picked and captioned by a table.

`recordings.csv` has a row for each sound, or for takes of one sound: package, path inside it (a glob whose * also
matches /), label, captions separated by |, licence (Debian's short names). No sound comes with Siren: the machine's own
apt-get downloads the packages, or they are handed over as .deb files. A path inside a package is only compared with the
table; nothing is unpacked under a name that a package chose.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile
from tqdm import tqdm

from ..checkpoint import replace_folder, sync
from ..errors import DataError
from .clips import CLIPS, read_clip_folder
from .sound import MIN_SECONDS, SAMPLE_RATE, read_sound

__all__ = ["Counts", "Row", "make_recordings", "read_table"]

MAX_SECONDS = 10.0
_MAX_BYTES = 64 << 20  # of one file of a package
_SILENCE = 10 ** (-60 / 20)  # a clip whose peak lies below is silent
_ONSET = 0.02  # of the peak: where a clip that has to be cut begins
_FADE = SAMPLE_RATE // 50
_ELSEWHERE = "pass a folder with the packages' .deb files (--packages FOLDER)"


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    package: str
    path: str
    label: str
    captions: tuple[str, ...]
    licence: str


@dataclass(frozen=True)
class Counts:
    """What `make_recordings` made: clips, their seconds, and how many files were left out for which reason."""

    clips: int
    seconds: float
    dropped: dict[str, int]

    def __str__(self) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items()) or "nothing"
        return f"{self.clips} clips, {self.seconds / 60:.1f} minutes (dropped: {lost})"


@dataclass(frozen=True)
class _Sound:
    row: Row
    path: str
    samples: np.ndarray = field(repr=False)  # int16 [S]


def read_table() -> list[Row]:
    """The table that comes with Siren."""
    text = (resources.files("siren.data") / "recordings.csv").read_text(encoding="utf-8")
    lines = csv.DictReader(io.StringIO(text))
    return [Row(r["package"], r["path"], r["label"], tuple(r["captions"].split("|")), r["licence"]) for r in lines]


def make_recordings(folder: str | Path, packages: str | Path | None = None, progress: bool = True) -> Counts:
    """Make a clip folder of FLAC files (16 kHz, mono, 16 bits, at most 10 s) from the packages that the table names.

    `packages` is a folder with the packages' .deb files, or with an unpacked folder for each, named after its package.
    None downloads them by apt-get (about 1 GB) to `.NAME.packages` beside `folder`; the next call goes on there if this
    one is interrupted, and it is removed at the end. The folder appears whole or not at all; one made earlier is
    replaced. The same packages give the same bytes. `copyright/` holds what each package says of its licences.

    A file that is missing, unreadable, silent, too short (under 0.15 s), too large or the same as another is left out
    and counted; of a longer one the first 10 s with sound are kept. Raises DataError if a package cannot be had, is
    damaged or has none of the table's files, or if `folder` holds something else; CheckpointError if writing fails.
    """
    rows, target = read_table(), Path(folder).expanduser().resolve()
    _check_target(target)
    wanted = list(dict.fromkeys(row.package for row in rows))
    dropped: Counter[str] = Counter()
    sounds: list[_Sound] = []
    copyrights: dict[str, bytes] = {}
    with (
        _package_finder(wanted, target, None if packages is None else Path(packages).expanduser()) as find,
        tqdm(wanted, unit="package", disable=None if progress else True) as bar,
    ):
        for package in bar:
            bar.set_description(package)
            source = find(package)
            found = _read_package(source, package, [row for row in rows if row.package == package], copyrights, dropped)
            if not found:
                raise DataError(f"{source} has none of the sounds that {package} should have; is it that package?")
            sounds += found
            bar.set_postfix(clips=len(sounds))
    order = {row: i for i, row in enumerate(rows)}
    sounds = _without_copies(sorted(sounds, key=lambda sound: (order[sound.row], sound.path)), dropped)
    replace_folder(target, CLIPS, _check_target, lambda temporary: _write(temporary, sounds, copyrights))
    seconds = sum(len(sound.samples) for sound in sounds) / SAMPLE_RATE
    return Counts(len(sounds), seconds, dict(sorted(dropped.items())))


def _check_target(target: Path) -> None:
    """DataError if something is there that `make_recordings` did not write."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if names != {CLIPS, "audio", "copyright"}:
        raise DataError(f"{target} exists and is no folder of recordings; choose another folder")
    ours = {record.path for record in read_clip_folder(target)}
    others = sorted(path.name for path in (target / "audio").iterdir() if path not in ours)
    if others:
        raise DataError(f"{target}/audio also holds {others[0]!r}; move it out, or choose another folder")


@contextmanager
def _package_finder(wanted: list[str], target: Path, packages: Path | None) -> Iterator[Callable[[str], Path]]:
    """A function from a package's name to its .deb file or unpacked folder."""
    if packages is not None:
        found = {package: _find(packages, package) for package in wanted}  # all, before work begins
        yield found.__getitem__
    else:
        store = target.with_name(f".{target.name}.packages")
        yield lambda package: _download(store, package)
        shutil.rmtree(store, ignore_errors=True)


def _find(packages: Path, package: str) -> Path:
    if (packages / package).is_dir():
        return packages / package
    files = sorted(packages.glob(f"{package}_*.deb"))
    if not files:
        raise DataError(f"{packages} has neither {package}_VERSION.deb nor an unpacked folder {package}")
    return files[-1]


def _download(store: Path, package: str) -> Path:
    """The package's file in `store`, by apt-get unless an earlier call got it. apt-get checks its signed hash."""
    done, part = store / package, store / f"{package}.part"
    if done.is_dir():
        return next(done.glob("*.deb"))
    if shutil.which("apt-get") is None:
        raise DataError(f"cannot download {package}: this machine has no apt-get; {_ELSEWHERE}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = ["apt-get", "-qq", "download", package]
        result = subprocess.run(command, cwd=part, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True)
        if not result.returncode and any(part.glob("*.deb")):
            part.rename(done)
    except OSError as error:
        raise DataError(f"cannot write {part}: {error.strerror}") from error
    if not done.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        if not any(store.iterdir()):
            store.rmdir()
        reason = [line for line in result.stderr.splitlines() if line.startswith("E:")] or ["E: no file came"]
        raise DataError(
            f"apt-get cannot download {package} ({reason[-1][2:].strip()}); run apt-get update and try again, "
            f"or {_ELSEWHERE}"
        )
    return next(done.glob("*.deb"))


def _read_package(
    source: Path, package: str, rows: list[Row], copyrights: dict[str, bytes], dropped: Counter[str]
) -> list[_Sound]:
    """The sounds of a package, in its own order; its copyright file goes to `copyrights`."""
    patterns = [(re.compile(fnmatch.translate(row.path)), row) for row in rows]
    notice = f"usr/share/doc/{package}/copyright"

    def find_row(path: str) -> Row | None:
        return next((row for pattern, row in patterns if pattern.match(path)), None)

    sounds, found = [], set()
    files = _read_folder if source.is_dir() else _read_deb
    with tempfile.TemporaryDirectory(prefix="siren-") as temporary:
        for path, data in files(source, lambda path: path == notice or find_row(path) is not None, dropped):
            if path == notice:
                copyrights[package] = data
            if (row := find_row(path)) is None:
                continue
            found.add(row)
            file = Path(temporary) / "sound"
            file.write_bytes(data)
            samples = _convert(file)
            if isinstance(samples, str):
                dropped[samples] += 1
            else:
                sounds.append(_Sound(row, path, samples))
    if missing := len(rows) - len(found):
        dropped["row without a file in the package"] += missing
    return sounds


def _read_folder(folder: Path, wanted: Callable[[str], bool], dropped: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the wanted files of an unpacked package. Links are not followed."""
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if wanted(path) and file.is_file() and not file.is_symlink():
            if file.stat().st_size > _MAX_BYTES:
                dropped["too large"] += 1
            else:
                yield path, file.read_bytes()


def _read_deb(file: Path, wanted: Callable[[str], bool], dropped: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the wanted files of a .deb file. Links, and paths that leave the package, are not read."""
    command = ["dpkg-deb", "--fsys-tarfile", str(file)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise DataError(
            f"cannot unpack {file.name}: this machine has no dpkg-deb; unpack the packages elsewhere, each to a folder "
            "of its name, and pass the folder that holds those (--packages FOLDER)"
        ) from error
    reason = ""
    with process:
        assert process.stdout is not None and process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    if path.is_absolute() or ".." in path.parts or not member.name.isprintable():
                        dropped["unsafe path in a package"] += 1
                    elif member.isreg() and wanted(path.as_posix()):
                        stream = archive.extractfile(member)
                        assert stream is not None
                        if member.size > _MAX_BYTES:
                            dropped["too large"] += 1
                        else:
                            yield path.as_posix(), stream.read()
            while process.stdout.read(1 << 20):
                pass  # padding behind the last member; dpkg-deb would fail if nobody took it
        except tarfile.TarError as error:
            reason = str(error)
        process.stdout.close()
        reason = process.stderr.read().decode(errors="replace").strip() or reason
    if process.returncode or reason:
        raise DataError(f"{file} is damaged ({reason or 'cut off'}); download it again")


def _convert(file: Path) -> np.ndarray | str:
    """A sound file as int16 [S] at 16 kHz, turned down if it would clip; or the reason why it is left out."""
    try:
        sound = read_sound(file)
    except DataError:
        return "unreadable"
    if len(sound) < MIN_SECONDS * SAMPLE_RATE:
        return "too short"
    if np.abs(sound).max() < _SILENCE:
        return "silent"
    size = int(MAX_SECONDS * SAMPLE_RATE)
    if len(sound) > size:
        loud = np.abs(sound) > _ONSET * np.abs(sound).max()
        start = min(max(0, int(np.argmax(loud)) - _FADE), len(sound) - size)
        sound = sound[start : start + size].copy()
        sound[-_FADE:] *= np.linspace(1, 0, _FADE, dtype=np.float32)  # a bare cut would click
    return np.round(sound * 32767).astype(np.int16)


def _without_copies(sounds: list[_Sound], dropped: Counter[str]) -> list[_Sound]:
    """The first of sounds that are the same sample by sample."""
    kept: dict[bytes, _Sound] = {}
    for sound in sounds:
        if kept.setdefault(sound.samples.tobytes(), sound) is not sound:
            dropped["same as another"] += 1
    return list(kept.values())


def _write(folder: Path, sounds: list[_Sound], copyrights: dict[str, bytes]) -> None:
    (folder / "audio").mkdir()
    (folder / "copyright").mkdir()
    for package, text in copyrights.items():
        (folder / "copyright" / f"{package}.txt").write_bytes(text)
    lines, names = [], Counter[str]()
    for sound in sounds:
        row = sound.row
        name = re.sub(r"[^a-z0-9]+", "-", f"{row.package} {PurePosixPath(sound.path).stem}".lower()).strip("-")
        names[name] += 1
        if names[name] > 1:  # files of one name in several folders
            name += f"-file{names[name]}"
        audio, source = f"audio/{name}.flac", f"{row.package}: {sound.path}"
        line = {"id": name, "audio": audio, "caption": row.captions, "label": row.label, "licence": row.licence}
        lines.append(json.dumps(line | {"source": source}, ensure_ascii=False) + "\n")
        soundfile.write(folder / audio, sound.samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    for path in folder.rglob("*"):
        sync(path)
    (folder / CLIPS).write_text("".join(lines), encoding="utf-8")
    sync(folder / CLIPS)
    sync(folder)
